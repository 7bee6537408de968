"""Detects replaced tensors by identity and in-place modification through `_version`.

A tensor shares its version counter with its views. The counter does not see writes through `.data`, numpy, DLPack, a raw
pointer or a fused optimiser, nor those of another process.
"""

from collections.abc import Sequence
from weakref import ref

from torch import Tensor

Marks = tuple[tuple[ref, int], ...]


def marks(tensors: Sequence[Tensor]) -> Marks | None:
    """A weak reference and the version of each tensor. None if one is an inference tensor, which has no version counter."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((ref(tensor), tensor._version) for tensor in tensors)


def unchanged(tensors: Sequence[Tensor], marks: Marks) -> bool:
    """Whether these are the same tensor objects from which `marks` was made, at the same versions."""
    for tensor, (alive, version) in zip(tensors, marks):
        if alive() is not tensor or tensor._version != version:  # dead, and its id possibly reused; or modified in place
            return False
    return True
