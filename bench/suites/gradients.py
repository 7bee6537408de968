"""First derivatives of operators: ours by the backends that have kernels of them, plain torch's by autograd without the forward.

`edited_projection` has one concept a row and no derivative by the weight, which nothing here trains; `edited_attention` has no edit.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import formulas, roofline
from bench.measure import Options, Problem
from bench.providers import interpreted
from bench.suites.draw import T, case, unets
from bench.timing import Candidate
from perfusion_kernels import backend
from tests.kernels import cases

NEEDED = {
    "concept_gates": ("encodings", "targets", "metric_targets", "bias", "temperature"),
    "edited_projection": ("encodings", "gates", "components", "outputs", "projected_targets"),
    "edited_attention": ("query", "key", "value"),
}
Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


def problems(options: Options) -> Iterator[Problem]:
    for model, layers, D, B in unets(options):
        O = sum(layer.count * layer.C for layer in roofline.UNETS.get(model, layers))
        one = case(options, B=B, D=D, J=1, H=1, d=8, N=1)
        yield problem(f"concept_gates, {model}, {B} rows", "concept_gates", one, B=B, T=T, D=D, J=1)
        one = case(options, B=B, D=D, J=1, H=1, d=O, N=1)
        yield problem(f"edited_projection, {model}, {B} rows", "edited_projection", one, B=B, T=T, D=D, O=O, J=1)
        for layer in layers:
            sizes = dict(N=layer.N, H=layer.H, d=layer.d)
            one = case(options, B=B, D=16, J=0, **sizes)
            yield problem(f"edited_attention, {model}, {B} rows, N = {layer.N}, d = {layer.d}", "edited_attention", one, B=B, T=T, **sizes)


def problem(name: str, operator: str, one: cases.Case, **sizes: int) -> Problem:
    arguments = one.arguments(operator)
    if operator == "edited_attention":
        arguments = {each: tensor for each, tensor in arguments.items() if each in NEEDED[operator]}
    arguments |= {"scale": sizes["d"] ** -0.5} if "d" in sizes else {}
    formula = getattr(formulas, operator)

    def candidates(arguments: dict[str, Tensor | float]) -> list[Candidate]:
        return [
            *ours(operator, arguments),
            Candidate("eager", by_autograd(formula, operator, arguments)),
            Candidate("expert", by_autograd(getattr(formulas, f"expert_{operator}"), operator, arguments)),
        ]

    def copied() -> list[Candidate]:
        return candidates({each: x.clone() if isinstance(x, Tensor) else x for each, x in arguments.items()})

    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    return Problem(
        name, sizes, tensors[0].dtype, one.index.new_empty((1, 0)),
        exact=by_autograd(formula, operator, arguments, torch.float64), plain=by_autograd(formula, operator, arguments),
        candidates=candidates(arguments), work=getattr(roofline, f"{operator}_backward")(**sizes), again=copied,
        copied=sum(x.nbytes for x in tensors), facts={"operator": f"{operator}_backward"},
    )  # fmt: skip


def ours(operator: str, arguments: dict[str, Tensor | float]) -> Iterator[Candidate]:
    """The derivatives' operator of each backend, called as autograd calls it; the reference is differentiated by autograd."""
    positional = _positional(operator, arguments)
    results = _results(cases.overload_of(operator)(*positional))
    names = [argument.name for argument in cases.overload_of(operator)._schema.arguments]
    call = (*_gradients(results), *positional, [name in NEEDED[operator] for name in names])
    absent = {each.name: each.reason for each in backend.available_backends() if not each.available}
    for name in backend.ORDER:
        if name == "reference":
            yield Candidate(name, by_autograd(cases.overload_of(operator), operator, arguments))
            continue
        reason, own = absent.get(name) or interpreted(name, call[0].device), None
        if not reason:
            own = importlib.import_module(f"perfusion_kernels.{operator}").OPERATOR.backwards.get(name)
            reason = own.unsupported(*call) or "" if own else "it has no kernels of these derivatives"
        yield Candidate(name, own and functools.partial(_alone, own.overload, call), reason, on_graph=True)


def by_autograd(
    function: Function, operator: str, arguments: dict[str, Tensor | float], dtype: torch.dtype | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """The derivatives of a function of the operator's arguments; its forward is done once. dtype: of everything, if not the arguments'."""
    made: dict[str, tuple] = {}

    def call() -> tuple[Tensor, ...]:
        if dtype is not None or not made:  # in float64 forwards are done anew, with operands that `exactly` changes
            made["graph"] = forward()
        return _as_one_row(torch.autograd.grad(*made["graph"], retain_graph=True))

    def forward() -> tuple:
        gradients = _gradients(_results(cases.overload_of(operator)(*_positional(operator, arguments))))
        cast = {name: _in(x, dtype) for name, x in arguments.items()}
        leaves = [cast[name].detach().requires_grad_() for name in NEEDED[operator]]
        results = _results(function(*_positional(operator, {**cast, **dict(zip(NEEDED[operator], leaves))})))
        return results, leaves, [_in(each, dtype) for each in gradients]

    return call


def _in(x: Tensor | float, dtype: torch.dtype | None) -> Tensor | float:
    return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x


def _alone(overload: Callable, call: tuple) -> tuple[Tensor, ...]:
    return _as_one_row(overload(*call))


def _as_one_row(found) -> tuple[Tensor, ...]:
    """Derivatives of tables have no batch rows, so each is compared as a whole."""
    return tuple(each[None] for each in found)


def _results(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _gradients(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of the results; they weigh differently."""
    return tuple(torch.linspace(0.5, 1.5, x.numel(), device=x.device).to(x.dtype).view_as(x) for x in results)


def _positional(operator: str, arguments: dict[str, Tensor | float]) -> tuple:
    return cases.positional(operator, arguments, arguments.get("scale", 1.0))
