"""softmax(scale · q K̃ᵀ) Ṽ with Triton, K̃ and Ṽ being K and V or their edits, of the row that a slot names, within regions.

A program has one row and head. It loads all T keys and values once, edits them as they are loaded, and then loops over
tiles of queries: softmax in one pass, without a running maximum. waves.py chooses the number of tiles per program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_errors import words
from ..reference.edit import unpacked
from . import device, shared_memory
from .attention_tiles import (
    alignment,
    along,
    at_head,
    base_2,
    load_tile,
    padded,
    precision,
    scores,
    sizes,
    store_tile,
    unsupported_sizes,
    within_regions,
)
from .edited_tiles import SMALL, edit_arguments, load_edited
from .tuning import launch
from .waves import share


def unsupported(query: Tensor, key: Tensor, *value_edit_and_scale) -> str | None:
    T, d = key.shape[1], query.shape[3]
    return (
        device.unsupported(query, key, *value_edit_and_scale)
        or unsupported_sizes(T, d)
        or shared_memory.unsupported(tiles(T, d, query.dtype), held(T, d, query.dtype), query.device)
    )


def edited_attention(query: Tensor, key: Tensor, value: Tensor, *rest) -> Tensor:
    edit, slots, query_regions, key_regions, scale = unpacked(rest)
    (B, N, H, d), T = query.shape, key.shape[1]
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    errors = words(query.device)
    if len(key) == 0:  # no rows of K and V: every slot is out of range
        errors[0] = 1
        return result.zero_()
    edit, edit_strides, J, S, places = edit_arguments(edit)

    where = ((slots, 1), (query_regions, 2), (key_regions, 2))
    where_strides = [n for x, dimensions in where for n in ((0,) * dimensions if x is None else x.stride())]

    configurations, of_program = tiles(T, d, query.dtype), held(T, d, query.dtype)

    def run(tiles):
        programs, each = share(N, B * H, tiles, of_program, query.device)
        _attend[(programs * B * H,)](
            query, key, value, result, *edit, slots, query_regions, key_regions, errors,
            *query.stride(), *key.stride(), *value.stride(), *edit_strides, *where_strides,
            float(scale), N, T, H, J, S, len(key), programs, each,
            d=d, PLACES=places, ALIGNED=alignment(*(x.stride(2) for x in (query, key, value))), **sizes(T, d),
            POSITIVE=scale > 0, PRECISION=precision(query), **tiles,
        )  # fmt: skip

    # the edit is not part of the key: a row without a concept has the bits of plain attention, so both must use the same tiles
    fitting = shared_memory.fitting(configurations, of_program, query.device)
    launch("edited_attention", (B, N, T, H, d, query.dtype), query.device, fitting, run)
    return result


def tiles(T: int, d: int, dtype: torch.dtype) -> tuple[dict[str, int], ...]:
    """Queries per tile, limited by the registers for scores [BLOCK_N, T] and results [BLOCK_N, d]."""
    if dtype == torch.float32:
        return ({"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}, {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1})
    if max(T, d) > 128:
        return tuple({"BLOCK_N": n, "num_warps": warps, "num_stages": 1} for n, warps in ((32, 8), (64, 8), (32, 4)))
    return (
        {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        {"BLOCK_N": 128, "num_warps": 4, "num_stages": 2},  # 32 rows a warp: keys and values are read from shared memory half as often
        {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    )


def held(T: int, d: int, dtype: torch.dtype) -> shared_memory.Held:
    """All keys and values of a head, a tile of queries, and P."""
    T, d = padded(T, d)
    return lambda tiles: dtype.itemsize * (2 * T * d + tiles["BLOCK_N"] * (T + d))


@triton.jit(
    do_not_specialize=["N", "T", "H", "J", "S", "P", "programs", "each"],
    do_not_specialize_on_alignment=[*SMALL, "slots", "query_regions", "key_regions"],
)
def _attend(
    query, key, value, result, gates, components, index, key_outputs, key_targets, value_outputs, value_targets,
    slots, query_regions, key_regions, errors,
    query_b, query_n, query_h, query_d, key_b, key_t, key_h, key_d, value_b, value_t, value_h, value_d,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    key_outputs_s, key_outputs_c, key_targets_s, key_targets_c,
    value_outputs_s, value_outputs_c, value_targets_s, value_targets_c,
    slots_b, query_regions_b, query_regions_n, key_regions_b, key_regions_t,
    scale, N, T, H, J, S, P, programs, each,
    d: tl.constexpr, PLACES: tl.constexpr, ALIGNED: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    POSITIVE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // programs
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    row, there = b, True
    if slots is not None:
        slot = tl.load(slots + b * slots_b).to(tl.int64)
        there = (slot >= 0) & (slot < P)
        tl.store(errors, 1, mask=(slot < 0) | (slot >= P))
        row = tl.where(there, slot, 0)
    k00, k01, k10, k11 = load_edited(
        key + row * key_b + at_head(h, key_h, ALIGNED), gates, components, index, key_outputs, key_targets,
        row, h, 0, T, J, S, errors,
        key_t, key_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        key_outputs_s, key_outputs_c, key_targets_s, key_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    v00, v01, v10, v11 = load_edited(
        value + row * value_b + at_head(h, value_h, ALIGNED), gates, components, index, value_outputs, value_targets,
        row, h, 0, T, J, S, errors,
        value_t, value_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        value_outputs_s, value_outputs_c, value_targets_s, value_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    if query_regions is not None:
        query_regions += b * query_regions_b
        key_regions += b * key_regions_b
    attend_tiles(
        query + b * query_b + at_head(h, query_h, ALIGNED), result + (b * N * H + h) * d, k00, k01, k10, k11, v00, v01, v10, v11,
        query_n, query_d, scale, N, T, H, (tl.program_id(0) % programs) * each, each,
        slots, there, query_regions, key_regions, query_regions_n, key_regions_t, d, T0, T1, D0, D1, POSITIVE, PRECISION, BLOCK_N,
    )  # fmt: skip


@triton.jit
def attend_tiles(
    query, result, k00, k01, k10, k11, v00, v01, v10, v11, query_n, query_d, scale, N, T, H, first, each,
    slots, there, query_regions, key_regions, query_regions_n, key_regions_t,
    d: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    POSITIVE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`each` tiles of queries from tile `first` on; query and result point to the head's columns of the batch row, regions to the
    row. Zeros if there are slots and the row's is not `there`."""
    c0 = tl.arange(0, D0)
    factor = base_2(scale, POSITIVE)
    if query_regions is not None:
        t0, t1 = tl.arange(0, T0), T0 + tl.arange(0, T1 if T1 > 0 else 16)
        bits0 = tl.load(key_regions + t0 * key_regions_t, mask=t0 < T, other=0)
        bits1 = tl.load(key_regions + t1 * key_regions_t, mask=t1 < T, other=0)
    for tile in range(first, min(first + each, tl.cdiv(N, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q0 = load_tile(query, n, c0, query_n, query_d, N, d)
        q1 = q0
        if D1 > 0:
            q1 = load_tile(query, n, D0 + tl.arange(0, D1), query_n, query_d, N, d)
        s0, s1, largest = scores(q0, q1, k00, k01, k10, k11, scale, T, T0, T1, D1, POSITIVE, PRECISION)
        if query_regions is not None:
            bits = tl.load(query_regions + n * query_regions_n, mask=n < N, other=0)
            s0 = within_regions(s0, bits, bits0)
            largest = tl.max(s0, 1)
            if T1 > 0:
                s1 = within_regions(s1, bits, bits1)
                largest = tl.maximum(largest, tl.max(s1, 1))
            largest = tl.where(largest == float("-inf"), 0.0, largest)  # fully masked: P is 0
        p0 = tl.exp2(s0 * factor - (largest * factor)[:, None])
        p1 = p0
        total = tl.sum(p0, 1)
        if T1 > 0:
            p1 = tl.exp2(s1 * factor - (largest * factor)[:, None])
            total += tl.sum(p1, 1)
        share = 1.0 / (total if query_regions is None else tl.where(total > 0, total, 1.0))
        o0 = along(p0, p1, v00, v10, T1, PRECISION) * share[:, None]
        if slots is not None:
            o0 = tl.where(there, o0, 0.0)
        store_tile(result, o0, n, c0, H * d, N, d)
        if D1 > 0:
            o1 = along(p0, p1, v01, v11, T1, PRECISION) * share[:, None]
            if slots is not None:
                o1 = tl.where(there, o1, 0.0)
            store_tile(result, o1, n, D0 + tl.arange(0, D1), H * d, N, d)
