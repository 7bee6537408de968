"""The devices that Triton's kernels support, and the interpreter, which executes kernels on the CPU in tests.

With TRITON_INTERPRET=1, set before Triton is imported, kernels are executed by numpy on the host. That is for tests:
a call on tensors in host memory runs there only if it requests the backend by name.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_interpreted = bool(triton.knobs.runtime.interpret)  # what torch.compile can read


ON_HOST = "Triton's kernels need tensors on a GPU; got cpu"


def unsupported(*arguments) -> str | None:
    """Why no kernel takes these arguments, or None: a device that Triton does not support, or float64."""
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
    """Why supported arguments run here only if this backend is requested by name, or None."""
    return "Triton's interpreter is for tests" if arguments[0].is_cpu else None


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 rounded to nearest even in `dtype`. The interpreter truncates to bfloat16 (3.9 too), so it gets integer arithmetic."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def slots_at(pointers, mask, S, errors):
    """Loads slots as int64; -1 where masked off. A slot out of range becomes -1 and sets the flag errors[1]."""
    slots = tl.load(pointers, mask=mask, other=-1)
    wrong = (slots < -1) | (slots >= S)
    tl.store(errors + 1 + tl.zeros_like(slots), 1, mask=wrong)
    return tl.where(wrong, -1, slots).to(tl.int64)
