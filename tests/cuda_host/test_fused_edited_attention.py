"""The CUDA source of `fused_edited_attention`, run on the CPU, against the plain formula.

test_mutants.py calls some of these tests with a changed library.
"""

from dataclasses import replace

import pytest
import torch

from bench import roofline

from ..kernels import cases
from .host import compare

HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (32, 40, 64, 80, 96, 128, 160)
OPERATOR = "fused_edited_attention"


def small(T=77, D=40, d=40, N=17, H=2, dtype=torch.float16, **sizes):
    return cases.make(T=T, D=D, d=d, N=N, H=H, dtype=dtype, **sizes)


def test_one_side_after_the_other(host):
    """Heads so wide that values are projected after keys, and more tokens than one tile has."""
    for order in ("forward", "backward"):
        host.configure(order=order)
        compare(host, OPERATOR, small(d=96, T=100, D=40, H=1, B=2, N=20, seed=3))


def test_the_reference_s_roundings(host):
    """K and V are rounded, edited in float32 and rounded again: the bits of edited_attention to K and V rounded so.

    Factors are multiples of 1/64, whose products and their sums float32 holds exactly, in any order.
    """
    case = small(T=20, D=40, N=5, J=3, H=1)
    fixed = {name: (getattr(case, name).float() * 64).round() / 64 for name in ("encodings", "key_weight", "value_weight")}
    case = replace(case, **{name: x.half() for name, x in fixed.items()})
    arguments = case.arguments("edited_attention")
    for name, weight in (("key", case.key_weight), ("value", case.value_weight)):
        exact = case.encodings.double() @ weight.double().T
        assert torch.equal(exact, exact.float().double()) and not torch.equal(exact, exact.half().double())
        arguments[name] = exact.half().unflatten(-1, case.query.shape[2:])
    assert torch.equal(host.fused_edited_attention(**case.arguments(OPERATOR)), host.edited_attention(**arguments))


def test_no_other_share_is_cheaper(host):
    """Against the sentence of the header, written down again."""

    def work(splits, heads, tiles, projection, unit, chip):
        return max(2, -(-heads * splits // chip)) * (projection + -(-tiles // (4 * splits)) * 4 * unit)

    for shape in ((16, 64, 9_830_400, 204_800, 108), (20, 16, 20_000_000, 100_000, 132), (40, 256, 1_000_000, 90_000, 84)):
        best = host.module.share_projection(*shape)
        assert all(work(best, *shape) <= work(other, *shape) for other in range(1, shape[1] // 4 + 1))


def least_bytes(case, splits=1, passes=1):
    """Queries and outputs once; for each block, weights once, encodings once for each pass of the projection."""
    heads = case.query.shape[0] * case.query.shape[2]
    of_a_block = case.encodings[0].numel() * passes + (case.key_weight.numel() + case.value_weight.numel()) // case.query.shape[2]
    return 2 * (case.query.numel() + heads * splits * of_a_block)


@pytest.mark.parametrize("d, passes", [(64, 1), (40, 1), (96, 2)])
def test_bytes(host, d, passes):
    """What the model says, all of it 16 bytes at a time."""
    case = small(B=1, H=1, N=130, T=80, D=32, d=d)
    for multiprocessors in (0, 64):
        host.configure(multiprocessors)
        arguments = {name: getattr(case, name) for name in ("query", "encodings", "key_weight", "value_weight")}
        splits = host.planned(OPERATOR, arguments)["splits"]
        assert (splits > 1) == (multiprocessors > 0)
        host.fused_edited_attention(**arguments)
        counted = host.counted()
        assert counted["read_narrow"] == counted["written_narrow"] == 0
        assert counted["read_wide"] == least_bytes(case, splits, passes)
        assert counted["written_wide"] == 2 * case.query.numel()


def test_rows_share_weights(host):
    """More weights than the cache holds, and two rows: what device memory brings and takes is the least, or within a tenth of that."""
    case = small(B=2, H=4, N=64, D=768, d=40)
    arguments = {name: getattr(case, name) for name in ("query", "encodings", "key_weight", "value_weight")}
    host.configure(2, 101376, shared_per_multiprocessor=102400, cache=480 << 10)
    assert host.planned(OPERATOR, arguments)["splits"] == 1
    host.fused_edited_attention(**arguments)
    [(_, read, written)] = host.counted()["traffic"]
    assert read + written <= 1.1 * roofline.of(OPERATOR, arguments).bytes


@pytest.mark.parametrize("J", (1, 3, 8))
def test_bytes_of_an_edit(host, J):
    """A block reads its head's columns of each table once, the coefficients of its row once."""
    case = small(B=2, H=2, N=20, T=77, D=32, d=40, J=J)
    arguments = case.arguments(OPERATOR) | {"index": torch.arange(2 * J, dtype=torch.int32).view(2, J) % case.value_outputs.shape[0]}
    arguments |= {name: torch.ones_like(arguments[name]) for name in ("gates", "components")}
    host.configure(0)
    host.fused_edited_attention(**arguments)
    counted, blocks = host.counted(), 4
    assert counted["read_wide"] == least_bytes(case) + blocks * J * 4 * 40 * 2
    assert counted["read_narrow"] == blocks * (77 * J * 2 * 4 + 5 * J * 4)


@pytest.mark.parametrize("d, columns", [(32, 64), (40, 96), (80, 160), (160, 320)])
def test_products(host, d, columns):
    """80 tokens, and both sides' columns to the next 16: only heads of 40 are multiplied by more than there is."""
    case = small(B=1, H=1, N=32, T=77, D=64, d=d)
    host.configure(0)
    host.fused_edited_attention(**case.arguments(OPERATOR))
    assert host.counted()["products"] == 80 * 64 * columns + 2 * 32 * d * 80
