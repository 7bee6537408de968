"""What every operator must do on every backend that runs here."""

import importlib
import os
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import perfusion_kernels
from perfusion_kernels import BackendUnavailable
from perfusion_kernels.schemas import SCHEMAS

from . import cases, plain
from .tolerance import assert_close, assert_no_worse, exactly

OPERATORS = list(cases.PUBLIC)
each_operator = pytest.mark.parametrize("operator", OPERATORS)
RUNS = [(operator, *run) for operator in OPERATORS for run in cases.runs(operator)]
each_run = pytest.mark.parametrize("operator, backend, device", RUNS)


def each_run_in(*dtypes):
    """Every run, in those of the dtypes that it takes."""
    runs = [(*run, dtype) for run in RUNS for dtype in dtypes if cases.takes(*run[:2], dtype)]
    return pytest.mark.parametrize("operator, backend, device, dtype", runs)


DIFFERENTIABLE = {
    "concept_gates": ("encodings", "targets", "metric_targets", "bias", "temperature"),
    "edited_projection": ("encodings", "weight", "gates", "components", "outputs", "projected_targets"),
    "fused_edited_projection": ("encodings", "weight", "gates", "components", "outputs", "projected_targets"),
    "edited_attention": (
        "query", "key", "value", "gates", "components", "key_outputs", "key_targets", "value_outputs", "value_targets"
    ),
    "fused_edited_attention": (
        "query", "encodings", "key_weight", "value_weight", "gates", "components",
        "key_outputs", "key_targets", "value_outputs", "value_targets",
    ),
    "cross_attention_layer": (
        "hidden_states", "query_weight", "key", "value", "output_weight", "output_bias", "residual"
    ),
}  # fmt: skip


FEW = dict(T=5, D=7, H=1, N=3)  # sizes for what does not depend on them: interpreted kernels take a while


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def call(operator, arguments, **options):
    if "attention" in operator:
        options["scale"] = 0.3
    return as_tuple(cases.PUBLIC[operator](**arguments, **options))


def written_plainly(operator, arguments):
    return as_tuple(getattr(plain, operator)(*cases.positional(operator, arguments)))


def compare_with_plain(operator, case, backend, dtype=None):
    """The public function against the plain formula of the same dtype, both against float64."""
    actual = call(operator, case.arguments(operator), backend=backend)
    same = written_plainly(operator, case.arguments(operator))
    exact = exactly(written_plainly, operator, case.double().arguments(operator))
    for mine, naive, truth in zip(actual, same, exact):
        if mine.numel():
            assert_no_worse(mine, naive, truth, case.index, dtype=dtype)


@pytest.mark.numeric
@each_run
@pytest.mark.parametrize("dtype", cases.FLOATING)
def test_forward_in_every_dtype(operator, backend, device, dtype):
    case = cases.make(J=3, dtype=dtype, device=device, backend=backend)
    if cases.takes(operator, backend, dtype):
        compare_with_plain(operator, case, backend)
    else:
        with pytest.raises(BackendUnavailable, match=f"{str(dtype).removeprefix('torch.')}.* Can run it: .*reference"):
            call(operator, case.arguments(operator), backend=backend)


@pytest.mark.numeric
@each_run
@pytest.mark.parametrize("J", (0, 1, 2, 4, 7, 8, 9))
def test_any_number_of_concepts(operator, backend, device, J):
    B = 16 if operator == "concept_gates" else 4  # the largest error of a concept's few gates would be luck
    compare_with_plain(operator, cases.make(B=B, J=J, device=device, backend=backend, seed=J), backend)


@pytest.mark.numeric
@each_run
@pytest.mark.parametrize("T", (1, 16, 77, 80, 154, 231))
def test_context_lengths(operator, backend, device, T):
    B = max(4, 64 // T) if operator == "concept_gates" else 4  # the largest error of a few gates would be luck
    compare_with_plain(operator, cases.make(B=B, T=T, device=device, backend=backend, seed=T), backend)


@pytest.mark.numeric
@each_run
@pytest.mark.parametrize(
    "sizes", [dict(B=1, D=1, J=1, H=1, d=1, N=1), dict(B=5, D=33, J=3, H=5, d=7, N=1), dict(B=2, D=7, H=2, d=40, N=65)]
)
def test_odd_sizes(operator, backend, device, sizes):
    compare_with_plain(operator, cases.make(T=5, device=device, backend=backend, **sizes), backend)


@each_run
def test_empty_batch(operator, backend, device):
    case = cases.make(device=device, backend=backend)
    shared = ("targets", "weight", "outputs", "output_bias")  # what has no B
    arguments = {
        name: tensor if name.endswith(shared) else tensor[:0] for name, tensor in case.arguments(operator).items()
    }
    for result in call(operator, arguments, backend=backend):
        assert result.shape[0] == 0


@pytest.mark.numeric
@each_run
def test_views_of_poisoned_memory(operator, backend, device):
    case = cases.make(device=device, backend=backend, views=True)
    assert not case.query.is_contiguous() and torch.isnan(case.targets[0]).all()
    exact = exactly(written_plainly, operator, case.double().arguments(operator))
    for view, truth in zip(call(operator, case.arguments(operator), backend=backend), exact, strict=True):
        assert view.is_contiguous() and torch.isfinite(view).all()
        assert_close(view, truth)


@each_run
def test_every_element_is_written(operator, backend, device):
    """Fresh memory is NaN in deterministic mode; nothing of it may be left in a result."""
    arguments = cases.make(device=device, backend=backend).arguments(operator)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert all(torch.isfinite(result).all() for result in call(operator, arguments, backend=backend))
    finally:
        torch.use_deterministic_algorithms(False)


@each_run
def test_inputs_are_left_alone(operator, backend, device):
    arguments = cases.make(device=device, backend=backend).arguments(operator)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    call(operator, arguments, backend=backend)
    for name, tensor in arguments.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def leaves(operator, case):
    arguments = case.arguments(operator)
    for name in DIFFERENTIABLE[operator]:
        arguments[name] = arguments[name].detach().clone().requires_grad_()
    return arguments


@each_run_in(torch.float64)
@pytest.mark.parametrize("J", (0, 1, 3))
def test_gradients_in_float64(operator, backend, device, dtype, J):
    case = cases.make(B=2 if J == 1 else 4, T=3, D=4, J=J, H=2, d=2, N=2, dtype=dtype, device=device, backend=backend)
    arguments = leaves(operator, case)
    names = [name for name in DIFFERENTIABLE[operator] if arguments[name].numel()]

    def function(*tensors):
        return call(operator, {**arguments, **dict(zip(names, tensors))}, backend=backend, validate=False)

    assert torch.autograd.gradcheck(function, tuple(arguments[name] for name in names), fast_mode=J != 1)


@each_run_in(torch.float64)
def test_second_gradients_in_float64(operator, backend, device, dtype):
    arguments = leaves(operator, cases.make(T=3, D=4, J=2, H=1, d=2, N=2, dtype=dtype, device=device, backend=backend))
    names = DIFFERENTIABLE[operator]

    def function(*tensors):
        return call(operator, {**arguments, **dict(zip(names, tensors))}, backend=backend, validate=False)

    assert torch.autograd.gradgradcheck(function, tuple(arguments[name] for name in names), fast_mode=True)


def gradients(operator, case, backend):
    """One gradient per differentiable argument, by arguments whose results weigh differently; "plain" is that formula."""
    wanted = DIFFERENTIABLE[operator]
    arguments = {  # no copies, so that strided arguments stay strided
        name: tensor.detach().requires_grad_(name in wanted) for name, tensor in case.arguments(operator).items()
    }
    if backend == "plain":
        results = written_plainly(operator, arguments)
    else:
        results = call(operator, arguments, backend=backend, validate=False)
    weights = (torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).to(result).view_as(result) for result in results)
    loss = sum((result * weight).sum() for result, weight in zip(results, weights))
    return torch.autograd.grad(loss, [arguments[name] for name in wanted], materialize_grads=backend == "plain")


@pytest.mark.numeric
@each_run_in(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("J, views", ((0, False), (1, True), (3, False), pytest.param(3, True, marks=pytest.mark.proof)))
def test_gradients_are_as_good_as_the_formula_s(operator, backend, device, dtype, J, views):
    """The house's rule: each gradient's error against float64, over all and per concept, beside the formula's in the same dtype.

    The formula is the reference, which multiplies in float32 where it can, or, for attention, the plain one, as the rule has it
    for results: kernels round weights and their derivatives to the dtype of the query before they multiply them, as
    tensor cores demand and as that formula does, and no gradient made from such products can be as good as the reference's.
    """
    case = cases.make(J=J, dtype=dtype, device=device, backend=backend, views=views)
    same = "plain" if operator in ("edited_attention", "fused_edited_attention") else "reference"
    found = (gradients(operator, case, backend), gradients(operator, case, same))
    exact = exactly(gradients, operator, case.double(), "reference")
    for name, mine, other, truth in zip(DIFFERENTIABLE[operator], *found, exact):
        assert mine.shape == truth.value.shape, name
        if mine.numel():
            assert_no_worse(mine, other, truth, concepts_of(name, case))


def concepts_of(name, case):
    """[rows of the argument, J]: the concepts that each of its rows has to do with."""
    if name.endswith(("targets", "outputs")):  # one row per slot
        slots = torch.arange(case.targets.shape[0], device=case.index.device)
        return torch.where(torch.isin(slots, case.index), slots, -1)[:, None]
    if name.endswith(("weight", "output_bias")):  # none
        return case.index.new_empty((getattr(case, name, case.value_weight).shape[0], 0))
    return case.index


@each_run_in(torch.float32, torch.bfloat16)
def test_gradients_have_their_argument_dtype_and_skip_what_is_not_asked(operator, backend, device, dtype):
    arguments = leaves(operator, cases.make(**FEW, dtype=dtype, device=device, backend=backend))
    frozen = DIFFERENTIABLE[operator][-1]
    arguments[frozen].requires_grad_(False)
    sum(result.float().sum() for result in call(operator, arguments, backend=backend)).backward()
    for name in DIFFERENTIABLE[operator]:
        gradient = arguments[name].grad
        if name == frozen:
            assert gradient is None
        else:
            assert gradient.dtype == arguments[name].dtype and torch.isfinite(gradient).all(), name
    for name in ("targets", "outputs", "value_outputs"):  # a slot that no row uses
        if name in arguments and arguments[name].grad is not None:
            assert not arguments[name].grad[0].any()


@each_run
def test_opcheck(operator, backend, device):
    arguments = cases.positional(operator, leaves(operator, cases.make(B=2, T=4, D=5, J=2, H=1, d=4, N=3, device=device, backend=backend)))
    outcome = torch.library.opcheck(cases.overload_of(operator, backend), arguments)
    assert set(outcome) == {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
    assert set(outcome.values()) == {"SUCCESS"}


OWN_DERIVATIVES = [
    run for run in RUNS if run[1] in importlib.import_module(f"perfusion_kernels.{run[0]}").OPERATOR.backwards
]


@pytest.mark.parametrize("operator, backend, device", OWN_DERIVATIVES)
def test_opcheck_of_own_derivatives(operator, backend, device):
    arguments = cases.positional(operator, cases.make(B=2, T=4, D=5, J=2, H=1, d=4, N=3, device=device, backend=backend).arguments(operator))
    gradients = [torch.ones_like(result) for result in as_tuple(cases.overload_of(operator)(*arguments))]
    names = [argument.name for argument in cases.overload_of(operator)._schema.arguments]
    derivative = cases.overload_of(f"{operator}_backward", backend)
    own = [name for name in DIFFERENTIABLE[operator] if (backend, name) != ("cuda", "weight")]  # which it refuses
    for needed in (own, own[-1:]):
        outcome = torch.library.opcheck(derivative, (*gradients, *arguments, [name in needed for name in names]))
        assert set(outcome.values()) == {"SUCCESS"}


@each_operator
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
def test_looks_at_no_value(operator, dtype):
    """On the meta device there is none: a formula that reads one, or allocates by one, fails. The fake agrees."""
    case = cases.make(dtype=dtype)
    arguments = {name: tensor.to("meta") for name, tensor in case.arguments(operator).items()}
    formula = getattr(importlib.import_module(f"perfusion_kernels.reference.{operator}"), operator)
    for function in (formula, cases.overload_of(operator)):
        for meta, real in zip(
            as_tuple(function(*cases.positional(operator, arguments))), call(operator, case.arguments(operator))
        ):
            assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@each_run
def test_compiles_to_one_graph_and_stays_compiled(operator, backend, device):
    """New values in every argument, index, bias and temperature included, retrace nothing."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter, dynamic=False)
    def compiled(arguments):
        return call(operator, arguments)

    with perfusion_kernels.use_backend(backend):
        for seed in range(3):
            case = cases.make(**FEW, device=device, backend=backend, seed=seed)
            arguments = {
                name: tensor.nan_to_num(0.5) if tensor.is_floating_point() else tensor.roll(seed, 0)
                for name, tensor in case.arguments(operator).items()
            }
            for mine, eager in zip(compiled(arguments), call(operator, arguments)):
                assert torch.equal(mine, eager)
    assert counter.frame_count == 1 and counter.op_count >= 1


@each_run
def test_compiles_with_gradients(operator, backend, device):
    torch._dynamo.reset()
    arguments, twin = (leaves(operator, cases.make(**FEW, device=device, backend=backend)) for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(arguments):
        return call(operator, arguments, backend=backend)

    for function, tensors in ((compiled, arguments), (lambda x: call(operator, x, backend=backend), twin)):
        sum(result.square().sum() for result in function(tensors)).backward()
    for name in DIFFERENTIABLE[operator]:
        assert torch.equal(arguments[name].grad, twin[name].grad), name


@pytest.mark.models
@pytest.mark.numeric
@pytest.mark.parametrize(
    "backend, device", [run for run in cases.runs("concept_gates") if run in cases.runs("fused_edited_attention")]
)
def test_compiles_with_inductor(backend, device):
    torch._dynamo.reset()
    case = cases.make(**FEW, device=device, backend=backend)

    def block(case, backend):
        gates, components = perfusion_kernels.concept_gates(**case.arguments("concept_gates"), backend=backend)
        edit = {**case.arguments("fused_edited_attention"), "gates": gates, "components": components}
        return 2 * perfusion_kernels.fused_edited_attention(edit.pop("query").relu(), **edit, backend=backend)

    (exact,) = exactly(lambda: block(case.double(), "reference"))
    other = "ATEN_CPU_CAPABILITY" in os.environ  # for whose code inductor's caches would give that of this processor
    with torch._inductor.config.patch(force_disable_caches=other):
        assert_close(torch.compile(block, fullgraph=True)(case, backend), exact)


@each_run
def test_autocast(operator, backend, device):
    """Gates stay as they are without autocast; the others compute as if their inputs had its dtype."""
    case = cases.make(device=device, backend=backend, dtype=torch.float32)  # which compiled kernels take here alone
    with torch.autocast(device, torch.bfloat16):
        actual = call(operator, case.arguments(operator), backend=backend)
    if operator == "concept_gates":
        expected = call(operator, case.arguments(operator), backend=backend)
    else:
        cast = cases.overload_of(operator, backend)
        names = ("encodings", "weight", "query", "key", "value", "key_weight", "value_weight", *DIFFERENTIABLE["cross_attention_layer"])
        halves = {
            name: tensor.bfloat16() if name in names else tensor for name, tensor in case.arguments(operator).items()
        }
        expected = as_tuple(cast(*cases.positional(operator, halves)))
    for mine, other in zip(actual, expected):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@each_run
def test_autocast_backward_and_compile(operator, backend, device):
    torch._dynamo.reset()
    arguments = leaves(operator, cases.make(**FEW, device=device, backend=backend, dtype=torch.float32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(arguments):
        return call(operator, arguments, backend=backend)

    with torch.autocast(device, torch.bfloat16):
        results = call(operator, arguments, backend=backend)
        for mine, other in zip(compiled(arguments), results):
            assert torch.equal(mine, other)
        leaf = [arguments[name] for name in DIFFERENTIABLE[operator]]
        loss = sum(result.float().square().sum() for result in results)
        inside = torch.autograd.grad(loss, leaf, retain_graph=True)
    outside = torch.autograd.grad(loss, leaf)
    for name, mine, other in zip(DIFFERENTIABLE[operator], inside, outside):
        assert mine.dtype == arguments[name].dtype and torch.equal(mine, other), name


@each_run
def test_vmap_is_refused_by_name(operator, backend, device):
    arguments = cases.make(device=device, backend=backend).arguments(operator)
    first = next(iter(arguments))
    with pytest.raises(NotImplementedError, match=f"{operator}: torch.vmap"):
        torch.vmap(lambda x: call(operator, {**arguments, first: x}, backend=backend))(arguments[first][None])


@each_operator
@pytest.mark.parametrize("validate", (None, False))
def test_shapes_are_always_checked(operator, validate):
    """Every argument in turn gets one dimension too many, one column too many, a wrong dtype, a wrong kind."""
    arguments = cases.make().arguments(operator)
    for name, tensor in arguments.items():
        for wrong, error in (
            (tensor[None], ValueError),
            (tensor.to(torch.int16), TypeError),
            (tensor.to("meta"), ValueError),
            ([1.0], TypeError),
        ):
            if name == next(iter(arguments)) and error is ValueError and wrong.is_meta:
                continue  # the first argument sets the device
            with pytest.raises(error, match=rf"^{operator}: {name} must .*; got "):
                call(operator, {**arguments, name: wrong}, validate=validate)


@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if " index" in SCHEMAS[operator]])
def test_an_index_out_of_range_is_refused(operator):
    arguments = cases.make(J=2, S=5).arguments(operator)
    for value in (5, -2):
        arguments["index"] = torch.full_like(arguments["index"], value)
        with pytest.raises(
            ValueError, match=re.escape(f"{operator}: index must lie in -1 … 4 (S = 5); got values from {value}")
        ):
            call(operator, arguments)


@each_operator
def test_validate_true_cannot_be_compiled(operator):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda arguments: call(operator, arguments, validate=True), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="validate=True looks at values"):
        compiled(cases.make().arguments(operator))


def test_every_schema_has_a_public_function():
    assert set(SCHEMAS) == set(OPERATORS) <= set(perfusion_kernels.__all__)
    assert set(DIFFERENTIABLE) == set(OPERATORS)
