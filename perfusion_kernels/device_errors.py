"""Errors that only a kernel can find: a slot or an index out of range, which it treats as absent and flags.

Operators do not synchronise, so no call can raise them. A kernel that finds one sets a flag in pinned host memory;
`check_device` reads the flags at a point where the caller synchronises anyway.
"""

import ctypes
from contextlib import nullcontext

import torch
from torch import Tensor

KINDS = (
    "slots: a row named a slot outside of key and value; it gave zeros",
    "index: a row named a concept outside of the bank; it was left out",
)
"""The meaning of each flag, in the order of perfusion_device_error of csrc/include/perfusion_kernels.h."""


_words: dict[torch.device, Tensor] = {}


def words(device: torch.device) -> Tensor:
    """int32 [2]: the flags that Triton's kernels on `device` set, in pinned host memory. One for each device, never freed."""
    if device not in _words:
        pinned = device.type == "cuda"
        flags = torch.zeros(len(KINDS), dtype=torch.int32, device="cpu" if pinned else device, pin_memory=pinned)
        _words.setdefault(device, flags)
    return _words[device]


def check_device(device: torch.device | str, *, synchronize: bool = True) -> None:
    """Raises RuntimeError if kernels on `device` found a slot or an index out of range since the last check, and clears the flags.

    It reads host memory, or nothing if no kernel that can set a flag has run.

    Args:
        device: where operators have run.
        synchronize: whether to synchronise with the device first. Without it, errors of kernels still in flight are left to
            the next check.

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
    """Reads and clears the flags that Triton's kernels on the device have set."""
    flags = _words.get(device)
    if flags is None:
        return (False,) * len(KINDS)
    found = tuple(map(bool, flags.tolist()))
    if any(found):
        flags.zero_()
    return found


def _of_library(device: torch.device) -> tuple[bool, ...]:
    """The same for the compiled kernels, if their library has been loaded and runs on such a device."""
    from .cuda import library

    flags = (ctypes.c_int32 * len(KINDS))()
    if library.loaded.cache_info().currsize and device.type == library.device_type():
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            library.loaded().perfusion_device_errors(flags)
    return tuple(map(bool, flags))
