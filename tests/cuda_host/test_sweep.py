"""Every operator of the C API on the kernels that run on the CPU: odd sizes, dtypes, views, rows with and without concepts."""

import pytest

from .sweep import OPERATORS, SCHEDULES, sweep


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_is_right(operator):
    for multiprocessors, order in zip(SCHEDULES, ("0", "1", "2"), strict=True):
        ran = sweep(operator, multiprocessors=multiprocessors, order=order)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "every case is right\n", "")


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name.endswith("attention")])
def test_the_widest_head(operator):
    ran = sweep(operator, multiprocessors="1", order="2", width=160)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "every case is right\n", "")
