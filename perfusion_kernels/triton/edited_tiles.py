"""The edit x + Σ_j (g_j o_j - a_j p_j), applied to tiles of keys or values in registers."""

import triton
import triton.language as tl

from ..reference.edit import Edit
from .attention_tiles import at_head, load_pieces
from .device import rounded, slots_at

SMALL = ["gates", "components", "index"]
"""Arguments read element by element: not specialised on 16-byte alignment, so that views of them do not recompile."""


def places(J: int) -> int:
    """The constant PLACES of a kernel: the next power of two, to which places are unrolled; 0, a loop, beyond 8."""
    return triton.next_power_of_2(J) if J <= 8 else 0


def edit_arguments(edit: Edit) -> tuple:
    """(tensors, strides, J, S, PLACES) of the edit for a kernel; None and zeros without an edit."""
    if edit.index is None or edit.index.shape[1] == 0:
        return (None,) * 7, (0,) * 16, 0, 0, 1
    dimensions = (3, 3, 2, 2, 2, 2, 2)
    strides = [n for x, size in zip(edit, dimensions) for n in ((0,) * size if x is None else x.stride())]
    J, S = edit.index.shape[1], (edit.value_outputs if edit.key_outputs is None else edit.key_outputs).shape[0]
    return edit, tuple(strides), J, S, places(J)


@triton.jit
def _edit_place(
    tile, j, J, S, errors, gates, components, index, outputs, targets, positions, columns, T, d,
    gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c,
):  # fmt: skip
    """tile + g_j o_j - a_j p_j; the tile itself, without loads, where the place is empty."""
    slot = slots_at(index + j * index_j, j < J, S, errors)
    if slot >= 0:
        inside, within = positions < T, columns < d
        g = tl.load(gates + positions * gates_t + j * gates_j, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(components + positions * components_t + j * components_j, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(outputs + slot * outputs_s + columns * outputs_c, mask=within, other=0.0).to(tl.float32)
        p = tl.load(targets + slot * targets_s + columns * targets_c, mask=within, other=0.0).to(tl.float32)
        tile = tile + g[:, None] * o[None, :] - a[:, None] * p[None, :]  # two multiply-adds
    return tile


@triton.jit
def edit_tile(
    tile, gates, components, index, outputs, targets, positions, columns, T, d, J, S, errors,
    gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c,
    PLACES: tl.constexpr,
):  # fmt: skip
    """tile + Σ_j (g_j o_j - a_j p_j), in float32, rounded to the tile's dtype once.

    The pointers are those of the batch row; those of the tables, of the head's first column.
    """
    wide = tile.to(tl.float32)
    if PLACES > 0:
        for j in tl.static_range(PLACES):
            wide = _edit_place(
                wide, j, J, S, errors, gates, components, index, outputs, targets, positions, columns, T, d,
                gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c,
            )  # fmt: skip
    else:
        for j in range(J):
            wide = _edit_place(
                wide, j, J, S, errors, gates, components, index, outputs, targets, positions, columns, T, d,
                gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c,
            )  # fmt: skip
    return rounded(wide, tile.dtype)


@triton.jit
def load_edited(
    base, gates, components, index, outputs, targets, b, h, first, T, J, S, errors,
    base_t, base_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    outputs_s, outputs_c, targets_s, targets_c,
    d: tl.constexpr, PLACES: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The four tiles of one head's keys or values from position `first` on, edited where there are tables."""
    x00, x01 = load_pieces(base, first + tl.arange(0, T0), base_t, base_d, T, d, D0, D1)
    x10, x11 = x00, x01
    if T1 > 0:
        x10, x11 = load_pieces(base, first + T0 + tl.arange(0, T1), base_t, base_d, T, d, D0, D1)
    return edit_tiles(
        x00, x01, x10, x11, gates, components, index, outputs, targets, b, h, first, T, J, S, errors,
        gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        outputs_s, outputs_c, targets_s, targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip


@triton.jit
def load_head(
    key, value, gates, components, index, key_outputs, key_targets, value_outputs, value_targets, row, h, first, T, J, S, errors,
    key_b, key_t, key_h, key_d, value_b, value_t, value_h, value_d,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    key_outputs_s, key_outputs_c, key_targets_s, key_targets_c,
    value_outputs_s, value_outputs_c, value_targets_s, value_targets_c,
    d: tl.constexpr, PLACES: tl.constexpr, ALIGNED: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The tiles of one head's keys, then of its values, of batch row `row`, each as `load_edited` gives them."""
    k00, k01, k10, k11 = load_edited(
        key + row * key_b + at_head(h, key_h, ALIGNED), gates, components, index, key_outputs, key_targets,
        row, h, first, T, J, S, errors,
        key_t, key_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        key_outputs_s, key_outputs_c, key_targets_s, key_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    v00, v01, v10, v11 = load_edited(
        value + row * value_b + at_head(h, value_h, ALIGNED), gates, components, index, value_outputs, value_targets,
        row, h, first, T, J, S, errors,
        value_t, value_d, gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
        value_outputs_s, value_outputs_c, value_targets_s, value_targets_c, d, PLACES, T0, T1, D0, D1,
    )  # fmt: skip
    return k00, k01, k10, k11, v00, v01, v10, v11


@triton.jit
def edit_tiles(
    x00, x01, x10, x11, gates, components, index, outputs, targets, b, h, first, T, J, S, errors,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    outputs_s, outputs_c, targets_s, targets_c,
    d: tl.constexpr, PLACES: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The four tiles, which begin at position `first`, with the edit of batch row b; unchanged where there is no table."""
    if outputs is not None:
        gates += b * gates_b
        components += b * components_b
        index += b * index_b
        outputs += h * d * outputs_c
        targets += h * d * targets_c
        t0, c0 = first + tl.arange(0, T0), tl.arange(0, D0)
        x00 = edit_tile(
            x00, gates, components, index, outputs, targets, t0, c0, T, d, J, S, errors,
            gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c, PLACES,
        )  # fmt: skip
        if D1 > 0:
            x01 = edit_tile(
                x01, gates, components, index, outputs, targets, t0, D0 + tl.arange(0, D1), T, d, J, S, errors,
                gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c,
                PLACES,
            )  # fmt: skip
        if T1 > 0:
            x10 = edit_tile(
                x10, gates, components, index, outputs, targets, first + T0 + tl.arange(0, T1), c0, T, d, J, S, errors,
                gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c,
                PLACES,
            )  # fmt: skip
        if T1 > 0 and D1 > 0:
            x11 = edit_tile(
                x11, gates, components, index, outputs, targets, first + T0 + tl.arange(0, T1), D0 + tl.arange(0, D1), T, d, J, S, errors,
                gates_t, gates_j, components_t, components_j, index_j, outputs_s, outputs_c, targets_s, targets_c,
                PLACES,
            )  # fmt: skip
    return x00, x01, x10, x11
