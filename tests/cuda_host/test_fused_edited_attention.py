"""The CUDA source of `fused_edited_attention`, run on the CPU, against the plain formula.

What mutants are killed by stands in functions `check_…(host)`: test_mutants.py calls them with a changed library.
"""

import pytest
import torch

from bench import floors

from ..kernels import cases
from .host import Refused, compare

HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (32, 40, 64, 80, 96, 128, 160)
OPERATOR = "fused_edited_attention"


def small(T=77, D=40, d=40, N=17, H=2, dtype=torch.float16, **sizes):
    return cases.make(T=T, D=D, d=d, N=N, H=H, dtype=dtype, **sizes)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", WIDTHS)
def test_every_head_width(host, d, dtype):
    compare(host, OPERATOR, small(d=d, D=24, dtype=dtype, seed=d, B=2, N=5))


@pytest.mark.parametrize("T", (1, 16, 77, 80, 154, 231, 256))
def test_context_lengths(host, T):
    compare(host, OPERATOR, small(T=T, D=24, dtype=HALVES[T % 2], seed=T, H=1, N=5))


@pytest.mark.parametrize("d, T", [(160, 231), (96, 154)])
def test_long_contexts_of_wide_heads(host, d, T):
    compare(host, OPERATOR, small(d=d, T=T, D=24, H=1, B=2, N=5))


@pytest.mark.parametrize("J", range(9))
def test_any_number_of_concepts(host, J):
    compare(host, OPERATOR, small(T=13, D=19, d=32, J=J, N=3, H=1, dtype=HALVES[J % 2], seed=J))


def test_many_concepts(host):
    compare(host, OPERATOR, small(T=20, D=19, d=32, J=19, N=3, H=1))


@pytest.mark.parametrize("D", (1, 7, 19, 32, 33, 64, 200))
def test_widths_of_the_encodings(host, D):
    """Below a step, a step, several; rows that are and that are not a multiple of 16 bytes."""
    compare(host, OPERATOR, small(T=13, D=D, d=32, N=3, B=2, dtype=HALVES[D % 2], seed=D))


@pytest.mark.parametrize("sizes", [dict(B=1, N=1, H=1, J=1, T=5), dict(B=5, N=33, H=3, J=3, T=79, D=24), dict(B=3, N=16, H=2, T=17)])
def test_odd_sizes(host, sizes):
    compare(host, OPERATOR, small(**sizes))


def check_mixed_rows(host):
    for order in ("forward", "backward"):
        host.configure(order=order)
        compare(host, OPERATOR, small(J=3, D=72, N=5, dtype=torch.bfloat16, seed=5))


def test_mixed_rows(host):
    check_mixed_rows(host)


def check_one_side_after_the_other(host):
    """Heads so wide that values are projected after keys, and more tokens than one tile has."""
    for order in ("forward", "backward"):
        host.configure(order=order)
        compare(host, OPERATOR, small(d=96, T=100, D=40, H=1, B=2, N=20, seed=3))


def test_one_side_after_the_other(host):
    check_one_side_after_the_other(host)


@pytest.mark.parametrize("dtype", HALVES)
def test_views_of_poisoned_memory(host, dtype):
    """Strided, misaligned and surrounded by NaN: the bits of the dense call."""
    case = small(J=3, D=43, N=5, B=2, dtype=dtype, views=True)
    views = case.arguments(OPERATOR)
    dense = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in views.items()}
    assert not case.encodings.is_contiguous()
    compare(host, OPERATOR, case)
    assert torch.equal(host.fused_edited_attention(**views), host.fused_edited_attention(**dense))


def check_a_width_within_longer_rows(host):
    """D that ends inside 16 bytes, in rows that go on with NaN: read in wide accesses, as far as D goes."""
    case = small(D=44, T=13, N=5)

    def longer(name, tensor):
        if name not in ("encodings", "key_weight", "value_weight"):
            return tensor
        room = torch.full((*tensor.shape[:-1], 48), torch.nan, dtype=tensor.dtype)
        room[..., :44] = tensor
        return room[..., :44]

    results = [host.fused_edited_attention(**each.arguments(OPERATOR)) for each in (case, case.map(longer))]
    assert torch.isfinite(results[0]).all() and torch.equal(*results)


def test_a_width_within_longer_rows(host):
    check_a_width_within_longer_rows(host)


def check_the_reference_s_roundings(host):
    """K and V are rounded, edited in float32 and rounded again: the bits of edited_attention to K and V rounded so."""
    case = small(T=20, D=40, N=5, J=3, H=1)
    arguments = case.arguments("edited_attention")
    for name, weight in (("key", case.key_weight), ("value", case.value_weight)):
        exact = case.encodings.double() @ weight.double().T  # sums of 40 products in float32 differ by less than a rounding
        arguments[name] = exact.half().unflatten(-1, case.query.shape[2:])
    fused, parts = host.fused_edited_attention(**case.arguments(OPERATOR)), host.edited_attention(**arguments)
    assert (fused == parts).double().mean() > 0.9
    torch.testing.assert_close(fused, parts, rtol=2e-3, atol=2e-3)


def test_the_reference_s_roundings(host):
    check_the_reference_s_roundings(host)


def test_rows_without_a_concept_are_the_unedited_layer(host):
    case = small(B=6, N=5)
    arguments = case.arguments(OPERATOR)
    result = host.fused_edited_attention(**arguments)
    unedited = host.fused_edited_attention(**{name: arguments[name] for name in ("query", "encodings", "key_weight", "value_weight")})
    none = (case.index < 0).all(-1)
    assert none.any() and torch.equal(result[none], unedited[none])
    assert not torch.equal(result[~none], unedited[~none])


@pytest.mark.parametrize("side", ("key", "value"))
def test_one_side_alone(host, side):
    """With the tables of one side, the other stays; zero tables say the same."""
    arguments = small(T=20, d=32, N=5).arguments(OPERATOR)
    names = [f"{'value' if side == 'key' else 'key'}_{table}" for table in ("outputs", "targets")]
    zeros = {name: torch.zeros_like(arguments[name]) for name in names}
    alone = host.fused_edited_attention(**{**arguments, **dict.fromkeys(names)})
    assert torch.equal(alone, host.fused_edited_attention(**{**arguments, **zeros}))
    assert not torch.equal(alone, host.fused_edited_attention(**arguments))


def check_nothing_is_written_outside(host):
    """Between the rows of a strided output, sentinels stay."""
    arguments = small(B=2, D=24, N=19, T=13).arguments(OPERATOR)
    expected = host.fused_edited_attention(**arguments)
    for room in (8, 3):  # accesses of 16 bytes, and of one element
        memory = torch.full((2, 20, 2, 40 + room), 7.0, dtype=torch.float16)
        result = host.fused_edited_attention(**arguments, output=memory[:, :19, :, :40])
        assert (memory[..., 40:] == 7).all() and (memory[:, 19:] == 7).all()
        assert torch.equal(result, expected)


def test_nothing_is_written_outside(host):
    check_nothing_is_written_outside(host)


def check_schedules_agree(host):
    """One block or several for a head, one stage or two, any order of the threads: the same bits."""
    arguments = small(B=1, H=1, N=130, J=2, D=24, d=160).arguments(OPERATOR)
    seen, results = set(), []
    for multiprocessors, shared, order in ((0, 232448, "forward"), (0, 92160, "backward"), (64, 92160, "shuffled"), (64, 232448, "backward")):
        host.configure(multiprocessors, shared, order)
        plan = host.fused_plan(**arguments)
        seen.add((plan["stages"], plan["splits"] > 1))
        results.append(host.fused_edited_attention(**arguments))
    assert len(seen) == 4
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.isfinite(results[0]).all()


def test_schedules_agree(host):
    check_schedules_agree(host)


@pytest.mark.parametrize(
    "heads, tiles, projection, unit, multiprocessors, splits",
    [
        (1, 1, 100, 1, 132, 1),  # one block has all the tiles at once
        (16, 256, 4_915_200, 102_400, 132, 16),  # Stable Diffusion 1.5, N = 4096, two rows: two blocks for each multiprocessor
        (16, 4, 19_660_800, 409_600, 132, 1),  # and N = 64: a warp for each tile
        (264, 64, 10_000, 10, 132, 1),  # the chip is full as it is
        (1000, 64, 1_000_000, 100, 132, 1),  # what another block would save, it projects
        (133, 64, 0, 1, 132, 8),  # with nothing to project, smaller shares are evener ones
    ],
)
def test_blocks_share_a_head_while_that_pays(built, heads, tiles, projection, unit, multiprocessors, splits):
    assert built.share_projection(heads, tiles, projection, unit, multiprocessors) == splits


def check_no_other_share_is_cheaper(host):
    """Against the sentence of the header, written down again."""

    def work(splits, heads, tiles, projection, unit, chip):
        return max(2, -(-heads * splits // chip)) * (projection + -(-tiles // (4 * splits)) * 4 * unit)

    for shape in ((16, 64, 9_830_400, 204_800, 108), (20, 16, 20_000_000, 100_000, 132), (40, 256, 1_000_000, 90_000, 84)):
        best = host.module.share_projection(*shape)
        assert all(work(best, *shape) <= work(other, *shape) for other in range(1, shape[1] // 4 + 1))


def test_no_other_share_is_cheaper(host):
    check_no_other_share_is_cheaper(host)


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
        splits = host.fused_plan(**arguments)["splits"]
        assert (splits > 1) == (multiprocessors > 0)
        host.fused_edited_attention(**arguments)
        counted = host.counted()
        assert counted["read_narrow"] == counted["written_narrow"] == 0
        assert counted["read_wide"] == least_bytes(case, splits, passes)
        assert counted["written_wide"] == 2 * case.query.numel()


def check_rows_share_weights(host):
    """More weights than the cache holds, and two rows: what device memory brings and takes is the least, or within a tenth of that."""
    case = small(B=2, H=4, N=64, D=768, d=40)
    arguments = {name: getattr(case, name) for name in ("query", "encodings", "key_weight", "value_weight")}
    host.configure(2, 101376, shared_per_multiprocessor=102400, cache=480 << 10)
    assert host.fused_plan(**arguments)["splits"] == 1
    host.fused_edited_attention(**arguments)
    [(_, read, written)] = host.counted()["traffic"]
    assert read + written <= 1.1 * floors.of(OPERATOR, arguments).bytes


def test_rows_share_weights(host):
    check_rows_share_weights(host)


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


def test_what_is_not_finite_stays_in_its_row(host):
    case = small(T=13, d=32, N=3)
    arguments = case.arguments(OPERATOR)
    encodings = case.encodings.clone()
    encodings[1, 2, 3] = torch.nan
    result, clean = host.fused_edited_attention(**{**arguments, "encodings": encodings}), host.fused_edited_attention(**arguments)
    assert result[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(result[others], clean[others])


def test_empty(host):
    for sizes in (dict(B=0), dict(N=0), dict(H=0)):
        case = small(**{"B": 2, "N": 2, "H": 2, **sizes})
        assert host.fused_edited_attention(**case.arguments(OPERATOR)).numel() == 0


def test_refusals(host):
    case = small(T=13, d=32, N=3)
    arguments = case.arguments(OPERATOR)
    for changes, status, message in (
        (small(T=13, d=48, N=3).arguments(OPERATOR), 2, "fused_edited_attention: d must be one of 32, 40, 64, 80, 96, 128, 160; got 48"),
        (small(T=257, d=32, N=3).arguments(OPERATOR), 2, "fused_edited_attention: T must be at most 256; got 257"),
        ({"query": case.query.float()}, 1, "query must be float16 or another supported dtype; got float32"),
        ({"encodings": case.encodings.bfloat16()}, 1, "fused_edited_attention: encodings must be float16; got bfloat16"),
        ({"value_weight": case.value_weight.bfloat16()}, 1, "value_weight must be float16; got bfloat16"),
        ({"encodings": case.encodings[..., :0]}, 1, r"fused_edited_attention: D must lie in 1 ... 1073741824; got 0"),
        ({"key_targets": None}, 1, "fused_edited_attention: key_targets must be given; got NULL"),
        ({"gates": arguments["gates"].half()}, 1, "fused_edited_attention: gates must be float32; got float16"),
    ):
        with pytest.raises(Refused, match=message) as refused:
            host.fused_edited_attention(**{**arguments, **changes})
        assert refused.value.status == status
    host.configure(shared_per_block=101376)
    message = "and a step of their projection must fit into shared memory, 101376 bytes a block on this device; got T = 154 and d = 160, which need 145920"
    with pytest.raises(Refused, match=message):
        host.fused_edited_attention(**small(T=154, d=160, N=3, B=1, H=1).arguments(OPERATOR))
