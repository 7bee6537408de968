"""What the compiled kernels do not take, for each operator a function of its name: given the schema's arguments, the reason or None.

These are the rules of csrc/<operator>.cu, from shapes, dtypes and devices alone. The public functions have checked the rest. Sizes
that only exceed 2^30 are left to the C function, which refuses them.
"""

import torch
from torch import Tensor

from . import library

HALF = (torch.float16, torch.bfloat16)
NARROW = (*HALF, torch.float32)
WIDTHS = (32, 40, 64, 80, 96, 128, 160)
KEYS = 256
PLACES = 128


@torch.compiler.assume_constant_result
def device(index: int) -> str | None:
    return library.why_not_on(index)


@torch.compiler.assume_constant_result
def shared_memory(index: int) -> int:
    return library.shared_memory(index)


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


def concept_gates(encodings, targets, metric_targets, index, bias, temperature) -> str | None:
    if index.shape[1] > PLACES:
        return f"it takes J up to {PLACES}; got {index.shape[1]}"
    return dtypes(NARROW, encodings=encodings) or dtypes(
        (torch.float32,), targets=targets, metric_targets=metric_targets, bias=bias, temperature=temperature
    )


def edited_attention(query, key, value, gates, components, index, key_outputs, key_targets, value_outputs, value_targets, scale):
    d, T = query.shape[3], key.shape[1]
    return (
        dtypes(HALF, query=query, key=key, value=value)
        or attention_tiles(d, T, query.device.index)
        or dtypes((torch.float32,), gates=gates, components=components)
        or dtypes(NARROW, key_outputs=key_outputs, key_targets=key_targets, value_outputs=value_outputs, value_targets=value_targets)
    )


def attention_tiles(d: int, T: int, device: int) -> str | None:
    """Kernels are compiled for some head widths, and K and V of one head have to fit into shared memory beside a tile of queries."""
    if d not in WIDTHS:
        return f"it takes d of {', '.join(map(str, WIDTHS))}; got {d}"
    if T > KEYS:
        return f"it takes T up to {KEYS}; got {T}"
    needed, limit = attention_bytes(d, T), shared_memory(device)
    if needed > limit:
        return f"K and V of one head, T = {T} and d = {d}, need {needed} bytes of shared memory; a block has {limit} on this device"
    return None


def attention_bytes(d: int, T: int) -> int:
    """Of the smallest launch: K and V with T padded to 80 or to the next 16 beyond, and 16 rows of the query."""
    row = 2 * 8 * (d // 8 | 1)
    return row * (2 * max(80, -(-T // 16) * 16) + 16)
