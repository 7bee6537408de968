"""A backend's own derivatives: when they are taken, what is recorded, and what plain torch still does."""

import dataclasses

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from perfusion_kernels import backend
from perfusion_kernels.edited_attention import OPERATOR as ATTENTION
from perfusion_kernels.edited_projection import OPERATOR as PROJECTION
from perfusion_kernels.reference.edited_attention import edited_attention_backward
from perfusion_kernels.reference.edited_projection import edited_projection_backward
from perfusion_kernels.registration import Implementation, bind, bind_backward
from perfusion_kernels.schemas import SCHEMAS, backward_schema

from . import cases
from .tolerance import assert_close, exactly

DIFFERENTIABLE = ("encodings", "weight", "gates", "components", "outputs", "projected_targets")


class Twin:
    """`edited_projection.twin` and `edited_projection_backward.twin`: the reference, twice the gradients, counted."""

    def __init__(self):
        self.calls, self.reason = [], None
        operator = dataclasses.replace(PROJECTION, backwards={})
        self.overload = bind(operator, "twin", lambda *a: cases.overload_of("edited_projection")(*a))
        self.backward = bind_backward(operator, "twin", self.run)
        operator.backwards["twin"] = Implementation(self.backward, lambda *arguments: self.reason, lambda *a: None)

    def run(self, *arguments):
        self.calls.append(arguments[-1])
        return [2 * x.contiguous() for x in edited_projection_backward(*arguments) if x is not None]


@pytest.fixture(scope="module")
def only_twin():
    return Twin()


@pytest.fixture
def twin(only_twin):
    only_twin.calls.clear()
    only_twin.reason = None
    return only_twin


def leaves(dtype=torch.float32):
    """Of the same values in each dtype."""
    case = cases.make(B=2, T=3, D=4, J=2, H=2, d=2)
    arguments = (case.double() if dtype == torch.float64 else case).arguments("edited_projection")
    arguments = dict(zip(arguments, (x.clone() for x in arguments.values())))
    for name in DIFFERENTIABLE:
        arguments[name] = arguments[name].nan_to_num().requires_grad_()
    return arguments, cases.positional("edited_projection", arguments)


def gradients(function, needed, dtype=torch.float32):
    arguments, ordered = leaves(dtype)
    return torch.autograd.grad(function(*ordered).square().sum(), [arguments[name] for name in needed])


@pytest.mark.numeric
@pytest.mark.parametrize("needed", (DIFFERENTIABLE, ("outputs",), ("encodings", "gates")))
def test_a_backend_s_own_derivatives_are_taken(twin, needed):
    exact = exactly(lambda: gradients(cases.overload_of("edited_projection"), needed, torch.float64))
    for mine, truth in zip(gradients(twin.overload, needed), exact, strict=True):
        assert_close(mine / 2, truth)
    assert len(twin.calls) == 1


def test_only_what_is_needed_is_asked_for(twin):
    arguments, ordered = leaves()
    for name in DIFFERENTIABLE:
        arguments[name].requires_grad_(name in ("weight", "components"))
    twin.overload(*ordered).sum().backward()
    assert twin.calls == [[False, True, False, True, False, False, False]]


def test_plain_torch_takes_what_is_refused(twin):
    twin.reason = "it does not like them"
    expected = gradients(cases.overload_of("edited_projection"), DIFFERENTIABLE)
    for mine, other in zip(gradients(twin.overload, DIFFERENTIABLE), expected):
        assert torch.equal(mine, other)
    assert not twin.calls


def test_second_derivatives_are_plain_torch_s(twin):
    arguments, ordered = leaves(torch.float64)
    tensors = tuple(x for x in ordered if x.requires_grad)

    def function(*tensors):
        found = iter(tensors)
        return twin.overload(*(next(found) if x.requires_grad else x for x in ordered))

    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    with pytest.raises(NotImplementedError, match="edited_projection_backward.twin has no derivative"):
        results = twin.backward(torch.ones(2, 3, 4).double(), *ordered, [x.requires_grad for x in ordered])
        results[0].sum().backward()


def test_a_compiled_function_has_them_in_its_graph(twin):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph.forward)

    compiled = torch.compile(twin.overload, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    for mine, other in zip(gradients(compiled, DIFFERENTIABLE), gradients(twin.overload, DIFFERENTIABLE)):
        assert torch.equal(mine, other)
    assert "perfusion_kernels.edited_projection.twin" in graphs[0]
    assert "perfusion_kernels.edited_projection_backward.twin" in graphs[1]


def test_opcheck(twin):
    arguments, ordered = leaves()
    gradient = torch.ones(2, 3, 4)
    for needs in ([x.requires_grad for x in ordered], [False] * 5 + [True, False]):
        plain = [x.detach() for x in ordered]
        outcome = torch.library.opcheck(twin.backward, (gradient, *plain, needs))
        assert len(outcome) == 4 and set(outcome.values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(twin.overload, ordered).values()) == {"SUCCESS"}


def test_vmap_is_refused_by_name(twin):
    ordered = [x.detach() for x in leaves()[1]]
    with pytest.raises(NotImplementedError, match="edited_projection_backward: torch.vmap"):
        torch.vmap(lambda gradient: twin.backward(gradient, *ordered, [True] + [False] * 6))(torch.ones(1, 2, 3, 4))


@pytest.mark.numeric
def test_arguments_that_are_no_tensors_arrive(monkeypatch):
    """The scale of attention, and None for an edit that is not asked for."""
    seen = []

    def run(*arguments):
        seen.append(arguments[4:])
        return [x for x in edited_attention_backward(*arguments[:-1], tuple(arguments[-1])) if x is not None]

    operator = dataclasses.replace(ATTENTION, backwards={})
    overload = bind(operator, "twin", lambda *a: cases.overload_of("edited_attention")(*a))
    operator.backwards["twin"] = Implementation(
        bind_backward(operator, "twin", run), lambda *a: None, lambda *a: None
    )
    case = cases.make(B=2, T=3, D=4, H=2, d=2, N=2)

    def gradients(function, case):
        tensors = [x.clone().requires_grad_() for x in (case.query, case.key, case.value)]
        return torch.autograd.grad(function(*tensors, *[None] * 10, 0.7).sum(), tensors)

    exact = exactly(lambda: gradients(cases.overload_of("edited_attention"), case.double()))
    for mine, truth in zip(gradients(overload, case), exact, strict=True):
        assert_close(mine, truth)
    assert seen == [(*[None] * 10, 0.7, [True] * 3 + [False] * 11)]


def test_the_schema_of_a_backward():
    assert backward_schema("edited_projection") == (
        "(Tensor gradient, Tensor encodings, Tensor weight, Tensor gates, Tensor components, Tensor index,"
        " Tensor outputs, Tensor projected_targets, bool[] needs) -> Tensor[]"
    )
    assert backward_schema("concept_gates").startswith("(Tensor gates_gradient, Tensor components_gradient, Tensor enc")
    for operator in SCHEMAS:
        assert backward_schema(operator).count("bool[] needs") == 1


def test_registration_refuses_unknown_and_second(monkeypatch):
    operator = dataclasses.replace(PROJECTION, backwards={"cuda": object()})
    with pytest.raises(ValueError, match="edited_projection_backward already has a cuda implementation"):
        backend.register_backward("cuda", operator, None)
    with pytest.raises(ValueError, match="backend must be one of"):
        backend.register_backward("opencl", operator, None)
