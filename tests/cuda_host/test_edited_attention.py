"""The CUDA source of `edited_attention`, run on the CPU, against the plain formula.

test_mutants.py calls some of these tests with a changed library.
"""

import re

import pytest
import torch

from bench import plans, predictions
from bench.chips import CHIPS
from bench.kernels import attention_before_after
from bench.predictions import cuda

from ..kernels import cases
from ..kernels.tolerance import Exact, assert_close, exactly
from .host import compare

HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (32, 40, 64, 80, 96, 128, 160)


def small(T=77, d=40, N=17, H=2, dtype=torch.float16, **sizes):
    return cases.make(T=T, d=d, N=N, H=H, D=11, dtype=dtype, **sizes)


def plainly(case):
    return {name: getattr(case, name) for name in ("query", "key", "value")}


def test_heads_first_layout_is_read_in_place(host):
    case = small()
    expected = host.edited_attention(**plainly(case))
    heads_first = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in plainly(case).items()}
    host.configure()
    assert torch.equal(host.edited_attention(**heads_first), expected)
    assert host.counted()["read_narrow"] == 0


@pytest.mark.parametrize("chip", CHIPS)
def test_one_even_wave(host, chip):
    """No block waits for another to end, every tile has one block, and where all have tiles, nobody has many more than others."""
    for layer in plans.layers():
        for rows in (1, 2, 16, 20, 64):
            plan = plans.plan(host, chip, layer, rows)
            assert plan.blocks <= plan.at_once, plan
            ranges = plan.ranges()
            assert [first for first, _ in ranges[1:]] == [end for _, end in ranges[:-1]]
            assert ranges[0][0] == 0 and ranges[-1][1] == plan.tiles
            assert plan.rounds == 1 or plan.fill() >= 0.7, plan


def test_the_committed_predictions_are_of_these_plans(host):
    """The remedy: python -m bench.predictions."""
    saved = [row for chip in CHIPS for row in predictions.read(chip, "cuda")]
    assert saved == list(cuda.rows(host))


def test_the_committed_page_is_of_these_plans(host):
    """The fill and the matrix loads that it says there are now. The remedy: python bench/kernels/attention_before_after.py."""
    page = attention_before_after.PAGE.read_text(encoding="utf-8")
    for chip in attention_before_after.CHIPS:
        table = page.split(f"### {chip}\n")[1].split("###")[0]
        for layer in plans.layers():
            (line,) = re.findall(rf"^\| N = {layer.N}, {layer.H} heads of {layer.d} \|.*$", table, re.MULTILINE)
            now = [f"{plans.plan(host, chip, layer, rows).fill():.2f}" for rows in plans.ROWS]
            assert re.findall(r"→ (\S+)", line) == now, (chip, line)
    counted = attention_before_after.conflicts(host)
    lines = re.findall(r"^\| cycles of an 8 x 8 matrix .* for (\d+) rows of heads of (\d+) \| (\S+), \S+ \| (\S+), (\S+) \|$", page, re.MULTILINE)
    assert [(int(d), int(N)) for N, d, *_ in lines] == list(counted)
    for (matrices, cycles), (*_, before, now, loads) in zip(counted.values(), lines, strict=True):
        assert (now, loads) == (f"{cycles / matrices:.2f}", f"{matrices:,}") and float(before) >= 1


@pytest.mark.parametrize("m", (1, 2))
@pytest.mark.parametrize("T, d", [(77, 40), (80, 64), (13, 160), (72, 96), (77, 128), (65, 80), (5, 32)])
def test_tiles_of_16_and_of_32_rows(host, m, T, d):
    """The number of multiprocessors says which: few have enough tiles of 32 rows."""
    host.configure({1: 64, 2: 1}[m])
    case = small(B=2, H=2, N=130, T=T, d=d)
    assert host.planned("edited_attention", case.arguments("edited_attention"))["m"] == m
    compare(host, "edited_attention", case)


@pytest.mark.models
@pytest.mark.numeric
@pytest.mark.parametrize("scale", (-0.3, 0.0, 40.0))
def test_any_scale(host, scale):
    """0 is the mean of the values; a negative one prefers the smallest score; large scores do not overflow.

    Scores are float32, however large; weights and results are rounded to the dtype of the values.
    """
    case = small(T=77, d=40)
    query, key, value = (x.double().transpose(1, 2) for x in plainly(case).values())

    def weights(query, key):
        return torch.softmax(scale * query @ key.mT, -1)

    (whole,) = exactly(lambda: (weights(query, key) @ value).transpose(1, 2))
    given = weights(query, key)
    (last,) = exactly(lambda: (given @ value).transpose(1, 2))
    single = torch.finfo(torch.float32).eps / torch.finfo(torch.float16).eps
    assert_close(host.edited_attention(**plainly(case), scale=scale), Exact(whole.value, last.scale + single * whole.scale), roundings=4)


@pytest.mark.parametrize("d", WIDTHS)
def test_no_two_rows_of_a_matrix_share_a_bank(host, d):
    host.configure(1)
    host.edited_attention(**plainly(small(B=1, H=1, N=40, T=77, d=d)))
    counted = host.counted()
    assert counted["matrices"] > 0 and counted["matrix_cycles"] == counted["matrices"]


@pytest.mark.parametrize("d, T", [(40, 77), (64, 80), (160, 154)])
def test_products(host, d, T):
    """Keys are padded to 80, or to the next 16 beyond that, and head widths not at all."""
    case = small(B=1, H=1, N=32, T=T, d=d)
    host.configure()
    host.edited_attention(**plainly(case))
    assert host.counted()["products"] == 2 * 32 * d * (80 if T <= 80 else -T // 16 * -16)
