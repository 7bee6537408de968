"""e Wᵀ + Σ_j (g_j o_j - a_j p_j) in one launch: a matrix product whose epilogue adds the edit to the float32 accumulators.

A program has a block of columns and all T tokens of one batch row (beyond 128, an equal part of them) as two pieces, 64 + 16 for
77. So it reads each of its weights once, and the slots of one row only. The derivatives are those of `edited_projection`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_errors import words
from ..reference.edit import Edit
from .attention_tiles import add_product, load_tile, pieces, precision, store_tile
from .device import unsupported as unsupported
from .edited_projection import edited_projection_backward as fused_edited_projection_backward
from .edited_projection import unsupported_backward
from .edited_tiles import SMALL, edit_arguments, edit_tile
from .tuning import launch

__all__ = ["fused_edited_projection", "fused_edited_projection_backward", "unsupported", "unsupported_backward"]

TOKENS = 128
"""The most tokens of a program; its stages then take 96 KiB of shared memory, which all supported GPUs have."""


def fused_edited_projection(
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
) -> Tensor:
    (B, T, D), O = encodings.shape, weight.shape[0]
    result = torch.empty((B, T, O), dtype=encodings.dtype, device=encodings.device)
    if result.numel() == 0:
        return result
    (gates, components, index, outputs, targets, _, _), strides, J, S, places = edit_arguments(Edit(
        gates, components, index, outputs, projected_targets, None, None
    ))
    parts = triton.cdiv(T, TOKENS)
    each = triton.cdiv(T, parts)
    T0, T1 = pieces(each)

    def run(tiles):
        _project[(triton.cdiv(O, tiles["BLOCK_O"]), parts, B)](
            result, encodings, weight, gates, components, index, outputs, targets, words(encodings.device), T, each, D, O, J, S,
            *encodings.stride(), *weight.stride(), *strides[:12],
            PLACES=places, T0=T0, T1=T1, PRECISION=precision(encodings), **tiles,
        )  # fmt: skip

    # the edit is not part of the key: tiles, and so the bits of rows without a concept, must not depend on the other rows
    launch("fused_edited_projection", (B, T, D, O, result.dtype), result.device, tiles(result.dtype), run)
    return result


def tiles(dtype: torch.dtype) -> tuple[dict[str, int], ...]:
    """Columns of the results, and of the encodings per step; registers hold the accumulators [T, BLOCK_O]."""
    if dtype == torch.float32:
        return (
            {"BLOCK_O": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
            {"BLOCK_O": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
        )
    return (
        {"BLOCK_O": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_O": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_O": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
        {"BLOCK_O": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    )


@triton.jit(do_not_specialize=["T", "each", "J", "S"], do_not_specialize_on_alignment=SMALL)
def _project(
    result, encodings, weight, gates, components, index, outputs, targets, errors, T, each, D, O, J, S,
    encodings_b, encodings_t, encodings_i, weight_o, weight_i,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    outputs_s, outputs_c, targets_s, targets_c,
    PLACES: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result[b, t, o] = Σ_i e[b, t, i] w[o, i] + Σ_j (g[b, t, j] o[slot_j, o] - a[b, t, j] p[slot_j, o]), of a part of t."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * each
    end = min(first + each, T)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t0, t1 = first + tl.arange(0, T0), first + T0 + tl.arange(0, T1 if T1 > 0 else 16)
    encodings += b * encodings_b
    x0 = tl.zeros((T0, BLOCK_O), tl.float32)
    x1 = tl.zeros((T1 if T1 > 0 else 16, BLOCK_O), tl.float32)
    for start in range(0, D, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        w = tl.trans(load_tile(weight, o, i, weight_o, weight_i, O, D))
        x0 = add_product(x0, load_tile(encodings, t0, i, encodings_t, encodings_i, end, D), w, PRECISION)
        if T1 > 0:
            x1 = add_product(x1, load_tile(encodings, t1, i, encodings_t, encodings_i, end, D), w, PRECISION)
    if index is not None:
        gates += b * gates_b
        components += b * components_b
        index += b * index_b
        x0 = edit_tile(
            x0, gates, components, index, outputs, targets, t0, o, end, O, J, S, errors,
            gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c, PLACES,
        )  # fmt: skip
        if T1 > 0:
            x1 = edit_tile(
                x1, gates, components, index, outputs, targets, t1, o, end, O, J, S, errors,
                gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c, PLACES,
            )  # fmt: skip
    result += b * T * O
    store_tile(result, x0, t0, o, O, end, O)
    if T1 > 0:
        store_tile(result, x1, t1, o, O, end, O)
