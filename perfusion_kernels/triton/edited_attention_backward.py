"""The derivatives of `edited_attention` with Triton (DESIGN.md, equations 13 and 14): P is recomputed, not stored.

Two kernels without atomics, so results are deterministic. The first is parallel over queries like the forward kernel: it writes dq,
and for each query the log-sum-exp and Σ_t dP P, which the second needs. A program of the second has one row, head and block of
positions, and accumulates dK̃ and dṼ over queries; where that gives too few programs, queries are split, and the partial sums are
added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_errors import words
from ..reference.edit import Edit, of_keys, of_values, unpacked
from . import device, shared_memory
from .attention_tiles import (
    LOG2_E,
    across,
    add_product,
    alignment,
    along,
    at_head,
    base_2,
    load_tile,
    padded,
    pieces,
    precision,
    scores,
    sizes,
    store_tile,
    unsupported_sizes,
)
from .device import rounded
from .edited_tiles import SMALL, edit_arguments, load_edited
from .rank_one import rank_one_backward
from .tuning import launch
from .waves import share


def unsupported_backward(gradient: Tensor, query: Tensor, key: Tensor, *value_edit_scale_and_needs) -> str | None:
    if any(each is not None for each in value_edit_scale_and_needs[-5:-2]):
        return "slots and regions are differentiated in plain torch"
    reason = device.unsupported(gradient, query, key, *value_edit_scale_and_needs)
    return reason or unsupported_gradients(query, key.shape[1], query.shape[3])


def unsupported_gradients(query: Tensor, T: int, d: int) -> str | None:
    """Why `attention_gradients` is unsupported for queries of this dtype and device, or None."""
    return (
        unsupported_sizes(T, d)
        or shared_memory.unsupported(tiles_by_query(T, d, query.dtype), held_by_query(T, d, query.dtype), query.device)
        or shared_memory.unsupported(tiles_by_key(T, d, query.dtype), held_by_key(T, d, query.dtype), query.device)
    )


def edited_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest) -> list[Tensor]:
    """The gradients that are needed, in order."""
    edit, *_, scale, needs = unpacked(rest)
    by_query, by_key, by_value = attention_gradients(gradient, query, key, value, edit, scale)
    found = [by_query, by_key.to(key.dtype), by_value.to(value.dtype), *edit_gradients(by_key, by_value, edit, needs[3:10])]
    return [x for x, need in zip(found, needs) if need]


def edit_gradients(by_key: Tensor, by_value: Tensor, edit: Edit, needs: list[bool]) -> list[Tensor | None]:
    """The gradients of the edit's seven arguments from dK̃ and dṼ [B, T, H, d]; needs: which of the seven are needed."""
    by_gates, by_components, by_tables = [], [], []
    for by_base, side, wanted in ((by_key, of_keys(edit), needs[3:5]), (by_value, of_values(edit), needs[5:7])):
        sums = (None,) * 5
        if side[3] is not None and (needs[0] or needs[1] or any(wanted)):
            of_side = (needs[0], needs[1], False, *wanted)
            sums = rank_one_backward(by_base.flatten(2), *side, of_side)
            by_gates.append(sums[0])
            by_components.append(sums[1])
        by_tables += sums[3:]
    return [sum(by_gates) if needs[0] else None, sum(by_components) if needs[1] else None, None, *by_tables]


def attention_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, edit: Edit, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq in the dtype of query, dK̃ and dṼ in float32, because the edit's gradients are computed from them before they are rounded."""
    (B, N, H, d), T = query.shape, key.shape[1]
    by_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if by_query.numel() == 0:
        empty = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        return by_query, empty, empty.clone()
    errors = words(query.device)
    tensors, edit_strides, J, S, places = edit_arguments(edit)
    strides = (*query.stride(), *key.stride(), *value.stride(), *gradient.stride(), *edit_strides)
    aligned = alignment(*(x.stride(2) for x in (query, key, value, gradient)))
    constants = {"d": d, "PLACES": places, "ALIGNED": aligned, "PRECISION": precision(query)}
    logarithms, sums = torch.empty((2, B, H, N), dtype=torch.float32, device=query.device)
    shapes = (B, N, T, H, d, query.dtype)

    def run_query(tiles):
        programs, each = share(N, B * H, tiles, held_by_query(T, d, query.dtype), query.device)
        _by_query[(programs * B * H,)](
            query, key, value, gradient, by_query, logarithms, sums, *tensors, errors, *strides,
            float(scale), N, T, H, J, S, programs, each, **constants, **sizes(T, d), POSITIVE=scale > 0, **tiles,
        )  # fmt: skip

    fitting = shared_memory.fitting(tiles_by_query(T, d, query.dtype), held_by_query(T, d, query.dtype), query.device)
    launch("edited_attention_by_query", shapes, query.device, fitting, run_query)

    by_key = by_value = None  # two buffers, because results of an operator must not share storage

    def run_key_and_value(tiles):
        nonlocal by_key, by_value
        blocks = triton.cdiv(T, tiles["BLOCK_T"])
        programs, each = share(N, B * H * blocks, tiles, held_by_key(T, d, query.dtype), query.device)
        by_key, by_value = (torch.empty((programs, B, T, H, d), dtype=torch.float32, device=query.device) for _ in "kv")
        D0, D1 = pieces(d)
        _by_key_and_value[(programs * blocks * B * H,)](
            query, key, value, gradient, by_key, by_value, logarithms, sums, *tensors, errors, *strides,
            float(scale), N, T, H, J, S, B, programs, blocks, each, **constants, D0=D0, D1=D1, **tiles,
        )  # fmt: skip

    fitting = shared_memory.fitting(tiles_by_key(T, d, query.dtype), held_by_key(T, d, query.dtype), query.device)
    launch("edited_attention_by_key", shapes, query.device, fitting, run_key_and_value)
    by_key, by_value = (parts[0] if len(parts) == 1 else parts.sum(0) for parts in (by_key, by_value))
    return by_query, by_key, by_value


def tiles_by_query(T: int, d: int, dtype: torch.dtype) -> tuple[dict[str, int], ...]:
    """Registers hold scores and their derivatives [BLOCK_N, T], and dq [BLOCK_N, d]."""
    if dtype == torch.float32:
        return ({"BLOCK_N": 16, "num_warps": 8, "num_stages": 1}, {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1})
    if d > 96:
        blocks = ((16, 8), (32, 8), (64, 8))  # 32 queries use all registers, and spill with Triton 3.9
    elif T > 128:
        blocks = ((64, 8), (32, 8))
    else:
        blocks = ((64, 4), (32, 4))
    return tuple({"BLOCK_N": n, "num_warps": warps, "num_stages": 1} for n, warps in blocks)


def tiles_by_key(T: int, d: int, dtype: torch.dtype) -> tuple[dict[str, int], ...]:
    """Registers hold dK̃ and dṼ [BLOCK_T, d]; small blocks waste little of 77 positions, and give more programs.

    Larger tiles spill, above all where the columns are in two pieces of different widths.
    """
    if dtype == torch.float32:
        return ({"BLOCK_T": 16, "BLOCK_N": 16, "num_warps": 8 if d > 32 else 4, "num_stages": 1},)
    if d > 96:
        blocks = ((16, 32, 4), (16, 64, 8))
    elif d > 64:
        blocks = ((32, 32, 4), (16, 32, 4))
    else:
        blocks = ((32, 32, 4), (32, 64, 4), (16, 64, 4))
    return tuple({"BLOCK_T": t, "BLOCK_N": n, "num_warps": warps, "num_stages": 1} for t, n, warps in blocks)


def held_by_query(T: int, d: int, dtype: torch.dtype) -> shared_memory.Held:
    """All keys and values of a head, a tile of queries and their gradient, and P. In half precision P stays in registers, and keys
    are held twice, once transposed."""
    T, d = padded(T, d)
    if dtype == torch.float32:
        return lambda tiles: 4 * (2 * T * d + tiles["BLOCK_N"] * (2 * d + T))
    return lambda tiles: dtype.itemsize * (3 * T * d + tiles["BLOCK_N"] * 2 * d)


def held_by_key(T: int, d: int, dtype: torch.dtype) -> shared_memory.Held:
    """A block of keys and values, a tile of queries and their gradient, P and dS."""
    _, d = padded(T, d)
    return lambda tiles: dtype.itemsize * 2 * (
        (tiles["BLOCK_T"] + tiles["BLOCK_N"]) * d + tiles["BLOCK_T"] * tiles["BLOCK_N"]
    )


@triton.jit(do_not_specialize=["N", "T", "H", "J", "S", "programs", "each"], do_not_specialize_on_alignment=SMALL)
def _by_query(
    query, key, value, gradient, by_query, logarithms, sums,
    gates, components, index, key_outputs, key_targets, value_outputs, value_targets, errors,
    query_b, query_n, query_h, query_d, key_b, key_t, key_h, key_d, value_b, value_t, value_h, value_d,
    gradient_b, gradient_n, gradient_h, gradient_d,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    key_outputs_s, key_outputs_c, key_targets_s, key_targets_c,
    value_outputs_s, value_outputs_c, value_targets_s, value_targets_c,
    scale, N, T, H, J, S, programs, each,
    d: tl.constexpr, PLACES: tl.constexpr, ALIGNED: tl.constexpr, POSITIVE: tl.constexpr, PRECISION: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """by_query = dS K̃ with dS = scale · P (dP - Σ_t dP P) and dP = dO Ṽᵀ; logarithms of base 2, sums = Σ_t dP P."""
    pair = tl.program_id(0) // programs
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    k00, k01, k10, k11 = load_edited(
        key + b * key_b + at_head(h, key_h, ALIGNED), gates, components, index, key_outputs, key_targets,
        b, h, 0, T, J, S, errors,
        key_t, key_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        key_outputs_s, key_outputs_c, key_targets_s, key_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    v00, v01, v10, v11 = load_edited(
        value + b * value_b + at_head(h, value_h, ALIGNED), gates, components, index, value_outputs, value_targets,
        b, h, 0, T, J, S, errors,
        value_t, value_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        value_outputs_s, value_outputs_c, value_targets_s, value_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    query += b * query_b + at_head(h, query_h, ALIGNED)
    gradient += b * gradient_b + at_head(h, gradient_h, ALIGNED)
    by_query += (b * N * H + h) * d
    logarithms += (b * H + h) * N
    sums += (b * H + h) * N
    c0 = tl.arange(0, D0)
    first = (tl.program_id(0) % programs) * each
    for tile in range(first, min(first + each, tl.cdiv(N, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q0, g0 = load_tile(query, n, c0, query_n, query_d, N, d), load_tile(gradient, n, c0, gradient_n, gradient_d, N, d)
        q1, g1 = q0, g0
        if D1 > 0:
            q1 = load_tile(query, n, D0 + tl.arange(0, D1), query_n, query_d, N, d)
            g1 = load_tile(gradient, n, D0 + tl.arange(0, D1), gradient_n, gradient_d, N, d)
        s0, s1, largest = scores(q0, q1, k00, k01, k10, k11, scale, T, T0, T1, D1, POSITIVE, PRECISION)
        factor = base_2(scale, POSITIVE)
        largest *= factor
        p0 = tl.exp2(s0 * factor - largest[:, None])
        p1 = p0
        total = tl.sum(p0, 1)
        if T1 > 0:
            p1 = tl.exp2(s1 * factor - largest[:, None])
            total += tl.sum(p1, 1)
        p0 = p0 * (1.0 / total)[:, None]
        dp0 = across(g0, g1, v00, v01, D1, PRECISION)
        dp1 = dp0
        mean = tl.sum(p0 * dp0, 1)
        if T1 > 0:
            p1 = p1 * (1.0 / total)[:, None]
            dp1 = across(g0, g1, v10, v11, D1, PRECISION)
            mean += tl.sum(p1 * dp1, 1)
        ds0 = p0 * (dp0 - mean[:, None])
        ds1 = ds0
        if T1 > 0:
            ds1 = p1 * (dp1 - mean[:, None])
        tl.store(logarithms + n, largest + tl.log2(total), mask=n < N)
        tl.store(sums + n, mean, mask=n < N)
        store_tile(by_query, along(ds0, ds1, k00, k10, T1, PRECISION) * scale, n, c0, H * d, N, d)
        if D1 > 0:
            dq1 = along(ds0, ds1, k01, k11, T1, PRECISION) * scale
            store_tile(by_query, dq1, n, D0 + tl.arange(0, D1), H * d, N, d)


@triton.jit(do_not_specialize=["N", "T", "H", "J", "S", "B", "programs", "blocks", "each"], do_not_specialize_on_alignment=SMALL)
def _by_key_and_value(
    query, key, value, gradient, by_key, by_value, logarithms, sums,
    gates, components, index, key_outputs, key_targets, value_outputs, value_targets, errors,
    query_b, query_n, query_h, query_d, key_b, key_t, key_h, key_d, value_b, value_t, value_h, value_d,
    gradient_b, gradient_n, gradient_h, gradient_d,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    key_outputs_s, key_outputs_c, key_targets_s, key_targets_c,
    value_outputs_s, value_outputs_c, value_targets_s, value_targets_c,
    scale, N, T, H, J, S, B, programs, blocks, each,
    d: tl.constexpr, PLACES: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """by_value[part] = Pᵀ dO and by_key[part] = dSᵀ q over the part's queries, all tiles with positions as rows."""
    part, pair = tl.program_id(0) % programs, tl.program_id(0) // programs
    block, pair = pair % blocks, pair // blocks
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    k0, k1, _, _ = load_edited(
        key + b * key_b + at_head(h, key_h, ALIGNED), gates, components, index, key_outputs, key_targets,
        b, h, block * BLOCK_T, T, J, S, errors,
        key_t, key_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        key_outputs_s, key_outputs_c, key_targets_s, key_targets_c, d, PLACES, BLOCK_T, 0, D0, D1,
    )  # fmt: skip
    v0, v1, _, _ = load_edited(
        value + b * value_b + at_head(h, value_h, ALIGNED), gates, components, index, value_outputs, value_targets,
        b, h, block * BLOCK_T, T, J, S, errors,
        value_t, value_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        value_outputs_s, value_outputs_c, value_targets_s, value_targets_c, d, PLACES, BLOCK_T, 0, D0, D1,
    )  # fmt: skip
    query += b * query_b + at_head(h, query_h, ALIGNED)
    gradient += b * gradient_b + at_head(h, gradient_h, ALIGNED)
    logarithms += (b * H + h) * N
    sums += (b * H + h) * N
    c0 = tl.arange(0, D0)
    dk0 = tl.zeros((BLOCK_T, D0), tl.float32)
    dv0 = tl.zeros((BLOCK_T, D0), tl.float32)
    dk1, dv1 = dk0, dv0
    if D1 > 0:
        dk1 = tl.zeros((BLOCK_T, D1), tl.float32)
        dv1 = tl.zeros((BLOCK_T, D1), tl.float32)
    first = part * each
    for tile in range(first, min(first + each, tl.cdiv(N, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q0, g0 = load_tile(query, n, c0, query_n, query_d, N, d), load_tile(gradient, n, c0, gradient_n, gradient_d, N, d)
        q1, g1 = q0, g0
        if D1 > 0:
            q1 = load_tile(query, n, D0 + tl.arange(0, D1), query_n, query_d, N, d)
            g1 = load_tile(gradient, n, D0 + tl.arange(0, D1), gradient_n, gradient_d, N, d)
        # log-sum-exp of inf: P is 0 for queries beyond N
        logarithm = tl.load(logarithms + n, mask=n < N, other=float("inf"))
        mean = tl.load(sums + n, mask=n < N, other=0.0)
        p = tl.exp2(across(k0, k1, q0, q1, D1, PRECISION) * (scale * LOG2_E) - logarithm[None, :])
        ds = p * (across(v0, v1, g0, g1, D1, PRECISION) - mean[None, :])
        p, ds = rounded(p, g0.dtype), rounded(ds, q0.dtype)
        dv0 = add_product(dv0, p, g0, PRECISION)
        dk0 = add_product(dk0, ds, q0, PRECISION)
        if D1 > 0:
            dv1 = add_product(dv1, p, g1, PRECISION)
            dk1 = add_product(dk1, ds, q1, PRECISION)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    start = ((part * B + b) * T * H + h) * d
    store_tile(by_key + start, dk0 * scale, t, c0, H * d, T, d)
    store_tile(by_value + start, dv0, t, c0, H * d, T, d)
    if D1 > 0:
        store_tile(by_key + start, dk1 * scale, t, D0 + tl.arange(0, D1), H * d, T, d)
        store_tile(by_value + start, dv1, t, D0 + tl.arange(0, D1), H * d, T, d)
