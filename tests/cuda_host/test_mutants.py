"""Deliberate faults in the kernels, each of which a named check must find. A check that passes on a mutant is no check."""

from dataclasses import replace

import pytest

from . import test_concept_gates as gates
from . import test_edited_attention as attention
from . import test_edited_projection as projection
from . import test_edited_projection_backward as projection_backward
from . import test_fused_edited_attention as fused
from .build import Change, build_module, only_widths
from .host import Host, Refused

ATTENTION, TILES, EDIT, STREAM, FUSED, GATES, GATE_PRODUCTS, PRODUCT, PROJECTION, RANK_ONE, PROJECTION_BACKWARD = (
    f"{name}.cuh"
    for name in (
        *("edited_attention", "attention_tiles", "edited_tiles", "query_stream", "fused_edited_attention"),
        *("concept_gates", "concept_gates_products"),
        *("matrix_product", "edited_projection", "rank_one_backward", "edited_projection_backward"),
    )
)
MUTANTS = {
    "memory is read while the kernel before may still run": (
        Change(ATTENTION, "  wait_for_previous_kernel();\n", ""), attention.test_mixed_rows
    ),
    "the barrier after K and V is gone": (
        Change(ATTENTION, "    wait_for_copies<0>();\n    barrier();\n", "    wait_for_copies<0>();\n"), attention.test_long_streams
    ),
    "the mask lets one key too many in": (
        Change(TILES, "8 * last + first + e % 2 < T ?", "8 * last + first + e % 2 <= T ?"), attention.test_short_last_group
    ),
    "the maximum is of half a row": (
        Change(TILES, "      high = maximum(high, shuffle_xor(high, 2));\n", ""), attention.test_mixed_rows
    ),
    "the sum is of the wrong lanes": (
        Change(TILES, "    all += shuffle_xor(all, 2);\n", "    all += shuffle_xor(all, 4);\n"), attention.test_mixed_rows
    ),
    "the next tile lands on this one": (
        Change(STREAM, "load(which ^ 1, tile + plan.warps)", "load(which, tile + plan.warps)"), attention.test_long_streams
    ),
    "a stage is read before it has landed": (
        Change(STREAM, "        commit_copies();\n        wait_for_copies<1>();\n", "        commit_copies();\n        wait_for_copies<2>();\n"),
        attention.test_long_streams,
    ),
    "the stage is never changed": (Change(STREAM, "        which ^= 1;\n", "        which ^= 0;\n"), attention.test_long_streams),
    "gates of the neighbour's concept": (
        Change(EDIT, "p.gates.strides[1] + (place + j) * p.gates", "p.gates.strides[1] + (j ? j - 1 : 0) * p.gates"), attention.test_mixed_rows
    ),
    "edits of the first row's concepts": (
        Change(EDIT, "+ b * p.index.strides[0];\n    if (thread()", "+ p.index.strides[0];\n    if (thread()"), attention.test_mixed_rows
    ),
    "components are added": (Change(EDIT, "g[r] * o[e] - a[r] * w[e]", "g[r] * o[e] + a[r] * w[e]"), attention.test_mixed_rows),
    "one token too many is written": (
        Change(STREAM, "    if (n >= N) continue;\n", "    if (n > N) continue;\n"), attention.test_nothing_is_written_outside
    ),
    "halves of the left operand exchanged": (
        Change(TILES, "* pitch + k + l / 16 * 8);", "* pitch + k + (1 - l / 16) * 8);"),
        attention.test_mixed_rows,
    ),
    "the last 8 columns of a head are left out": (
        Change(TILES, "load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 8)", "load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 16)"),
        attention.test_mixed_rows,
    ),
    "another head's edit": (Change(EDIT, "column(h * d)", "column(0 * h)"), attention.test_mixed_rows),
    "values are edited by the keys' tables": (Change(EDIT, "table = side == 0 ?", "table = side >= 0 ?"), attention.test_mixed_rows),
    "concepts are edited before they are there": (
        Change(EDIT, "          load_places(place);\n          barrier();\n", "          load_places(place);\n"), attention.test_schedules_agree
    ),
    "concepts give way before they are edited": (
        Change(EDIT, "          barrier();  // the group before has been read\n", ""), attention.test_schedules_agree
    ),
    "queries land on an edit that is being read": (
        Change(ATTENTION, "      edit.apply(keys, values);\n      barrier();\n", "      edit.apply(keys, values);\n"), attention.test_long_streams
    ),
    "rows are divided by another's energy": (
        Change(GATES, "system[i] /= energies[i / J]", "system[i] /= energies[i % J]"), gates.test_mixed_rows
    ),
    "approximate components": (
        Change(GATES, "      for (int k = 0; k < j; ++k) c[j] -= system[j * J + k] * c[k];\n", "      for (int k = 0; k < j; ++k) (void)k;\n"), gates.test_mixed_rows
    ),
    "the factors are read too early": (
        Change(GATES, "      system[i * J + k] -= system[i * J + j] * system[j * J + k];\n    }\n    barrier();\n",
               "      system[i * J + k] -= system[i * J + j] * system[j * J + k];\n    }\n"), gates.test_any_order
    ),
    "another place's temperature": (Change(GATES, "parameters[J + j]", "parameters[J + (j ? j - 1 : 1)]"), gates.test_mixed_rows),
    "biases are read before they stand there": (
        Change(GATES, "columns[i] /= energies[i % J];\n  barrier();\n", "columns[i] /= energies[i % J];\n"), gates.test_any_order
    ),
    "slots are read before they stand there": (
        Change(GATES, "of_place(p.temperature, thread());\n    barrier();\n", "of_place(p.temperature, thread());\n"), gates.test_any_order
    ),
    "the sum of all warps but one": (Change(GATES, "for (int w = 0; w < Products::warps; ++w)", "for (int w = 0; w + 1 < Products::warps; ++w)"), gates.test_many_slices),
    "sums are added before all warps have theirs": (
        Change(GATES, "place, other);\n      barrier();\n", "place, other);\n"), gates.test_any_order
    ),
    "the next places' products land on sums that are still to be added": (
        Change(GATES, "      }\n      barrier();\n    }\n  }\n", "      }\n    }\n  }\n"), gates.test_any_order
    ),
    "products with targets that are not there": (
        Change(GATES, "slots[j] >= 0 && slots[k] >= 0 ? sum : j == k ? 1.0f : 0.0f", "sum"), gates.test_mixed_rows
    ),
    "metric targets are read before they stand there": (
        Change(GATE_PRODUCTS, "      warp_barrier();\n      bring(", "      bring("), gates.test_many_slices
    ),
    "the next slice's metric targets land on those being read": (
        Change(GATE_PRODUCTS, "      warp_barrier();  // all have read the metric targets\n", ""), gates.test_many_slices
    ),
    "the next slice is the one after": (
        Change(GATE_PRODUCTS, "bring(next, column + step);", "bring(next, column + 2 * step);"), gates.test_many_slices
    ),
    "halves of a metric target exchanged": (
        Change(GATE_PRODUCTS, "{{shared[j * 2 * group_lanes], shared[(j * 2 + 1) * group_lanes]}}", "{{shared[(j * 2 + 1) * group_lanes], shared[j * 2 * group_lanes]}}"),
        gates.test_mixed_rows,
    ),
    "the last columns of a slice are read to the end of 16 bytes": (
        Change(GATE_PRODUCTS, "count >= 8 || count <= 0", "true"), gates.test_a_width_within_longer_rows
    ),
    "tokens behind the last": (Change(GATE_PRODUCTS, "other == 0 && t < T ? t : -1", "other == 0 && t <= T ? t : -1"), gates.test_nothing_else_is_read),
    "the sum of a neighbour's place": (
        Change("device/warp.cuh", "(upper ? x[i + half] : x[i]) + shuffle_xor(given, mask)", "(upper ? x[i] : x[i + half]) + shuffle_xor(given, mask)"), gates.test_mixed_rows
    ),
    "a step of the product lands on the one being read": (
        Change(PRODUCT, "written = written + stage == all ? 0 : written + stage;", "written = written + stage == all ? stage : written + stage;"), projection.test_schedules_agree
    ),
    "no barrier between two steps of the product": (
        Change(PRODUCT, "    wait_for_copies<Tile::stages - 2>();\n    barrier();\n", "    wait_for_copies<Tile::stages - 2>();\n"), projection.test_schedules_agree
    ),
    "the last copy of a row is always whole": (
        Change(PRODUCT, "columns_left < 8 ? columns_left : 8;", "8;"), projection.test_ragged_rows
    ),
    "halves of the right operand exchanged": (
        Change(PRODUCT, "l / 16 * 8 + l % 8) * pitch + k + l / 8 % 2 * 8)", "l / 16 * 8 + l % 8) * pitch + k + (1 - l / 8 % 2) * 8)"),
        projection.test_mixed_rows
    ),
    "each concept's edit is rounded by itself": (
        Change(PROJECTION, "x[i][e] += g * o[e] - a * w[e];", "x[i][e] += to_float(Element{static_cast<uint16_t>(pack<Element>(g * o[e] - a * w[e], 0.0f))});"),
        projection.test_rounded_once_more,
    ),
    "the concepts of the tile's first row": (
        Change(PROJECTION, "const int64_t b = (row + r) / T, t", "const int64_t b = row / T, t"), projection.test_mixed_rows
    ),
    "a slot is added to rows without it": (
        Change(PROJECTION, "          if (coefficients.slots[first + i][j] != slot) continue;\n", "          if (coefficients.slots[first + i][j] > slot) continue;\n"),
        projection.test_mixed_rows,
    ),
    "the places beyond eight are read over those before": (
        Change(PROJECTION, "    if (place > 0) barrier();  // those before have been read\n", ""), projection.test_schedules_agree
    ),
    "absent places are added as zeros": (
        Change(PROJECTION, "      if (slot < 0) continue;\n", "      if (slot < 0) {\n        slots[r][j] = 1;\n        gates[r][j] = components[r][j] = 0.0f;\n        continue;\n      }\n"),
        projection.test_rows_without_a_concept,
    ),
    "one column too many is stored": (
        Change(PROJECTION, "store_eight(to, p.result.strides[2], x[i], there,", "store_eight(to, p.result.strides[2], x[i], there + 1,"),
        projection.test_nothing_is_written_outside,
    ),
    "the last part of the sum over O is left out": (
        Change(PROJECTION_BACKWARD, "split < plan.splits; ++split", "split + 1 < plan.splits; ++split"), projection_backward.test_splits
    ),
    "gradients of both sides have one sign": (Change(RANK_ONE, "sum[i] = side.sign * total", "sum[i] = total"), projection_backward.test_mixed_rows),
    "a slot's sum leaves out the last rows": (
        Change(RANK_ONE, "      for (int64_t t = warp(); t < p.T; t += rank_one_warps) {", "      for (int64_t t = warp(); t < p.T && b < 3; t += rank_one_warps) {"),
        projection_backward.test_mixed_rows,
    ),
    "the sums of eight places are overwritten before they are read": (
        Change(RANK_ONE, "    if (place > 0) barrier();  // the sums before have been read\n", ""), projection_backward.test_any_order
    ),
    "a gate's derivative is of the next slot": (
        Change(RANK_ONE, "load_columns(o, side.table, slot, x,", "load_columns(o, side.table, slot + 1 < p.S ? slot + 1 : slot, x,"), projection_backward.test_mixed_rows
    ),
    "a derivative looks an index out of range up": (
        Change(RANK_ONE, "bank_slot(index + (place + j) * p.index.strides[1], p.S, p.errors)", "load(index + (place + j) * p.index.strides[1])"),
        projection_backward.test_an_index_out_of_range_is_absent,
    ),
    "sides that share a gradient run apart": (
        Change(
            RANK_ONE,
            "p.side[block() % p.sides];\n  const int64_t tile = block() / p.sides, b",
            "p.side[block() / tiles / p.B];\n  const int64_t tile = block() % (tiles * p.B), b",
        ),
        projection_backward.test_sides_and_slots_share_the_gradient,
    ),
    "a head lands on another that is being read": (
        Change(ATTENTION, "    if (others) barrier();", "    if (others && plan.warps == 0) barrier();"), attention.test_stretches
    ),
    "a stretch goes on in the head before": (Change(ATTENTION, "++stretch.head, stretch.at = 0", "stretch.at = 0"), attention.test_stretches),
    "every row reads its own keys": (Change(ATTENTION, "p.key, row, h, T", "p.key, b, h, T"), attention.test_slots_and_regions),
    "slots are not looked at": (Change(ATTENTION, "if (slot >= 0 && slot < p.P) return slot;", "if (slot >= -1) return slot;"), attention.test_slots_and_regions),
    "positions without a region are seen by nobody": (
        Change(TILES, "if (key != 0 && (query", "if ((query"), attention.test_slots_and_regions
    ),
    "the regions of the row above": (Change(TILES, "of_row(8 * i + lane() / 4)", "of_row(8 * i + lane() / 8)"), attention.test_slots_and_regions),
    "a token with nothing left is not a number": (Change(TILES, "high == -infinity() ? 0.0f : high * scale", "high * scale"), attention.test_slots_and_regions),
    "what was summed before keeps its scale": (
        Change(TILES, "o[i][n][e] *= kept[i][e / 2];", "o[i][n][e] *= kept[i][e / 2] > 0.0f ? 1.0f : 0.0f;"), attention.test_long_contexts
    ),
    "words of other concepts keep their gates": (Change(GATES, "if (!own) return other ? 0.0f : gate;", "if (!own) return gate;"), gates.test_words),
    "the floor of the neighbour": (Change(GATES, "+ j * p.floor.strides[1])", "+ (j ? j - 1 : j) * p.floor.strides[1])"), gates.test_words),
    "the edit does not wait for the projection": (Change(FUSED, "    barrier();  // all warps have written K and V\n", ""), fused.test_mixed_rows),
    "rows that share a head's weights run apart": (
        Change(
            FUSED,
            "B = static_cast<int>(p.B), b = head % B, h = head / B;",
            "H = static_cast<int>(p.H), b = head / H, h = head % H;",
        ),
        fused.test_rows_share_weights,
    ),
    "another head's rows of a weight": (
        Change(FUSED, "+ h * d * weight.strides[0], d,", "+ (h ? h - 1 : h) * d * weight.strides[0], d,"), fused.test_mixed_rows
    ),
    "the second tile of tokens is the first": (
        Change(FUSED, "Tokens(encodings, first, 0), side", "Tokens(encodings, 0, 0), side"), fused.test_one_side_after_the_other
    ),
    "values are projected by the keys' weight": (
        Change(FUSED, "side == 0 ? key() : value(), wide, steps_of_sum", "side == 0 ? key() : key(), wide, steps_of_sum"), fused.test_one_side_after_the_other
    ),
    "a row of a weight goes on after D": (
        Change(FUSED, "d, static_cast<int>(D), weight", "d, static_cast<int>(D + 7) / 8 * 8, weight"), fused.test_a_width_within_longer_rows
    ),
    "blocks are counted without their waves": (
        Change("fused_edited_attention.cu", "const int64_t work = waves * (", "const int64_t work = (void(waves), 1) * ("), fused.test_no_other_share_is_cheaper
    ),
    "the last of many places is taken for absent": (Change(GATES, "return j < J ? bank_slot", "return j + 1 < J ? bank_slot"), gates.test_more_than_a_block_holds),
    "many places have the first one's bias": (
        Change(GATES, "parameters[j] : of_place(p.bias, j)", "parameters[j] : of_place(p.bias, 0)"), gates.test_more_than_a_block_holds
    ),
}  # fmt: skip
WIDTHS = (40, 96)  # of the heads that the checks have


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    change, check = MUTANTS[name]
    operator = check.__module__.rpartition("test_")[2]
    mutant = Host(build_module((*only_widths(*WIDTHS), replace(change, operator=operator))))
    with pytest.raises((AssertionError, Refused)) as killed:
        check(mutant)
    assert "no kernel for d" not in str(killed.value)  # which would be no fault of the mutant
