"""Where Triton's kernels run, and what stands in for a GPU in tests.

With TRITON_INTERPRET=1, set before Triton is imported, kernels are executed by numpy on the host. That is for
tests: such calls run on tensors in host memory when asked for by name, and are never chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_interpreted = bool(triton.knobs.runtime.interpret)  # what torch.compile can read


ON_HOST = "Triton's kernels need tensors on a GPU; got cpu"


def unsupported(*arguments) -> str | None:
    """Why no kernel takes these arguments, or None: a device that Triton does not serve, or float64."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.dtype == torch.float64:
                return "it computes in float32, which float64 would not gain from"
            if not (argument.is_cuda or argument.is_xpu):
                if not argument.is_cpu:
                    return f"Triton's kernels need tensors on a GPU; got {argument.device}"
                if not _interpreted:
                    return ON_HOST
    return None


def not_preferred(*arguments) -> str | None:
    """Why these arguments, which could be taken, are left to others unless this backend is asked for by name."""
    return "Triton's interpreter is for tests" if arguments[0].is_cpu else None


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 in `dtype`, to the nearest; the interpreter alone would cut bfloat16 off, as triton 3.9 does."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def slots_at(pointers, mask, S, errors):
    """The slots that stand there as int64, -1 where the mask is not; what is out of range is -1 too, and noted in errors[1]."""
    slots = tl.load(pointers, mask=mask, other=-1)
    wrong = (slots < -1) | (slots >= S)
    tl.store(errors + 1 + tl.zeros_like(slots), 1, mask=wrong)
    return tl.where(wrong, -1, slots).to(tl.int64)
