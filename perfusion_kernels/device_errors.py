"""Errors that only a device sees: a slot or an index out of range, which kernels read as absent and note.

No operator waits for its device, so no call can raise them. A kernel that meets one stores a 1 in a word of host memory
that the device can write; `check_device` looks at the words when the caller has reason to wait anyway.
"""

import ctypes
from contextlib import nullcontext

import torch
from torch import Tensor

KINDS = (
    "slots: a row named a slot outside of key and value; it gave zeros",
    "index: a row named a concept outside of the bank; it was left out",
)
"""What each word says, in the order of perfusion_device_error of csrc/include/perfusion_kernels.h."""


_words: dict[torch.device, Tensor] = {}


def words(device: torch.device) -> Tensor:
    """int32 [2] that Triton's kernels on `device` write and the host can read. One for each device, as long as the process lives."""
    if device not in _words:
        pinned = device.type == "cuda"
        flags = torch.zeros(len(KINDS), dtype=torch.int32, device="cpu" if pinned else device, pin_memory=pinned)
        _words.setdefault(device, flags)
    return _words[device]


def check_device(device: torch.device | str, *, synchronize: bool = True) -> None:
    """Raises RuntimeError if kernels on `device` met a slot or an index out of range since the last check, and forgets it.

    It reads host memory, and nothing at all where no kernel that can note an error has run.

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
    found = [mine or other for mine, other in zip(_of_triton(device), _of_library(device))]
    if any(found):
        kinds = "; ".join(kind for kind, met in zip(KINDS, found) if met)
        raise RuntimeError(f"kernels on {device} were given values out of range: {kinds}. Call with validate=True to find the call")


def _of_triton(device: torch.device) -> tuple[bool, ...]:
    """What Triton's kernels on the device have noted, and forgets it."""
    flags = _words.get(device)
    if flags is None:
        return (False,) * len(KINDS)
    found = tuple(map(bool, flags.tolist()))
    if any(found):
        flags.zero_()
    return found


def _of_library(device: torch.device) -> tuple[bool, ...]:
    """The same of the compiled kernels, if their library has been loaded and runs on such a device."""
    from .cuda import library

    flags = (ctypes.c_int32 * len(KINDS))()
    if library.loaded.cache_info().currsize and device.type == library.device_type():
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            library.loaded().perfusion_device_errors(flags)
    return tuple(map(bool, flags))
