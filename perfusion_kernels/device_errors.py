"""Errors that only a device sees: a slot or an index out of range, which kernels read as absent and note.

No operator waits for its device, so no call can raise them. A kernel that meets one stores a 1 in a word of host memory
that the device can write; `check_device` looks at the words when the caller has reason to wait anyway.
"""

import ctypes
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

KINDS = (
    "slots: a row named a slot outside of key and value; it gave zeros",
    "index: a row named a concept outside of the bank; it was left out",
)
"""What each word says, in the order of perfusion_device_error of csrc/include/perfusion_kernels.h."""


@cache
def words(device: torch.device) -> Tensor:
    """int32 [2] that Triton's kernels on `device` write and the host can read. One for each device, as long as the process lives."""
    pinned = device.type == "cuda"
    return torch.zeros(len(KINDS), dtype=torch.int32, device="cpu" if pinned else device, pin_memory=pinned)


def check_device(device: torch.device | str, *, synchronize: bool = True) -> None:
    """Raises RuntimeError if kernels on `device` met a slot or an index out of range since the last check, and forgets it.

    Args:
        device: where operators have run.
        synchronize: whether to wait for the device first. Without it, what kernels in flight will find is left to the next
            check, and nothing waits.

    Source: DESIGN.md, "Edited attention".
    """
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if synchronize:
            torch.cuda.synchronize(device)
    flags = words(device)
    found = [bool(flag) for flag in flags.tolist()]
    if any(found):
        flags.zero_()
    found = [mine or own for mine, own in zip(found, _of_library(device))]
    if any(found):
        kinds = "; ".join(kind for kind, met in zip(KINDS, found) if met)
        raise RuntimeError(f"kernels on {device} were given values out of range: {kinds}. Call with validate=True to find the call")


def _of_library(device: torch.device) -> tuple[bool, ...]:
    """The same from the compiled kernels, if their library has been loaded."""
    from .cuda import library

    if library.loaded.cache_info().currsize == 0 or device.type not in ("cuda", "cpu"):
        return (False,) * len(KINDS)
    flags = (ctypes.c_int32 * len(KINDS))()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # on a host: the library of the tests
        library.loaded().perfusion_device_errors(flags)
    return tuple(map(bool, flags))
