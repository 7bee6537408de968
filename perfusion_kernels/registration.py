"""Registers functions as torch operators: schema, fake, autograd, autocast and vmap rule.

`torch.library.Library` is used rather than `torch.library.custom_op`: it costs half as much per call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload

from .schemas import SCHEMAS, backward_schema

LIBRARY = torch.library.Library("perfusion_kernels", "DEF")

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


@dataclass(frozen=True)
class Implementation:
    """An overload and its predicates, which return None or a reason; they look at shapes, dtypes and devices only."""

    overload: OpOverload
    unsupported: Callable[..., str | None]
    not_preferred: Callable[..., str | None]


@dataclass(frozen=True)
class Operator:
    """The traits shared by all backends of one operator; the file of the public function declares them.

    fake: shapes, dtypes and strides of the result, from arguments without data.
    setup_context, backward: as `torch.library.register_autograd` wants them, in plain torch; setup_context
        saves every tensor argument, in order.
    autocast: names of the arguments that autocast casts. The others keep their dtype.
    backwards: by backend, the operator of the first derivatives that is used instead of `backward`.
    """

    name: str
    fake: Callable
    setup_context: Callable
    backward: Callable
    autocast: tuple[str, ...] = ()
    backwards: dict[str, Implementation] = field(default_factory=dict)


def bind(operator: Operator, backend: str, implementation: Callable | None) -> OpOverload:
    """Defines `perfusion_kernels::<operator>.<backend>` and returns it.

    implementation: a function of the schema's arguments; None if a C++ library registers the kernel.
    """
    name = f"{operator.name}.{backend}"
    overload = _define(operator.name, backend, SCHEMAS[operator.name], implementation, operator.fake)
    torch.library.register_autograd(
        f"{LIBRARY.ns}::{name}", _derivative(operator, backend), setup_context=_keep_all(operator), lib=LIBRARY
    )
    for device_type, key in AUTOCAST_KEYS.items():
        LIBRARY.impl(name, _autocast_rule(overload, operator.autocast, device_type), key)
    return overload


def bind_backward(operator: Operator, backend: str, implementation: Callable | None) -> OpOverload:
    """Defines `perfusion_kernels::<operator>_backward.<backend>` and returns it.

    implementation: a function of the arguments of `backward_schema`: the results' gradients, those of the operator,
        and `needs`, one bool for each of the latter. It returns the gradients that are needed, in order, dense and in
        their argument's dtype. None if a C++ library registers the kernel.
    """
    name = f"{operator.name}_backward"
    overload = _define(name, backend, backward_schema(operator.name), implementation, _fake_gradients)

    def no_second_derivative(ctx, *gradients):
        raise NotImplementedError(f"{overload} has no derivative; take second derivatives of {operator.name} itself")

    torch.library.register_autograd(f"{LIBRARY.ns}::{name}.{backend}", no_second_derivative, lib=LIBRARY)
    return overload


def _define(operator: str, backend: str, schema: str, implementation: Callable | None, fake: Callable) -> OpOverload:
    name = f"{operator}.{backend}"
    qualified_name = f"{LIBRARY.ns}::{name}"
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation or _without_kernel(qualified_name), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified_name, fake, lib=LIBRARY)
    torch.library.register_vmap(qualified_name, _vmap_unsupported(operator), lib=LIBRARY)
    return getattr(getattr(getattr(torch.ops, LIBRARY.ns), operator), backend)


def _without_kernel(name: str) -> Callable:
    """The fallback where the C++ library registers no kernel for the tensors' device: raises NotImplementedError."""

    def no_kernel(*arguments):
        devices = sorted({str(argument.device) for argument in arguments if isinstance(argument, Tensor)})
        raise NotImplementedError(f"{name} has no compiled kernel for tensors on {' and '.join(devices)}")

    return no_kernel


def _fake_gradients(*arguments):
    *tensors, needs = arguments
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(tensors[-len(needs) :], needs) if need]


def _keep_all(operator: Operator) -> Callable:
    """The operator's setup_context; it also keeps the non-tensor arguments, which come last in a schema."""

    def setup_context(ctx, inputs, output):
        operator.setup_context(ctx, inputs, output)
        ctx.constants = [argument for argument in inputs if not (argument is None or isinstance(argument, Tensor))]

    return setup_context


def _derivative(operator: Operator, backend: str) -> Callable:
    """Autograd's rule, with autocast off: the backend's own backward operator where it has one that supports the arguments."""

    def run(ctx, *gradients: Tensor):
        with torch.autocast(gradients[0].device.type, enabled=False):
            own, needs = operator.backwards.get(backend), ctx.needs_input_grad
            if own is not None and not torch.is_grad_enabled():  # enabled under create_graph=True: the gradients will be differentiated
                arguments = (*gradients, *ctx.saved_tensors, *ctx.constants, list(needs))
                if own.unsupported(*arguments) is None:
                    found = iter(own.overload(*arguments))
                    return tuple(next(found) if need else None for need in needs)
            return operator.backward(ctx, *gradients)

    return run


def _autocast_rule(overload: OpOverload, names: tuple[str, ...], device_type: str) -> Callable:
    """Casts the named arguments, then runs the operator with autocast off: inside, dtypes are its own."""
    positions = frozenset(i for i, argument in enumerate(overload._schema.arguments) if argument.name in names)

    def rule(*arguments):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            argument.to(dtype) if i in positions and argument is not None and argument.dtype != torch.float64 else argument
            for i, argument in enumerate(arguments)
        ]
        with torch.autocast(device_type, enabled=False):
            return overload(*cast)

    return rule


def _vmap_unsupported(name: str) -> Callable:
    def no_batching_rule(info, in_dims, *arguments):
        raise NotImplementedError(
            f"{name}: torch.vmap is not supported; the operator already batches over B rows, each with its own concepts"
        )

    return no_batching_rule
