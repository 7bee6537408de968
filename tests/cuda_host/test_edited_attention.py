"""The CUDA source of `edited_attention`, run on the CPU, against the plain formula.

test_mutants.py calls some of these tests with a changed library.
"""

import json

import pytest
import torch

from bench import plans, predictions
from perfusion_kernels import edited_attention

from ..kernels import cases
from .host import Refused, compare

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


def test_schedules_agree(host):
    """One block or several for a head, one stage or two, concepts together or in turn, any order of the threads: the same bits."""
    arguments = small(B=2, H=1, N=150, J=2).arguments("edited_attention")
    arguments["index"] = arguments["index"].clone()
    arguments["index"][1, 0] = -1  # unlike the place that takes its turn after it
    seen, results = set(), []
    for multiprocessors, shared, order in ((0, 232448, "forward"), (0, 19300, "backward"), (0, 15400, "shuffled"), (64, 232448, "backward")):
        host.configure(multiprocessors, shared, order)
        plan = host.plan(**arguments)
        seen.add((plan["warps"], plan["stages"], plan["places"], plan["splits"] > 1))
        results.append(host.edited_attention(**arguments))
    assert seen == {(4, 2, 2, False), (4, 1, 1, False), (1, 2, 1, False), (4, 2, 2, True)}
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.isfinite(results[0]).all()


@pytest.mark.parametrize("chip", plans.CHIPS)
def test_one_even_wave(host, chip):
    """No block waits for another to end, every tile has one block, and where all have tiles, nobody has many more than others."""
    for layer in plans.layers():
        for rows in (1, 2, 16, 20, 64):
            plan = plans.plan(host, chip, layer, rows)
            assert plan.blocks <= plan.at_once, plan
            stretches = plan.stretches()
            assert [first for first, _ in stretches[1:]] == [end for _, end in stretches[:-1]]
            assert stretches[0][0] == 0 and stretches[-1][1] == plan.tiles
            assert plan.rounds == 1 or plan.fill() >= 0.7, plan


def test_the_committed_predictions_are_of_these_plans(host):
    """The remedy: python bench/plans.py."""
    assert predictions.FILE.read_text().splitlines() == [json.dumps(row) for row in plans.predictions(host)]


@pytest.mark.parametrize("m", (1, 2))
@pytest.mark.parametrize("T, d", [(77, 40), (80, 64), (13, 160), (72, 96), (77, 128), (65, 80), (5, 32)])
def test_tiles_of_16_and_of_32_rows(host, m, T, d):
    """The number of multiprocessors says which: few have work enough with tall ones."""
    host.configure({1: 64, 2: 1}[m])
    case = small(B=2, H=2, N=130, T=T, d=d)
    assert host.plan(**case.arguments("edited_attention"))["m"] == m
    compare(host, "edited_attention", case)


@pytest.mark.parametrize("scale", (-0.3, 0.0, 40.0))
def test_any_scale(host, scale):
    """0 is the mean of the values; a negative one prefers the smallest score; large scores do not overflow."""
    case = small(T=77, d=40)
    expected = edited_attention(*(x.double() for x in plainly(case).values()), scale=scale, backend="reference")
    torch.testing.assert_close(host.edited_attention(**plainly(case), scale=scale).double(), expected, rtol=2e-3, atol=4e-3)


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


def test_refusals(host):
    case = small(T=13, d=32, N=3)
    arguments = case.arguments("edited_attention")
    for changes, status, message in (
        (plainly(small(T=13, d=48, N=3)), 2, "edited_attention: d must be one of 32, 40, 64, 80, 96, 128, 160; got 48"),
        (plainly(small(T=257, d=32, N=3)), 2, "edited_attention: T must be at most 256; got 257"),
        (plainly(small(T=13, d=32, N=3, dtype=torch.float32)), 1, "query must be float16 or another supported dtype; got float32"),
        ({"key": case.key.bfloat16()}, 1, "edited_attention: key must be float16; got bfloat16"),
        ({"key_targets": None}, 1, "edited_attention: key_targets must be given; got NULL"),
        ({"gates": arguments["gates"].half()}, 1, "edited_attention: gates must be float32; got float16"),
    ):
        with pytest.raises(Refused, match=message) as refused:
            host.edited_attention(**{**arguments, **changes})
        assert refused.value.status == status
    host.configure(shared_per_block=101376)
    with pytest.raises(Refused, match="must fit into shared memory, 101376 bytes a block on this device; got T = 256 and d = 160"):
        host.edited_attention(**plainly(small(T=256, d=160, N=3, B=1, H=1)))
