"""The edit x + Σ_j (g_j o_j - a_j t_j) as a pass of its own, and its derivatives, shared by the operators.

A program has a tile of one batch row and loops over the row's places, so J is any number, and an empty place costs one
load of its -1. Sums over places that share a slot are computed by the program of the first one, in a fixed order, so results
are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_errors import words
from .device import rounded, slots_at
from .edited_tiles import SMALL
from .tuning import launch

TILES = (
    {"BLOCK_T": 16, "BLOCK_O": 128, "num_warps": 4},
    {"BLOCK_T": 32, "BLOCK_O": 128, "num_warps": 8},
    {"BLOCK_T": 8, "BLOCK_O": 256, "num_warps": 4},
    {"BLOCK_T": 16, "BLOCK_O": 256, "num_warps": 8},
)
"""Several rows, so that a load of a table is used more than once, and enough columns for 16-byte loads."""


def add_rank_one(
    base: Tensor, gates: Tensor, components: Tensor, index: Tensor, outputs: Tensor, targets: Tensor
) -> None:
    """base[B, T, O], contiguous, edited in place in float32 and rounded once. Batch rows without a concept are not written."""
    B, T, O = base.shape
    J = index.shape[1]
    if J == 0 or base.numel() == 0:
        return

    def run(tiles, result=base):
        grid = (triton.cdiv(O, tiles["BLOCK_O"]), triton.cdiv(T, tiles["BLOCK_T"]), B)
        _update[grid](
            result, base, gates, components, index, outputs, targets, words(base.device), T, O, J, len(outputs),
            *gates.stride(), *components.stride(), *index.stride(), *outputs.stride(), *targets.stride(), **tiles,
        )  # fmt: skip

    key = (T, O, J, base.dtype, outputs.dtype)
    launch("add_rank_one", key, base.device, TILES, run, trial=lambda tiles: run(tiles, torch.empty_like(base)))


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=SMALL)
def _update(
    result, base, gates, components, index, outputs, targets, errors, T, O, J, S,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    outputs_s, outputs_o, targets_s, targets_o,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """result[b, t, o] = base[b, t, o] + Σ_j (g[b, t, j] o[slot_j, o] - a[b, t, j] t[slot_j, o]), if the row has a concept."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    edit = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    concepts = 0
    for j in range(J):
        slot = slots_at(index + b * index_b + j * index_j, True, S, errors)
        if slot >= 0:
            concepts += 1
            g = tl.load(gates + b * gates_b + t * gates_t + j * gates_j, mask=t < T, other=0.0)
            a = tl.load(components + b * components_b + t * components_t + j * components_j, mask=t < T, other=0.0)
            output = tl.load(outputs + slot * outputs_s + o * outputs_o, mask=o < O, other=0.0).to(tl.float32)
            target = tl.load(targets + slot * targets_s + o * targets_o, mask=o < O, other=0.0).to(tl.float32)
            edit = edit + g[:, None] * output[None, :] - a[:, None] * target[None, :]  # two multiply-adds
    if concepts > 0:
        inside = (t < T)[:, None] & (o < O)[None, :]
        places = (b * T + t)[:, None] * O + o[None, :]
        unedited = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + places, rounded(unedited + edit, result.dtype.element_ty), mask=inside)


def rank_one_backward(
    gradient: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    targets: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """One gradient per argument from gates on, None where `needs` is False. That of base is `gradient` itself.

    gradient [B, T, O], any strides; the others as `edited_projection` has them, in at most float32.
    """
    B, T, O = gradient.shape
    J = index.shape[1]
    COEFFICIENTS, TABLES = needs[0] or needs[1], needs[3] or needs[4]
    if B * T * O * J == 0:
        arguments = (gates, components, index, outputs, targets)
        return tuple(x.new_zeros(x.shape) if need else None for x, need in zip(arguments, needs))
    by_tables = gradient.new_empty((B * J, 2, O) if TABLES else 0, dtype=torch.float32)
    parts = None

    def run(tiles):
        nonlocal parts
        blocks = triton.cdiv(O, tiles["BLOCK_O"])
        parts = gradient.new_empty((blocks, 2, B, T, J) if COEFFICIENTS else 0, dtype=torch.float32)
        _gradients[(blocks, B * J)](
            parts, by_tables, gradient, gates, components, index, outputs, targets, words(gradient.device),
            B, T, O, J, len(outputs), *gradient.stride(),
            *gates.stride(), *components.stride(), *index.stride(), *outputs.stride(), *targets.stride(),
            COEFFICIENTS=COEFFICIENTS, TABLES=TABLES, **tiles,
        )  # fmt: skip

    key = (T, O, J, gradient.dtype, outputs.dtype, COEFFICIENTS, TABLES)
    launch("rank_one_backward", key, gradient.device, TILES, run)
    by_gates = by_components = by_outputs = by_targets = None
    if COEFFICIENTS:
        present = ((index >= 0) & (index < len(outputs)))[:, None]
        by_gates, by_components = (torch.where(present, part.sum(0), 0) for part in (parts[:, 0], -parts[:, 1]))
    if TABLES:
        by_outputs, by_targets = sum_by_slot(by_tables, index, outputs)
    found = (by_gates, by_components, None, by_outputs, by_targets)
    return tuple(x if need else None for x, need in zip(found, needs))


def sum_by_slot(by_tables: Tensor, index: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Two gradients like `table` [S, O] from those of each place, by_tables [B*J, 2, O] in the order of index [B, J]."""
    count, _, O = by_tables.shape
    by_first, by_second = (torch.zeros(table.shape, dtype=table.dtype, device=table.device) for _ in range(2))

    def run(tiles):
        grid = (triton.cdiv(O, tiles["BLOCK_O"]), count)
        _sum_by_slot[grid](by_first, by_second, by_tables, index, count, O, index.shape[1], len(table), *index.stride(), **tiles)

    launch("sum_by_slot", (O, count), table.device, ({"BLOCK_O": 256, "num_warps": 4},), run)
    return by_first, by_second


@triton.jit(do_not_specialize=["B", "S"], do_not_specialize_on_alignment=SMALL)
def _gradients(
    parts, by_tables, gradient, gates, components, index, outputs, targets, errors, B, T, O, J, S,
    gradient_b, gradient_t, gradient_o,
    gates_b, gates_t, gates_j, components_b, components_t, components_j, index_b, index_j,
    outputs_s, outputs_o, targets_s, targets_o,
    COEFFICIENTS: tl.constexpr, TABLES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """For one place j of one row b and a block of columns, whole sums over t and the block's part of those over o.

    parts[block, 0 and 1, b, t, j] = Σ_o d[b, t, o] o[slot, o] and the same with t[slot, o];
    by_tables[b J + j, 0 and 1, o] = Σ_t g[b, t, j] d[b, t, o] and -Σ_t a[b, t, j] d[b, t, o]. Nothing for an empty place.
    """
    block, line = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, j = line // J, line % J
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    slot = slots_at(index + b * index_b + j * index_j, True, S, errors)
    if slot >= 0:
        output = tl.load(outputs + slot * outputs_s + o * outputs_o, mask=o < O, other=0.0).to(tl.float32)
        target = tl.load(targets + slot * targets_s + o * targets_o, mask=o < O, other=0.0).to(tl.float32)
        by_output = tl.zeros((BLOCK_O,), tl.float32)
        by_target = tl.zeros((BLOCK_O,), tl.float32)
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            inside = (t < T)[:, None] & (o < O)[None, :]
            places = t.to(tl.int64)[:, None] * gradient_t + o[None, :] * gradient_o
            d = tl.load(gradient + b * gradient_b + places, mask=inside, other=0.0).to(tl.float32)
            if COEFFICIENTS:
                of_output, of_target = ((2 * block * B + b) * T + t) * J + j, (((2 * block + 1) * B + b) * T + t) * J + j
                tl.store(parts + of_output, tl.sum(d * output[None, :], 1), mask=t < T)
                tl.store(parts + of_target, tl.sum(d * target[None, :], 1), mask=t < T)
            if TABLES:
                g = tl.load(gates + b * gates_b + t * gates_t + j * gates_j, mask=t < T, other=0.0)
                a = tl.load(components + b * components_b + t * components_t + j * components_j, mask=t < T, other=0.0)
                by_output += tl.sum(d * g[:, None], 0)
                by_target -= tl.sum(d * a[:, None], 0)
        if TABLES:
            tl.store(by_tables + 2 * line * O + o, by_output, mask=o < O)
            tl.store(by_tables + (2 * line + 1) * O + o, by_target, mask=o < O)


@triton.jit(do_not_specialize=["count", "S"], do_not_specialize_on_alignment=["index"])
def _sum_by_slot(by_outputs, by_targets, by_tables, index, count, O, J, S, index_b, index_j, BLOCK_O: tl.constexpr):
    """by_outputs[slot] and by_targets[slot] = Σ of the lines whose place has this slot, by the first such line."""
    first = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    slot = tl.load(index + first // J * index_b + first % J * index_j)
    earlier = 0
    for line in range(first):
        earlier += (tl.load(index + line // J * index_b + line % J * index_j) == slot).to(tl.int32)
    if (slot >= 0) & (slot < S) & (earlier == 0):
        by_output = tl.zeros((BLOCK_O,), tl.float32)
        by_target = tl.zeros((BLOCK_O,), tl.float32)
        for line in range(first, count):
            if tl.load(index + line // J * index_b + line % J * index_j) == slot:
                by_output += tl.load(by_tables + 2 * line * O + o, mask=o < O, other=0.0)
                by_target += tl.load(by_tables + (2 * line + 1) * O + o, mask=o < O, other=0.0)
        place = slot.to(tl.int64) * O + o
        tl.store(by_outputs + place, rounded(by_output, by_outputs.dtype.element_ty), mask=o < O)
        tl.store(by_targets + place, rounded(by_target, by_targets.dtype.element_ty), mask=o < O)
