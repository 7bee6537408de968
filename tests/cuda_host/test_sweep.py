"""Every operator of the C API on the kernels that run on the CPU: odd sizes, dtypes, views, rows with and without concepts."""

import pytest

from .sweep import OPERATORS, SCHEDULES, sweep

# (multiprocessors, order of a block's threads): the first in `make test`, so that every operator has one run there
RUNS = [pytest.param(*run, marks=pytest.mark.proof if number else ()) for number, run in enumerate(zip(SCHEDULES, ("0", "1", "2"), strict=True))]


@pytest.mark.parametrize("multiprocessors, order", RUNS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_is_right(operator, multiprocessors, order):
    ran = sweep(operator, multiprocessors=multiprocessors, order=order)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "every case is right\n", "")


@pytest.mark.proof
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name.endswith("attention")])
def test_the_widest_head(operator):
    ran = sweep(operator, multiprocessors="1", order="2", width=160)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "every case is right\n", "")
