"""What the compiled kernels support: for each operator a predicate of its name, from the schema's arguments to None or a reason.

Dtypes and devices are checked here. Size limits come from the library (csrc/limits.cu), because only its launch plans compute shared
memory. The public functions have checked the rest. Sizes above 2^30 are left to the C function.
"""

import torch
from torch import Tensor

from ..constant_result import constant_result
from ..shape_checks import autocasts
from . import library

HALF = (torch.float16, torch.bfloat16)
NARROW = (*HALF, torch.float32)


@constant_result
def device(index: int) -> str | None:
    return library.why_not_on(index)


@constant_result
def max_places() -> int:
    return library.ask("concept_gates_most")


@constant_result
def compiled_widths(operator: str) -> tuple[int, ...]:
    """The head widths with a compiled kernel: those that support some T given unlimited shared memory."""
    more = (0,) * (operator == "edited_attention")  # no regions
    return tuple(d for d in range(8, 257, 8) if library.ask(f"{operator}_longest", 1 << 30, d, 0, *more))


@constant_result
def longest_context(operator: str, index: int, *what: int) -> tuple[int, int]:
    """The largest T on this device, and the shared memory per block in bytes that limits it."""
    limit = library.shared_memory(index)
    return library.ask(f"{operator}_longest", limit, *what), limit


def anywhere(*arguments) -> str | None:
    """Requirements of all operators: tensors on a CUDA device that the library runs on."""
    for argument in arguments:
        if isinstance(argument, Tensor) and not argument.is_cuda:
            return f"the compiled kernels need tensors on a CUDA device; got {argument.device}"
    return device(arguments[0].device.index)


def dtypes(supported: tuple[torch.dtype, ...], **tensors: Tensor | None) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in supported:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in supported)
            return f"it takes {name} in {names}; got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def halves(**tensors: Tensor | None) -> str | None:
    """float16 or bfloat16, or float32 that autocast will cast to one of them."""
    reason = dtypes(HALF, **tensors)
    if reason is None:  # the common case, before autocast's state is read
        return None
    first = next(iter(tensors.values()))
    cast = autocasts(first) and torch.get_autocast_dtype(first.device.type) in HALF
    return dtypes((*HALF, torch.float32), **tensors) if cast else reason


def concept_gates(encodings, targets, metric_targets, index, bias, temperature, places, floor) -> str | None:
    if index.shape[1] > max_places():
        return f"it takes J up to {max_places()}; got {index.shape[1]}"
    return dtypes(NARROW, encodings=encodings) or dtypes(
        (torch.float32,), targets=targets, metric_targets=metric_targets, bias=bias, temperature=temperature, floor=floor
    )


def edited_projection(encodings, weight, gates, components, index, outputs, projected_targets) -> str | None:
    return (
        halves(encodings=encodings, weight=weight)
        or at_least_one(D=encodings.shape[2])
        or dtypes((torch.float32,), gates=gates, components=components)
        or dtypes(NARROW, outputs=outputs, projected_targets=projected_targets)
    )


def edited_projection_backward(gradient, *arguments_and_needs) -> str | None:
    *arguments, needs = arguments_and_needs
    if needs[1]:
        return "it has no derivative of weight"
    return halves(gradient=gradient) or edited_projection(*arguments)


fused_edited_projection, fused_edited_projection_backward = edited_projection, edited_projection_backward


def edited_attention(query, key, value, *rest) -> str | None:
    *edit, slots, query_regions, key_regions, scale = rest
    return (
        halves(query=query, key=key, value=value)
        or edit_dtypes(*edit)
        or context("edited_attention", query, key.shape[1], edit, query_regions is not None)
    )


def fused_edited_attention(query, encodings, key_weight, value_weight, *rest) -> str | None:
    *edit, scale = rest
    return (
        halves(query=query, encodings=encodings, key_weight=key_weight, value_weight=value_weight)
        or edit_dtypes(*edit)
        or at_least_one(D=encodings.shape[2])
        or context("fused_edited_attention", query, encodings.shape[1], edit)
    )


def edit_dtypes(gates, components, index, key_outputs, key_targets, value_outputs, value_targets) -> str | None:
    return dtypes((torch.float32,), gates=gates, components=components) or dtypes(
        NARROW, key_outputs=key_outputs, key_targets=key_targets, value_outputs=value_outputs, value_targets=value_targets
    )


def at_least_one(**sizes: int) -> str | None:
    return next((f"it takes {letter} from 1 on; got {size}" for letter, size in sizes.items() if size < 1), None)


def context(operator: str, heads: Tensor, T: int, edit: tuple[Tensor | None, ...], *more: bool) -> str | None:
    """Whether K and V of one head, of T tokens and of the width of `heads` [..., d], fit into the device's shared memory."""
    widths = compiled_widths(operator)
    d = next((width for width in widths if width == heads.shape[-1]), None)  # a constant, where the size is a symbol
    if d is None:
        return f"it takes d of {', '.join(map(str, widths))}; got {heads.shape[-1]}"
    _, _, index, key_outputs, _, value_outputs, _ = edit
    sides = 0 if index is None or index.shape[1] == 0 else sum(outputs is not None for outputs in (key_outputs, value_outputs))
    longest, limit = longest_context(operator, heads.device.index, d, sides, *more)
    return f"it takes T up to {longest} at d = {d} with {limit} bytes of shared memory a block; got {T}" if T > longest else None
