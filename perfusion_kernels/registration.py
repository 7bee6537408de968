"""What makes a function a torch operator: schema, fake, autograd, autocast and vmap rule.

`torch.library.Library` is used rather than `torch.library.custom_op`: it costs half as much per call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

from .schemas import SCHEMAS

LIBRARY = torch.library.Library("perfusion_kernels", "DEF")

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


@dataclass(frozen=True)
class Operator:
    """The traits all backends of one operator share; the public function's file declares them.

    fake: shapes, dtypes and strides of the result, from arguments without data.
    setup_context, backward: as `torch.library.register_autograd` wants them, in plain torch.
    autocast: names of the arguments that autocast turns to its dtype. The others keep theirs.
    """

    name: str
    fake: Callable
    setup_context: Callable
    backward: Callable
    autocast: tuple[str, ...] = ()


def bind(operator: Operator, backend: str, implementation: Callable | None) -> OpOverload:
    """Defines `perfusion_kernels::<operator>.<backend>` and returns it.

    implementation: a function of the schema's arguments; None if a loaded C++ library brings the kernel.
    """
    name = f"{operator.name}.{backend}"
    qualified_name = f"{LIBRARY.ns}::{name}"
    LIBRARY.define(name + SCHEMAS[operator.name], tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(getattr(torch.ops, LIBRARY.ns), operator.name), backend)
    if implementation is not None:
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified_name, operator.fake, lib=LIBRARY)
    torch.library.register_autograd(
        qualified_name, _without_autocast(operator.backward), setup_context=operator.setup_context, lib=LIBRARY
    )
    torch.library.register_vmap(qualified_name, _refuse_vmap(operator.name), lib=LIBRARY)
    for device_type, key in AUTOCAST_KEYS.items():
        LIBRARY.impl(name, _autocast_rule(overload, operator.autocast, device_type), key)
    return overload


def _autocast_rule(overload: OpOverload, names: tuple[str, ...], device_type: str) -> Callable:
    """Casts the named arguments, then runs the operator with autocast off: inside, dtypes are its own."""
    positions = frozenset(i for i, argument in enumerate(overload._schema.arguments) if argument.name in names)

    def rule(*arguments):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            argument.to(dtype) if i in positions and argument.dtype != torch.float64 else argument
            for i, argument in enumerate(arguments)
        ]
        with torch.autocast(device_type, enabled=False):
            return overload(*cast)

    return rule


def _without_autocast(backward: Callable) -> Callable:
    def run(ctx, *gradients: Tensor):
        with torch.autocast(gradients[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return run


def _refuse_vmap(name: str) -> Callable:
    def refuse(info, in_dims, *arguments):
        raise NotImplementedError(
            f"{name}: torch.vmap is not supported; the operator already batches over B rows, each with its own concepts"
        )

    return refuse
