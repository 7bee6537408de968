"""Selects the implementation of an operator for each call.

A backend is a subpackage of this package whose import calls `register` once per operator it has. One that needs more
than a successful import has a function `unavailable`, which returns why none of its operators can run here, or None.
A call takes the first of its operator's `DEFAULTS` that is registered, supports the arguments and is preferred for them. A
backend requested by name (a call's `backend=`, `use_backend`, or the environment variable
PERFUSION_BACKEND, in this order) is used, or the call fails with the reason.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from .registration import Implementation, Operator, bind, bind_backward

ORDER = ("cuda", "triton", "reference")

# The candidates of a call that names no backend, in order of preference. A kernel of this package is a default where it
# replaces several launches of plain torch. Where it would replace a library's matrix product, it becomes a default by a commit
# that carries the measurement (bench/results); until then it runs only when requested by name. An operator without a row
# here uses `ORDER`.
DEFAULTS = {
    "concept_gates": ("cuda", "triton", "reference"),
    "edited_projection": ("triton", "reference"),  # both call the library's product, so rows without a concept keep its bits
    "fused_edited_projection": ("triton", "reference"),
    "edited_attention": ("cuda", "triton", "reference"),
    "fused_edited_attention": ("cuda", "triton", "reference"),
    "cross_attention_layer": ("reference",),  # only absorbed ones: else torch's products around `edited_attention`
}

_requested: str | None = os.environ.get("PERFUSION_BACKEND") or None
_implementations: dict[str, dict[str, Implementation]] = {}  # operator -> backend -> how to call it
_absent: dict[str, str] = {}  # backend -> why it is absent
_unavailable: dict[str, Callable[[], str | None]] = {}  # backend -> its `unavailable`


class BackendUnavailable(RuntimeError):
    """A backend was requested by name and cannot run the call."""


@dataclass(frozen=True)
class BackendStatus:
    """One line of `available_backends()`; `reason` says why the backend is absent, or is empty."""

    name: str
    operators: tuple[str, ...]
    reason: str

    @property
    def available(self) -> bool:
        return bool(self.operators)

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.operators) if self.available else 'unavailable, ' + self.reason}"


def _no_objection(*arguments) -> None:
    return None


def register(
    backend: str,
    operator: Operator,
    implementation: Callable | None,
    *,
    unsupported: Callable[..., str | None] = _no_objection,
    not_preferred: Callable[..., str | None] = _no_objection,
) -> None:
    """Registers `implementation` as the `backend`'s kernel of `operator`.

    implementation: a function of the schema's arguments, or None if a loaded C++ library registers the
        kernel of `perfusion_kernels::<operator>.<backend>` itself.
    unsupported: given the schema's arguments, None, or the reason why they cannot run here. It may look at
        shapes, dtypes and devices only: it runs under `torch.compile` too.
    not_preferred: the same, for calls that run here only if `backend` is requested by name.
    """
    implementations = _implementations.setdefault(operator.name, {})
    _require_new(backend, operator.name, implementations)
    implementations[backend] = Implementation(bind(operator, backend, implementation), unsupported, not_preferred)


def register_backward(
    backend: str,
    operator: Operator,
    implementation: Callable | None,
    *,
    unsupported: Callable[..., str | None] = _no_objection,
) -> None:
    """Registers `implementation` as the `backend`'s derivative of `operator`, in place of plain torch.

    implementation: as `registration.bind_backward` says; None if a loaded C++ library registers the kernel of
        `perfusion_kernels::<operator>_backward.<backend>` itself.
    unsupported: as in `register`, given the arguments of the backward operator; those calls, and second derivatives,
        are differentiated in plain torch.
    """
    _require_new(backend, f"{operator.name}_backward", operator.backwards)
    overload = bind_backward(operator, backend, implementation)
    operator.backwards[backend] = Implementation(overload, unsupported, _no_objection)


def _require_new(backend: str, operator: str, implementations: dict[str, Implementation]) -> None:
    if backend not in ORDER:
        raise ValueError(f"register: backend must be one of {', '.join(ORDER)}; got {backend!r}")
    if backend in implementations:
        raise ValueError(f"register: {operator} already has a {backend} implementation")


def load(backend: str) -> None:
    """Imports the backend's subpackage; if that fails, records why."""
    module = f"{__package__}.{backend}"
    if importlib.util.find_spec(module) is None:
        _absent[backend] = "not part of this installation"
        return
    try:
        _unavailable[backend] = getattr(importlib.import_module(module), "unavailable", _no_objection)
    except (ImportError, OSError, BackendUnavailable) as error:
        _absent[backend] = f"{type(error).__name__}: {error}"


def call(operator: str, arguments: Sequence, backend: str | None = None):
    """`select`s an implementation and runs it.

    If no gradient is needed, autograd's dispatch is skipped, which is half of the cost of an eager call.
    """
    overload = select(operator, arguments, backend)
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments))
    ):
        return overload(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*arguments)


def select(operator: str, arguments: Sequence, backend: str | None = None) -> OpOverload:
    """The overload that runs this call."""
    implementations = _implementations[operator]
    name = requested(backend)
    if name is not None:
        reason = _why_not(name, implementations, arguments)
        if reason is not None:
            others = [name for name in ORDER if _why_not(name, implementations, arguments) is None]
            raise BackendUnavailable(
                f"{operator}: backend {name!r} was asked for but cannot run this call: {reason}."
                f" Can run it: {', '.join(others)}"
            )
        return implementations[name].overload
    for name in DEFAULTS.get(operator, ORDER):
        found = implementations.get(name)  # the reason of an absence is not computed here, on the hot path
        if found is not None and found.unsupported(*arguments) is None and found.not_preferred(*arguments) is None:
            return found.overload
    raise BackendUnavailable(f"{operator}: no backend can run this call")


def requested(backend: str | None = None) -> str | None:
    """The backend that a call requests by name, by its argument, `use_backend` or the environment; None: chosen automatically."""
    name = backend if backend is not None else _requested
    return None if name == "auto" else name


def differentiated(arguments: Sequence) -> bool:
    """Whether the call will be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in arguments)


def _why_not(backend: str, implementations: dict[str, Implementation], arguments: Sequence) -> str | None:
    if backend not in ORDER:
        return f"there is no such backend, only {', '.join(ORDER)}"
    if backend not in implementations:
        return _reason(backend) or "it does not implement this operator"
    return implementations[backend].unsupported(*arguments)


def _reason(backend: str) -> str | None:
    return _absent[backend] if backend in _absent else _unavailable.get(backend, _no_objection)()


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Inside the `with`, calls that name no backend run on `backend`; "auto" or None: choose automatically.

    Process-wide, as the flags of `torch.backends` are, and seen by compiled functions, which retrace.
    An unknown name raises ValueError here; an absent backend raises BackendUnavailable at the call.
    """
    global _requested
    if backend not in (None, "auto", *ORDER):
        raise ValueError(f"use_backend: backend must be one of auto, {', '.join(ORDER)}; got {backend!r}")
    before, _requested = _requested, backend
    try:
        yield
    finally:
        _requested = before


def available_backends() -> tuple[BackendStatus, ...]:
    """Every backend in the order of preference, with its operators, or the reason why none of them can run. May look for devices."""
    found = []
    for name in ORDER:
        operators = tuple(operator for operator, have in _implementations.items() if name in have)
        reason = _reason(name) or ("" if operators else "it registers no operator")
        found.append(BackendStatus(name, () if reason else operators, reason))
    return tuple(found)
