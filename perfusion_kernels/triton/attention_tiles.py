"""Loads, stores and products of tiles that are split in two along each dimension, shared by the attention kernels.

Triton requires tile dimensions to be powers of two. 77 keys or 40 columns are therefore split into two pieces, 64 + 16 or
32 + 16, instead of being padded to 128 or 64. If one piece suffices, the second has size 0; functions that take both are
then passed the first twice and ignore the second.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import INTERPRETED, rounded

LONGEST = 256  # of T and of d: what one program holds

LOG2_E = tl.constexpr(1.4426950408889634)


def pieces(size: int) -> tuple[int, int]:
    """Two powers of two of at least 16, or one and 0, that cover `size` with the least padding."""
    whole = max(16, triton.next_power_of_2(size))
    half = whole // 2
    if size <= 32 or size == whole:
        return whole, 0
    rest = max(16, triton.next_power_of_2(size - half))
    return (whole, 0) if rest == half else (half, rest)


def unsupported_sizes(T: int, d: int) -> str | None:
    """Why T and d are unsupported, or None."""
    if T > LONGEST or d > LONGEST:
        return f"it holds all keys and values of a head, up to {LONGEST} of up to {LONGEST} columns; got T = {T}, d = {d}"
    return None


def precision(query: Tensor) -> str:
    """The precision of float32 products: IEEE, or TF32 on NVIDIA's GPUs if torch.backends.cuda.matmul.allow_tf32 is set."""
    has_tf32 = query.is_cuda and torch.version.hip is None
    return "tf32" if has_tf32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def padded(T: int, d: int) -> tuple[int, int]:
    """T and d padded to the sum of their pieces."""
    return sum(pieces(T)), sum(pieces(d))


def sizes(T: int, d: int) -> dict[str, int]:
    """The constants T0, T1, D0, D1 of a kernel."""
    return dict(zip(("T0", "T1", "D0", "D1"), (*pieces(T), *pieces(d))))


def alignment(*strides: int) -> int:
    """The constant ALIGNED of a kernel: the largest of 8, 4, 2, 1 that divides the strides of heads; 8 elements of 2 bytes are 16."""
    return math.gcd(8, *strides)


@triton.jit
def at_head(h, stride, ALIGNED: tl.constexpr):
    """h · stride, such that the compiler knows the divisor ALIGNED: Triton specialises integers on multiples of 16, and 40 is none."""
    return h * (stride // ALIGNED) * ALIGNED


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, row_count, column_count):
    """pointer[rows, columns]; 0 beyond the counts, where nothing is read."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def store_tile(pointer, tile, rows, columns, row_stride, row_count, column_count):
    """pointer[rows, columns] = tile inside the counts; columns are neighbours."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(pointer + offsets, rounded(tile, pointer.dtype.element_ty), mask=inside)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x y in float32."""
    if INTERPRETED:  # which multiplies bfloat16 bit patterns as integers
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def add_product(sum, x, y, PRECISION: tl.constexpr):
    """sum + x y in float32."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, sum, input_precision=PRECISION)


@triton.jit
def across(x0, x1, y0, y1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """x yᵀ, summed over both pieces of the columns."""
    sum = product(x0, tl.trans(y0), PRECISION)
    if D1 > 0:
        sum = add_product(sum, x1, tl.trans(y1), PRECISION)
    return sum


@triton.jit
def along(x0, x1, y0, y1, T1: tl.constexpr, PRECISION: tl.constexpr):
    """x y, summed over both pieces of the positions; x is rounded to y's dtype."""
    sum = product(rounded(x0, y0.dtype), y0, PRECISION)
    if T1 > 0:
        sum = add_product(sum, rounded(x1, y1.dtype), y1, PRECISION)
    return sum


@triton.jit
def base_2(scale, POSITIVE: tl.constexpr):
    """The factor that scores() has left out: exp(scale x) is exp2(scale log₂e x)."""
    factor = 1.0
    if POSITIVE:
        factor = scale * LOG2_E
    return factor


@triton.jit
def scores(q0, q1, k00, k01, k10, k11, scale, T, T0: tl.constexpr, T1: tl.constexpr, D1: tl.constexpr,
           POSITIVE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q K̃ᵀ for both pieces of the positions, -inf beyond T, and each query's largest.

    A positive scale does not change which score is the largest. So it is left to the multiply-add that subtracts the maximum (base_2);
    any other scale is applied here. Only the last piece of the positions is masked.
    """
    s0 = across(q0, q1, k00, k01, D1, PRECISION)
    if not POSITIVE:
        s0 *= scale * LOG2_E
    s1 = s0
    if T1 > 0:
        s1 = across(q0, q1, k10, k11, D1, PRECISION)
        if not POSITIVE:
            s1 *= scale * LOG2_E
        s1 = tl.where((T0 + tl.arange(0, T1))[None, :] < T, s1, float("-inf"))
        largest = tl.maximum(tl.max(s0, 1), tl.max(s1, 1))
    else:
        s0 = tl.where(tl.arange(0, T0)[None, :] < T, s0, float("-inf"))
        s1 = s0
        largest = tl.max(s0, 1)
    return s0, s1, largest


@triton.jit
def within_regions(scores, query_bits, key_bits):
    """-inf where a query and a position that has bits share none."""
    keys = key_bits[None, :]
    return tl.where((keys == 0) | ((query_bits[:, None] & keys) != 0), scores, float("-inf"))
