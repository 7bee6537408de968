"""What the sweep and the tests of every backend (test_backend_on_host.py) leave out, of every operator of csrc/ on the CPU.

What one kernel does, its bytes, its plans, stands in a file of its own. test_mutants.py calls some of these tests with a changed library.
"""

from itertools import cycle

import pytest
import torch

from ..kernels import cases
from .host import NEEDS, Refused, arguments_of, compare, run

ATTENTION = ("edited_attention", "fused_edited_attention")
PROJECTIONS = ("edited_projection", "fused_edited_projection")
OPERATORS = ("concept_gates", *PROJECTIONS, *ATTENTION, "edited_projection_backward")
HALVES = (torch.float16, torch.bfloat16)


def small(operator, **sizes):
    """A few tokens of a narrow text; heads of 40 columns, or for a projection, which has none, of 24."""
    defaults = dict(B=3, T=13, D=19, H=1, d=40 if operator in ATTENTION else 24, N=3, dtype=torch.float16)
    return cases.make(**{**defaults, **sizes})


def same_bits(some, others):
    return all(torch.equal(x.contiguous().view(torch.uint8), others[name].contiguous().view(torch.uint8)) for name, x in some.items())


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
    arguments = arguments_of(operator, small(operator, J=1))
    expected = run(host, operator, arguments)
    for name in (name for name, x in arguments.items() if isinstance(x, torch.Tensor)):
        assert same_bits(run(host, operator, {**arguments, name: far(arguments[name])}), expected), name
    for name, x in expected.items() if operator != "concept_gates" else ():
        result = dict(needs=(), results={name: far(x)}) if operator.endswith("backward") else {name: far(x)}
        assert same_bits(run(host, operator, arguments, **result), {name: x}), name


SCHEDULES = {  # sizes, and the machines for which plans differ: multiprocessors, and bytes of shared memory of a block
    "concept_gates": [(dict(J=J, D=D, T=18, dtype=torch.float32), [(2, 232448)]) for J, D in ((5, 40), (11, 40), (3, 600), (9, 600))],
    "edited_projection": [(dict(B=5, T=38, D=270, d=131, J=9), [(0, 232448), (7, 232448), (10**6, 232448)])],
    "edited_attention": [(dict(B=2, T=77, N=150), [(0, 232448), (0, 19300), (0, 15400), (64, 232448)])],
    "fused_edited_attention": [(dict(B=1, T=77, N=130, D=24, d=160), [(0, 232448), (0, 92160), (64, 92160), (64, 232448)])],
    "edited_projection_backward": [(dict(B=2, T=9, D=20, d=520, J=9), [(8, 232448)])],
}


@pytest.mark.parametrize("operator", SCHEDULES)
def test_schedules_agree(host, operator):
    """Tiles, stages, places and blocks of a head as each machine has them, its threads in any order: the same bits."""
    for sizes, machines in SCHEDULES[operator]:
        arguments = arguments_of(operator, small(operator, **sizes))
        if len(machines) == 4:
            arguments["index"] = arguments["index"].clone()
            arguments["index"][-1, 0] = -1  # unlike the place that takes its turn after it
        plans, results = set(), []
        for (multiprocessors, shared), order in zip(machines * 3, cycle(("forward", "backward", "shuffled", "forward"))):
            host.configure(multiprocessors, shared, order)
            if len(machines) > 1:
                plans.add(tuple(host.planned(operator, arguments).items()))
            results.append(run(host, operator, arguments))
        assert len(machines) in (1, len(plans))
        assert all(same_bits(result, results[0]) for result in results)
        assert all(x.isfinite().all() for x in results[0].values())


def test_a_derivative_alone_has_the_bits_of_all(host):
    arguments = arguments_of("edited_projection_backward", small("edited_projection_backward", B=2, T=9, D=20, d=520, J=9))
    together = host.edited_projection_backward(**arguments)
    assert all(same_bits(host.edited_projection_backward([name], **arguments), together) for name in NEEDS)


@pytest.mark.parametrize("operator", OPERATORS[1:])
@pytest.mark.parametrize("tables", (*HALVES, torch.float32))
def test_tables_of_another_dtype(host, operator, tables):
    names = ("value_outputs", "value_targets", "key_outputs", "key_targets")
    compare(host, operator, small(operator, dtype=torch.bfloat16).map(lambda name, x: x.to(tables) if name in names else x))


@pytest.mark.parametrize("operator", ATTENTION)
def test_rows_without_a_concept(host, operator):
    """Have the bits of a call in which no row has one."""
    arguments = small(operator, B=6).arguments(operator)
    result, plain = (getattr(host, operator)(**{**arguments, "index": index}) for index in (arguments["index"], torch.full((6, 2), -1).int()))
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
    arguments = arguments_of(operator, small(operator, T=5))
    options = dict(needs=NEEDS[:3]) if operator.endswith("backward") else {}
    name = next(name for name in ("gradient", "query", "encodings") if name in arguments)
    expected = run(host, operator, arguments, **options)
    arguments[name] = arguments[name].clone()
    arguments[name][1, 2] = torch.nan
    for result, found in run(host, operator, arguments, **options).items():
        before = expected[result]
        assert found[1, 2].isnan().any() and not before.isnan().any()
        found[1, 2] = before[1, 2]
        assert torch.equal(found, before)


@pytest.mark.parametrize(
    "operator, sizes",
    [
        *((operator, dict(B=0)) for operator in OPERATORS[:-1]),  # derivatives of nothing are sums of no rows: test_edited_projection_backward.py
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
    assert all(result.numel() == 0 for result in run(host, operator, arguments).values())


HALF, BRAIN, SINGLE = (lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32))
ABSENT = lambda x: None  # noqa: E731
EMPTY = lambda x: x[..., :0]  # noqa: E731
INVALID, UNSUPPORTED = 1, 2
REFUSALS = [  # operator, sizes, what becomes of arguments, status, message
    ("concept_gates", {}, {"targets": HALF}, INVALID, "targets must be float32; got float16"),
    ("concept_gates", {}, {"index": SINGLE}, INVALID, "index must be int32; got float32"),
    ("concept_gates", {"J": 1}, {"index": lambda x: x.expand(3, 32769)}, UNSUPPORTED, "J must be at most 32768; got 32769"),
    ("edited_projection", {}, {"encodings": EMPTY}, INVALID, "D must lie in 1 ... 1073741824; got 0"),
    ("edited_projection", {}, {"encodings": SINGLE, "weight": SINGLE}, UNSUPPORTED, "encodings must be float16 or bfloat16; got float32"),
    ("edited_projection", {}, {"weight": BRAIN}, INVALID, "weight must be float16; got bfloat16"),
    ("edited_projection", {}, {"gates": ABSENT}, INVALID, "gates must be given; got NULL"),
    ("edited_projection", {}, {"components": HALF}, INVALID, "components must be float32; got float16"),
    ("edited_projection", {}, {"projected_targets": SINGLE}, INVALID, "projected_targets must be float16; got float32"),
    *(
        (operator, *rest)
        for operator in ATTENTION
        for rest in (
            ({"d": 48}, {}, UNSUPPORTED, "d must be one of 32, 40, 64, 80, 96, 128, 160; got 48"),
            ({"T": 257}, {}, UNSUPPORTED, "T must be at most 256; got 257"),
            ({}, {"query": SINGLE}, INVALID, "query must be float16 or another supported dtype; got float32"),
            ({}, {"key_targets": ABSENT}, INVALID, "key_targets must be given; got NULL"),
            ({}, {"gates": HALF}, INVALID, "gates must be float32; got float16"),
        )
    ),
    ("edited_attention", {}, {"key": BRAIN}, INVALID, "key must be float16; got bfloat16"),
    ("fused_edited_attention", {}, {"encodings": BRAIN}, INVALID, "encodings must be float16; got bfloat16"),
    ("fused_edited_attention", {}, {"value_weight": BRAIN}, INVALID, "value_weight must be float16; got bfloat16"),
    ("fused_edited_attention", {}, {"encodings": EMPTY}, INVALID, "D must lie in 1 ... 1073741824; got 0"),
    ("edited_projection_backward", {}, {"gradient": SINGLE}, UNSUPPORTED, "gradient must be float16 or bfloat16; got float32"),
    ("edited_projection_backward", {}, {"weight": BRAIN}, INVALID, "weight must be float16; got bfloat16"),
    ("edited_projection_backward", {}, {"index": SINGLE}, INVALID, "index must be int32; got float32"),
    ("edited_projection_backward", {}, {"gates": HALF}, INVALID, "gates_gradient must be float32; got float16"),
]


@pytest.mark.parametrize("operator, sizes, changes, status, message", REFUSALS)
def test_refusals(host, operator, sizes, changes, status, message):
    arguments = arguments_of(operator, small(operator, **sizes))
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(Refused, match=rf"{operator}(_workspace)?: {message}") as refused:
        run(host, operator, arguments)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "operator, sizes, shared, message",
    [
        ("edited_projection", {}, 16384, "a block needs 41472 bytes of shared memory; this device has 16384"),
        ("edited_projection_backward", {}, 65536, "a block needs 86784 bytes of shared memory; this device has 65536"),
        ("edited_attention", dict(T=256, d=160), 101376, "shared memory, 101376 bytes a block on this device; got T = 256 and d = 160"),
        ("fused_edited_attention", dict(T=154, d=160), 101376, "101376 bytes a block on this device; got T = 154 and d = 160, which need 145920"),
    ],
)
def test_devices_with_too_little_shared_memory(host, operator, sizes, shared, message):
    host.configure(shared_per_block=shared)
    with pytest.raises(Refused, match=f"{operator}: .*{message}"):
        run(host, operator, arguments_of(operator, small(operator, **sizes)))
