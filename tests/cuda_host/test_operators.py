"""What holds for every operator of csrc/, run on the CPU, against the plain formula: dtypes, sizes, layouts, rows that stay alone.

What one kernel does, its bytes, plans and refusals, stands in a file of its own.
"""

import pytest
import torch

from ..kernels import cases
from .host import compare

ATTENTION = ("edited_attention", "fused_edited_attention")
PROJECTIONS = ("edited_projection", "fused_edited_projection")
OPERATORS = ("concept_gates", *PROJECTIONS, *ATTENTION)
HALVES = (torch.float16, torch.bfloat16)
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def small(operator, **sizes):
    """A few tokens of a narrow text; heads of 40 columns, or for a projection, which has none, of 24."""
    defaults = dict(B=3, T=13, D=19, H=1, d=40 if operator in ATTENTION else 24, N=3, dtype=torch.float16)
    return cases.make(**{**defaults, **sizes})


def run(host, operator, arguments):
    result = getattr(host, operator)(**arguments)
    return result if isinstance(result, tuple) else (result,)


def same_bits(xs, ys):
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("operator, dtype", [*((o, t) for o in OPERATORS for t in HALVES), ("concept_gates", torch.float32)])
def test_every_dtype(host, operator, dtype):
    compare(host, operator, small(operator, J=3, dtype=dtype))


@each_operator
@pytest.mark.parametrize("J", (*range(10), 19))
def test_any_number_of_concepts(host, operator, J):
    compare(host, operator, small(operator, B=4, J=J, D=48, dtype=HALVES[J % 2], seed=J))


@each_operator
@pytest.mark.parametrize("T", (1, 16, 77, 80, 154, 231, 256))
def test_context_lengths(host, operator, T):
    B = max(2, 32 // T) if operator == "concept_gates" else 4  # the largest error of a few gates would be luck
    compare(host, operator, small(operator, B=B, T=T, N=5, dtype=HALVES[T % 2], seed=T))


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.parametrize("d, T, dtype", [*((d, 77, HALVES[d % 3 % 2]) for d in cases.WIDTHS), (160, 231, HALVES[0]), (96, 154, HALVES[1])])
def test_head_widths(host, operator, d, T, dtype):
    compare(host, operator, small(operator, B=2, H=2, d=d, T=T, N=17, dtype=dtype, seed=d))


@pytest.mark.parametrize("operator", ("concept_gates", *PROJECTIONS, "fused_edited_attention"))
@pytest.mark.parametrize("D, O", [(1, 1), (7, 3), (8, 8), (33, 9), (64, 136), (257, 40), (520, 24)])
def test_text_widths(host, operator, D, O):
    sizes = {} if operator in ATTENTION else dict(d=O)
    compare(host, operator, small(operator, T=5, J=1 if D == 1 else 2, D=D, **sizes))


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.parametrize("sizes", [dict(B=1, N=1, J=1, T=5), dict(B=5, N=33, H=3, J=3, T=79), dict(B=3, N=16, H=2, T=17)])
def test_odd_sizes(host, operator, sizes):
    compare(host, operator, small(operator, d=40, **sizes))


@each_operator
@pytest.mark.parametrize("dtype", HALVES)
def test_views_of_poisoned_memory(host, operator, dtype):
    """Strided, misaligned and surrounded by NaN: the bits of the dense call."""
    case = small(operator, J=3, D=43, N=5, dtype=dtype, views=True)
    views = case.arguments(operator)
    dense = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in views.items()}
    assert not any(tensor.is_contiguous() for tensor in views.values())
    compare(host, operator, case)
    if operator == "concept_gates":  # whose sums take other lanes where 16 bytes are not read at once
        return
    assert same_bits(run(host, operator, views), run(host, operator, dense))


@pytest.mark.parametrize("operator", OPERATORS[1:])
def test_elements_apart(host, operator):
    """The columns of a row need not be neighbours."""
    case = small(operator, J=1)
    apart = case.map(lambda name, x: x.repeat_interleave(2, -1)[..., ::2] if x.is_floating_point() else x)
    assert apart.value_weight.stride(-1) == 2
    assert same_bits(*(run(host, operator, each.arguments(operator)) for each in (apart, case)))


@pytest.mark.parametrize("operator", OPERATORS[1:])
@pytest.mark.parametrize("tables", (*HALVES, torch.float32))
def test_tables_of_another_dtype(host, operator, tables):
    names = ("value_outputs", "value_targets", "key_outputs", "key_targets")
    compare(host, operator, small(operator, dtype=torch.bfloat16).map(lambda name, x: x.to(tables) if name in names else x))


@pytest.mark.parametrize("operator", OPERATORS[1:])
def test_rows_without_a_concept(host, operator):
    """Have the bits of a call in which no row has one."""
    arguments = small(operator, B=6).arguments(operator)
    (result,), (plain,) = (run(host, operator, {**arguments, "index": index}) for index in (arguments["index"], torch.full((6, 2), -1).int()))
    none = (arguments["index"] < 0).all(-1)
    assert none.any() and torch.equal(result[none], plain[none])
    assert not torch.equal(result[~none], plain[~none])


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.parametrize("side", ("key", "value"))
def test_one_side_alone(host, operator, side):
    """With the tables of one side, the other stays; zero tables say the same."""
    arguments = small(operator, T=20, N=5).arguments(operator)
    names = [f"{'value' if side == 'key' else 'key'}_{table}" for table in ("outputs", "targets")]
    zeros = {name: torch.zeros_like(arguments[name]) for name in names}
    alone = run(host, operator, {**arguments, **dict.fromkeys(names)})
    assert same_bits(alone, run(host, operator, {**arguments, **zeros})) and not same_bits(alone, run(host, operator, arguments))


@each_operator
def test_what_is_not_finite_stays_in_its_row(host, operator):
    arguments = small(operator, T=5).arguments(operator)
    name = next(name for name in ("query", "encodings") if name in arguments)
    expected = run(host, operator, arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][1, 2] = torch.nan
    for found, before in zip(run(host, operator, arguments), expected):
        assert found[1, 2].isnan().any() and not before.isnan().any()
        found[1, 2] = before[1, 2]
        assert torch.equal(found, before)


@pytest.mark.parametrize(
    "operator, sizes",
    [
        *((operator, dict(B=0)) for operator in OPERATORS),
        *((operator, dict(N=0)) for operator in ATTENTION),
        *((operator, dict(H=0)) for operator in ATTENTION),
    ],
)
def test_empty(host, operator, sizes):
    arguments = small(operator, J=1, **{"B": 2, **sizes} if "H" not in sizes else {"B": 2}).arguments(operator)
    if "H" in sizes:
        wide = ("query", "key", "value")
        arguments |= {name: arguments[name][:, :, :0] for name in wide if name in arguments}
        arguments |= {name: x[:0] if "weight" in name else x[:, :0] for name, x in arguments.items() if "weight" in name or name.endswith(("outputs", "targets"))}
    assert all(result.numel() == 0 for result in run(host, operator, arguments))
