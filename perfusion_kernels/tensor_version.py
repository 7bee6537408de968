"""Whether tensors are the very ones of before, and not written since.

Writes are those that torch's version counter sees, which a tensor shares with its views. It does not see what is
written through `.data`, numpy, DLPack, a pointer or a fused optimiser, nor what another process writes.
"""

from collections.abc import Sequence
from weakref import ref

from torch import Tensor

Marks = tuple[tuple[ref, int], ...]


def marks(tensors: Sequence[Tensor]) -> Marks | None:
    """What to recognise the tensors by, keeping none alive; None with an inference tensor, which counts no writes."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((ref(tensor), tensor._version) for tensor in tensors)


def unwritten(tensors: Sequence[Tensor], marks: Marks) -> bool:
    """Whether these are the tensors that `marks` was made of, each as it was then."""
    for tensor, (alive, version) in zip(tensors, marks):
        if alive() is not tensor or tensor._version != version:  # dead, and perhaps its id another's; or written
            return False
    return True
