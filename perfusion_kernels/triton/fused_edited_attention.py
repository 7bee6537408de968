"""Projection, edit and attention in one launch with Triton.

A program has one row and head. It projects the encodings onto the head's T keys and values, which stay on the
chip, edits them and then loops over tiles of queries, as `edited_attention` does. Every program of a head repeats its projection,
so waves.py starts only as many as it takes to fill the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..device_errors import words
from ..reference.edit import unpacked
from . import device, shared_memory
from .attention_tiles import add_product, alignment, at_head, load_tile, padded, precision, sizes, unsupported_sizes
from .device import rounded
from .edited_attention import attend_tiles
from .edited_attention_backward import attention_gradients, edit_gradients, unsupported_gradients
from .edited_tiles import SMALL, edit_arguments, edit_tiles
from .tuning import launch
from .waves import share


def unsupported(query: Tensor, encodings: Tensor, *weights_edit_and_scale) -> str | None:
    T, d = encodings.shape[1], query.shape[3]
    return (
        device.unsupported(query, encodings, *weights_edit_and_scale)
        or unsupported_sizes(T, d)
        or shared_memory.unsupported(tiles(T, d, query.dtype), held(T, d, query.dtype), query.device)
    )


def fused_edited_attention(query: Tensor, encodings: Tensor, key_weight: Tensor, value_weight: Tensor, *rest) -> Tensor:
    edit, scale = unpacked(rest)
    (B, N, H, d), (_, T, D) = query.shape, encodings.shape
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    edit, edit_strides, J, S, places = edit_arguments(edit)

    def run(tiles):
        programs, each = share(N, B * H, tiles, held(T, d, query.dtype), query.device, load=D // tiles["BLOCK_N"])
        _project_and_attend[(programs * B * H,)](
            query, encodings, key_weight, value_weight, result, *edit, words(query.device),
            *query.stride(), *encodings.stride(), *key_weight.stride(), *value_weight.stride(), *edit_strides,
            float(scale), N, T, H, D, J, S, programs, each,
            d=d, PLACES=places, ALIGNED=alignment(query.stride(2)), **sizes(T, d), POSITIVE=scale > 0, PRECISION=precision(query), **tiles,
        )  # fmt: skip

    fitting = shared_memory.fitting(tiles(T, d, query.dtype), held(T, d, query.dtype), query.device)
    launch("fused_edited_attention", (B, N, T, D, H, d, query.dtype), query.device, fitting, run)
    return result


def tiles(T: int, d: int, dtype: torch.dtype) -> tuple[dict[str, int], ...]:
    """Queries per tile, and columns of the encodings per step; registers hold the accumulators of keys or values [T, d]."""
    if dtype == torch.float32:
        return ({"BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},)
    warps = 8 if T * d > 80 * 64 else 4
    return (
        {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": warps, "num_stages": 2},
        {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": warps, "num_stages": 2},
        {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": warps, "num_stages": 1},
    )


def held(T: int, d: int, dtype: torch.dtype) -> shared_memory.Held:
    """All keys and values of a head, and the larger of the stages of their projection and a tile of queries with P."""
    T, d = padded(T, d)

    def bytes_of(tiles):
        stages = tiles["num_stages"] * tiles["BLOCK_K"] * (T + d)
        return dtype.itemsize * (2 * T * d + max(stages, tiles["BLOCK_N"] * (T + d)))

    return bytes_of


@triton.jit(do_not_specialize=["N", "T", "H", "J", "S", "programs", "each"], do_not_specialize_on_alignment=SMALL)
def _project_and_attend(
    query, encodings, key_weight, value_weight, result,
    gates, components, index, key_outputs, key_targets, value_outputs, value_targets, errors,
    query_b, query_n, query_h, query_d, encodings_b, encodings_t, encodings_i,
    key_weight_o, key_weight_i, value_weight_o, value_weight_i,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    key_outputs_s, key_outputs_c, key_targets_s, key_targets_c,
    value_outputs_s, value_outputs_c, value_targets_s, value_targets_c,
    scale, N, T, H, D, J, S, programs, each,
    d: tl.constexpr, PLACES: tl.constexpr, ALIGNED: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    POSITIVE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // programs
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    encodings += b * encodings_b
    k00, k01, k10, k11 = _project(
        encodings, key_weight + h * d * key_weight_o, encodings_t, encodings_i, key_weight_o, key_weight_i,
        T, D, d, T0, T1, D0, D1, PRECISION, BLOCK_K,
    )  # fmt: skip
    k00, k01, k10, k11 = edit_tiles(
        k00, k01, k10, k11, gates, components, index, key_outputs, key_targets, b, h, 0, T, J, S, errors,
        gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        key_outputs_s, key_outputs_c, key_targets_s, key_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    v00, v01, v10, v11 = _project(
        encodings, value_weight + h * d * value_weight_o, encodings_t, encodings_i, value_weight_o, value_weight_i,
        T, D, d, T0, T1, D0, D1, PRECISION, BLOCK_K,
    )  # fmt: skip
    v00, v01, v10, v11 = edit_tiles(
        v00, v01, v10, v11, gates, components, index, value_outputs, value_targets, b, h, 0, T, J, S, errors,
        gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        value_outputs_s, value_outputs_c, value_targets_s, value_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    attend_tiles(
        query + b * query_b + at_head(h, query_h, ALIGNED), result + (b * N * H + h) * d, k00, k01, k10, k11, v00, v01, v10, v11,
        query_n, query_d, scale, N, T, H, (tl.program_id(0) % programs) * each, each,
        None, True, None, None, 0, 0, d, T0, T1, D0, D1, POSITIVE, PRECISION, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _project(
    encodings, weight, encodings_t, encodings_i, weight_o, weight_i, T, D,
    d: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The four tiles of e Wᵀ [T, d], summed in float32 and rounded to the dtype of the encodings."""
    t0, t1 = tl.arange(0, T0), T0 + tl.arange(0, T1 if T1 > 0 else 16)
    c0, c1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 16)
    x00 = tl.zeros((T0, D0), tl.float32)
    x01, x10, x11 = x00, x00, x00
    if D1 > 0:
        x01 = tl.zeros((T0, D1), tl.float32)
    if T1 > 0:
        x10 = tl.zeros((T1, D0), tl.float32)
    if T1 > 0 and D1 > 0:
        x11 = tl.zeros((T1, D1), tl.float32)
    for start in range(0, D, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        e0 = load_tile(encodings, t0, i, encodings_t, encodings_i, T, D)
        w0 = tl.trans(load_tile(weight, c0, i, weight_o, weight_i, d, D))
        x00 = add_product(x00, e0, w0, PRECISION)
        if D1 > 0:
            w1 = tl.trans(load_tile(weight, c1, i, weight_o, weight_i, d, D))
            x01 = add_product(x01, e0, w1, PRECISION)
        if T1 > 0:
            e1 = load_tile(encodings, t1, i, encodings_t, encodings_i, T, D)
            x10 = add_product(x10, e1, w0, PRECISION)
            if D1 > 0:
                x11 = add_product(x11, e1, w1, PRECISION)
    dtype: tl.constexpr = encodings.dtype.element_ty
    return rounded(x00, dtype), rounded(x01, dtype), rounded(x10, dtype), rounded(x11, dtype)


def unsupported_backward(gradient: Tensor, *arguments_and_needs) -> str | None:
    query, encodings = arguments_and_needs[:2]
    reason = device.unsupported(gradient, *arguments_and_needs)
    return reason or unsupported_gradients(query, encodings.shape[1], query.shape[3])


def fused_edited_attention_backward(
    gradient: Tensor, query: Tensor, encodings: Tensor, key_weight: Tensor, value_weight: Tensor, *rest
) -> list[Tensor]:
    """The gradients that are needed: attention's by its kernels, the projections' by products of the library."""
    key = functional.linear(encodings, key_weight).unflatten(-1, query.shape[2:])
    value = functional.linear(encodings, value_weight).unflatten(-1, query.shape[2:])
    edit, scale, needs = unpacked(rest)
    by_query, by_key, by_value = attention_gradients(gradient, query, key, value, edit, scale)
    by_edit = edit_gradients(by_key, by_value, edit, needs[4:11])
    by_key, by_value = (x.flatten(2).to(encodings.dtype) for x in (by_key, by_value))
    tokens = encodings.flatten(0, 1)
    found = [
        by_query,
        by_key @ key_weight + by_value @ value_weight if needs[1] else None,
        by_key.flatten(0, 1).mT @ tokens if needs[2] else None,
        by_value.flatten(0, 1).mT @ tokens if needs[3] else None,
        *by_edit,
    ]
    return [x for x, need in zip(found, needs) if need]
