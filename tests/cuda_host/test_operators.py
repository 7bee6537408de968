"""What the sweep and the tests of every backend (test_backend_on_host.py) leave out, of every operator of csrc/ on the CPU.

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


def small(operator, **sizes):
    """A few tokens of a narrow text; heads of 40 columns, or for a projection, which has none, of 24."""
    defaults = dict(B=3, T=13, D=19, H=1, d=40 if operator in ATTENTION else 24, N=3, dtype=torch.float16)
    return cases.make(**{**defaults, **sizes})


def run(host, operator, arguments):
    result = getattr(host, operator)(**arguments)
    return result if isinstance(result, tuple) else (result,)


def same_bits(xs, ys):
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.parametrize("d, T, dtype", [*((d, 77, HALVES[d % 3 % 2]) for d in cases.WIDTHS), (160, 231, HALVES[0]), (96, 154, HALVES[1]), (32, 256, HALVES[0])])
def test_head_widths(host, operator, d, T, dtype):
    compare(host, operator, small(operator, B=2, H=2, d=d, T=T, N=17, dtype=dtype, seed=d))


@pytest.mark.parametrize("operator", ("concept_gates", *PROJECTIONS, "fused_edited_attention"))
@pytest.mark.parametrize("D, O", [(1, 1), (7, 3), (8, 8), (33, 9), (64, 136), (257, 40), (520, 24)])
def test_text_widths(host, operator, D, O):
    sizes = {} if operator in ATTENTION else dict(d=O)
    compare(host, operator, small(operator, T=5, J=1 if D == 1 else 2, D=D, **sizes))


def far(x):
    """The same values, the last row more than 2^31 elements behind the first. The system gives memory as it is touched."""
    step = -(-(2**31 + 16) // (x.shape[0] - 1) // 8) * 8
    memory = torch.empty(step * (x.shape[0] - 1) + x[0].numel(), dtype=x.dtype)
    return memory.as_strided(x.shape, (step, *x[0].contiguous().stride())).copy_(x)


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_farther_apart_than_32_bits_count(host, operator):
    """Each argument in turn, and the result where the caller brings it."""
    arguments = small(operator, J=1).arguments(operator)
    expected = run(host, operator, arguments)
    for name in (name for name, x in arguments.items() if isinstance(x, torch.Tensor)):
        assert same_bits(run(host, operator, {**arguments, name: far(arguments[name])}), expected), name
    if operator != "concept_gates":
        result = {"output" if operator in ATTENTION else "result": far(expected[0])}
        assert same_bits(run(host, operator, {**arguments, **result}), expected)


@pytest.mark.parametrize("operator", OPERATORS[1:])
@pytest.mark.parametrize("tables", (*HALVES, torch.float32))
def test_tables_of_another_dtype(host, operator, tables):
    names = ("value_outputs", "value_targets", "key_outputs", "key_targets")
    compare(host, operator, small(operator, dtype=torch.bfloat16).map(lambda name, x: x.to(tables) if name in names else x))


@pytest.mark.parametrize("operator", ATTENTION)
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


@pytest.mark.parametrize("operator", OPERATORS)
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
