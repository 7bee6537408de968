"""What the compiled kernels do not take, for each operator a function of its name: given the schema's arguments, the reason or None.

These are the rules of csrc/<operator>.cu, from shapes, dtypes and devices alone. The public functions have checked the rest. Sizes
that exceed 2^30 are left to the C function, which refuses them too. tests/cuda_host/test_refusals.py holds both against each other.
"""

import torch
from torch import Tensor

from ..shape_checks import autocasts
from . import library

HALF = (torch.float16, torch.bfloat16)
NARROW = (*HALF, torch.float32)
WIDTHS = (32, 40, 64, 80, 96, 128, 160)
KEYS = 256
PLACES = 32768


@torch.compiler.assume_constant_result
def device(index: int) -> str | None:
    return library.why_not_on(index)


@torch.compiler.assume_constant_result
def limits(index: int) -> tuple[int, int]:
    return library.limits(index)


def anywhere(*arguments) -> str | None:
    """What holds for all operators."""
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
    """float16 or bfloat16, or what autocast makes that of."""
    refused = dtypes(HALF, **tensors)
    if refused is None:  # which spares ordinary calls the question
        return None
    first = next(iter(tensors.values()))
    cast = autocasts(first) and torch.get_autocast_dtype(first.device.type) in HALF
    return dtypes((*HALF, torch.float32), **tensors) if cast else refused


def concept_gates(encodings, targets, metric_targets, index, bias, temperature, places, floor) -> str | None:
    if places is not None:
        return "places are not supported yet"
    if index.shape[1] > PLACES:
        return f"it takes J up to {PLACES}; got {index.shape[1]}"
    return dtypes(NARROW, encodings=encodings) or dtypes(
        (torch.float32,), targets=targets, metric_targets=metric_targets, bias=bias, temperature=temperature
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


def edited_attention(query, key, value, *rest) -> str | None:
    *edit, slots, query_regions, key_regions, scale = rest
    if slots is not None or query_regions is not None:
        return "slots and regions are not supported yet"
    edit_and_scale = (*edit, scale)
    return (
        halves(query=query, key=key, value=value)
        or edit_dtypes(*edit_and_scale[:-1])
        or head(query.shape[3], key.shape[1])
        or fits(attention_bytes(query.shape[3], key.shape[1], sides(*edit_and_scale)), query, key.shape[1])
    )


def fused_edited_attention(query, encodings, key_weight, value_weight, *edit_and_scale) -> str | None:
    d, T = query.shape[3], encodings.shape[1]
    return (
        halves(query=query, encodings=encodings, key_weight=key_weight, value_weight=value_weight)
        or edit_dtypes(*edit_and_scale[:-1])
        or at_least_one(D=encodings.shape[2])
        or head(d, T)
        or fits(fused_bytes(d, T, sides(*edit_and_scale)), query, T)
    )


def edit_dtypes(gates, components, index, key_outputs, key_targets, value_outputs, value_targets) -> str | None:
    return dtypes((torch.float32,), gates=gates, components=components) or dtypes(
        NARROW, key_outputs=key_outputs, key_targets=key_targets, value_outputs=value_outputs, value_targets=value_targets
    )


def at_least_one(**sizes: int) -> str | None:
    return next((f"it takes {letter} from 1 on; got {size}" for letter, size in sizes.items() if size < 1), None)


def context(T: int) -> str | None:
    return f"it takes T up to {KEYS}; got {T}" if T > KEYS else None


def head(d: int, T: int) -> str | None:
    return context(T) if d in WIDTHS else f"it takes d of {', '.join(map(str, WIDTHS))}; got {d}"


# Shared memory: K and V of one head, T padded to 80 or to the next 16 beyond, stay there; beside them comes what the launch needs
# at least.


def fits(needed: int, heads: Tensor, T: int) -> str | None:
    _, limit = limits(heads.device.index)
    if needed > limit:
        return f"K and V of one head, T = {T} and d = {heads.shape[3]}, need {needed} bytes of shared memory; a block has {limit} here"
    return None


def attention_bytes(d: int, T: int, sides: int) -> int:
    return resident(d, T) + 16 * row(d) + edit_bytes(d, T, sides)  # the queries of one warp


def fused_bytes(d: int, T: int, sides: int) -> int:
    projected = 80 + (2 if d <= 80 else 1) * columns(d)
    queries = 4 * 16 * row(d) + edit_bytes(d, T, sides)
    return resident(d, T) + max(steps(of_sum(d), projected), queries)  # the projection's steps, then queries of four warps


def edit_bytes(d: int, T: int, sides: int) -> int:
    """One concept at a time: two rows of float32 for each side, gates and components."""
    return 4 * (8 + 2 * (sides * d + keys(T))) if sides else 0


def sides(gates, components, index, key_outputs, key_targets, value_outputs, value_targets, scale) -> int:
    """How many of K and V are edited."""
    return 0 if index is None or index.shape[1] == 0 else sum(outputs is not None for outputs in (key_outputs, value_outputs))


def resident(d: int, T: int) -> int:
    return 2 * keys(T) * row(d)


def keys(T: int) -> int:
    return max(80, -(-T // 16) * 16)


def row(columns: int) -> int:
    """Bytes between rows of 16-bit elements: an odd number of 16-byte pieces."""
    return 16 * (columns // 8 | 1)


def columns(d: int) -> int:
    return -(-d // 16) * 16


def of_sum(d: int) -> int:
    """Steps of a projection that are in shared memory at once."""
    return 3 if d <= 128 else 2


def steps(stages: int, rows: int) -> int:
    """A projection's operands, 32 columns of each at a time."""
    return stages * rows * row(32)
