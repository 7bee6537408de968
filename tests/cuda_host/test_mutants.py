"""Deliberate faults in the kernels, each of which must be found: by the sweep, or by a check that looks at what no result shows."""

from functools import partial

import pytest

from . import test_concept_gates as gates
from . import test_edited_attention as attention
from . import test_edited_projection as projection
from . import test_edited_projection_backward as projection_backward
from . import test_fused_edited_attention as fused
from . import test_operators as operators
from .build import Change, build_module, only_widths
from .host import Host, Refused
from .sweep import SCHEDULES, concerned, sweep

# By file: the fault; the source text, which occurs once; its replacement.
MUTANTS = {
    "edited_attention.cuh": {
        "memory is read while the kernel before may still run": ("  wait_for_previous_kernel();\n", ""),
        "the barrier after K and V is gone": ("    wait_for_copies<0>();\n    barrier();\n", "    wait_for_copies<0>();\n"),
        "queries land on an edit that is being read": (
            "      edit.apply(keys, values);\n      barrier();\n",
            "      edit.apply(keys, values);\n",
        ),
        "a head lands on another that is being read": ("    if (later) barrier();", "    if (later && plan.warps == 0) barrier();"),
        "a range of tiles stays in its first head": ("++range.head, range.tile = 0", "range.tile = 0"),
        "every row reads its own keys": ("p.key, row, h, T", "p.key, b, h, T"),
        "slots are not looked at": ("if (slot >= 0 && slot < p.P) return slot;", "if (slot >= -1) return slot;"),
    },
    "attention_tiles.cuh": {
        "the mask lets one key too many in": ("8 * last + first + e % 2 < T ?", "8 * last + first + e % 2 <= T ?"),
        "the maximum is of half a row": ("      high = maximum(high, shuffle_xor(high, 2));\n", ""),
        "the sum is of the wrong lanes": ("    all += shuffle_xor(all, 2);\n", "    all += shuffle_xor(all, 4);\n"),
        "halves of the left operand exchanged": ("* pitch + k + l / 16 * 8);", "* pitch + k + (1 - l / 16) * 8);"),
        "the last 8 columns of a head are left out": (
            "load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 8)",
            "load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 16)",
        ),
        "positions without a region are masked": ("if (key != 0 && (query", "if ((query"),
        "the regions of the row above": ("of_row(8 * i + lane() / 4)", "of_row(8 * i + lane() / 8)"),
        "a token with nothing left is not a number": ("high == -infinity() ? 0.0f : high * scale", "high * scale"),
        "what was summed before keeps its scale": (
            "o[i][n][e] *= rescale[i][e / 2];",
            "o[i][n][e] *= rescale[i][e / 2] > 0.0f ? 1.0f : 0.0f;",
        ),
    },
    "query_stream.cuh": {
        "the next tile lands on this one": ("load(which ^ 1, tile + plan.warps)", "load(which, tile + plan.warps)"),
        "a stage is read before it has landed": (
            "        commit_copies();\n        wait_for_copies<1>();\n",
            "        commit_copies();\n        wait_for_copies<2>();\n",
        ),
        "the stage is never changed": ("        which ^= 1;\n", "        which ^= 0;\n"),
        "one token too many is written": ("    if (n >= N) continue;\n", "    if (n > N) continue;\n"),
    },
    "edited_tiles.cuh": {
        "gates of the neighbour's concept": (
            "p.gates.strides[1] + (place + j) * p.gates",
            "p.gates.strides[1] + (j ? j - 1 : 0) * p.gates",
        ),
        "edits of the first row's concepts": ("+ b * p.index.strides[0];\n    if (thread()", "+ p.index.strides[0];\n    if (thread()"),
        "components are added": ("g[r] * o[e] - a[r] * w[e]", "g[r] * o[e] + a[r] * w[e]"),
        "another head's edit": ("column(h * d)", "column(0 * h)"),
        "values are edited by the keys' tables": ("table = side == 0 ?", "table = side >= 0 ?"),
        "concepts are edited before they are there": (
            "          load_places(place);\n          barrier();\n",
            "          load_places(place);\n",
        ),
        "concepts give way before they are edited": ("          barrier();  // all threads have read the previous group\n", ""),
    },
    "device/memory.cuh": {"rows of shared memory meet in a bank": ("return (columns / 8 | 1) * 8;", "return columns / 8 * 8;")},
    "concept_gates.cuh": {
        "rows are divided by another's energy": ("system[i] /= energies[i / J]", "system[i] /= energies[i % J]"),
        "approximate components": (
            "      for (int k = 0; k < j; ++k) c[j] -= system[j * J + k] * c[k];\n",
            "      for (int k = 0; k < j; ++k) (void)k;\n",
        ),
        "the factors are read too early": (
            "      system[i * J + k] -= system[i * J + j] * system[j * J + k];\n    }\n    barrier();\n",
            "      system[i * J + k] -= system[i * J + j] * system[j * J + k];\n    }\n",
        ),
        "another place's temperature": ("parameters[J + j]", "parameters[J + (j ? j - 1 : 1)]"),
        "biases are read before they stand there": ("columns[i] /= energies[i % J];\n  barrier();\n", "columns[i] /= energies[i % J];\n"),
        "slots are read before they stand there": (
            "of_place(p.temperature, thread());\n    barrier();\n",
            "of_place(p.temperature, thread());\n",
        ),
        "the sum of all warps but one": ("for (int w = 0; w < Products::warps; ++w)", "for (int w = 0; w + 1 < Products::warps; ++w)"),
        "sums are added before all warps have theirs": ("place, other);\n      barrier();\n", "place, other);\n"),
        "the next places' products land on sums that are still to be added": (
            "      }\n      barrier();\n    }\n  }\n",
            "      }\n    }\n  }\n",
        ),
        "products with targets that are not there": ("slots[j] >= 0 && slots[k] >= 0 ? sum : j == k ? 1.0f : 0.0f", "sum"),
        "words of other concepts keep their gates": ("if (!own) return other ? 0.0f : gate;", "if (!own) return gate;"),
        "the floor of the neighbour": ("+ j * p.floor.strides[1])", "+ (j ? j - 1 : j) * p.floor.strides[1])"),
        "the last of many places is taken for absent": ("return j < J ? bank_slot", "return j + 1 < J ? bank_slot"),
        "many places have the first one's bias": ("parameters[j] : of_place(p.bias, j)", "parameters[j] : of_place(p.bias, 0)"),
    },
    "concept_gates_products.cuh": {
        "metric targets are read before they stand there": ("      warp_barrier();\n      load_slice(", "      load_slice("),
        "the next slice's metric targets land on those being read": (
            "      warp_barrier();  // all lanes have read the metric targets\n",
            "",
        ),
        "the next slice is the one after": ("load_slice(next, column + step);", "load_slice(next, column + 2 * step);"),
        "halves of a metric target exchanged": (
            "{{shared[j * 2 * group_lanes], shared[(j * 2 + 1) * group_lanes]}}",
            "{{shared[(j * 2 + 1) * group_lanes], shared[j * 2 * group_lanes]}}",
        ),
        "the last columns of a slice are read to the end of 16 bytes": ("count >= 8 || count <= 0", "true"),
        "tokens behind the last": ("other == 0 && t < T ? t : -1", "other == 0 && t <= T ? t : -1"),
    },
    "device/warp.cuh": {
        "the sum of a neighbour's place": (
            "(upper ? x[i + half] : x[i]) + shuffle_xor(given, mask)",
            "(upper ? x[i] : x[i + half]) + shuffle_xor(given, mask)",
        ),
    },
    "matrix_product.cuh": {
        "a step of the product lands on the one being read": (
            "written = written + stage == all ? 0 : written + stage;",
            "written = written + stage == all ? stage : written + stage;",
        ),
        "no barrier between two steps of the product": (
            "    wait_for_copies<Tile::stages - 2>();\n    barrier();\n",
            "    wait_for_copies<Tile::stages - 2>();\n",
        ),
        "the last copy of a row is always whole": ("columns_left < 8 ? columns_left : 8;", "8;"),
        "halves of the right operand exchanged": (
            "l / 16 * 8 + l % 8) * pitch + k + l / 8 % 2 * 8)",
            "l / 16 * 8 + l % 8) * pitch + k + (1 - l / 8 % 2) * 8)",
        ),
    },
    "edited_projection.cuh": {
        "each concept's edit is rounded by itself": (
            "x[i][e] = x[i][e] + g * o[e] - a * w[e];",
            "x[i][e] += to_float(Element{static_cast<uint16_t>(pack<Element>(g * o[e] - a * w[e], 0.0f))});",
        ),
        "the concepts of the tile's first row": ("const int64_t b = (row + r) / T, t", "const int64_t b = row / T, t"),
        "a slot is added to rows without it": (
            "          if (coefficients.slots[first + i][j] != slot) continue;\n",
            "          if (coefficients.slots[first + i][j] > slot) continue;\n",
        ),
        "the places beyond eight are read over those before": (
            "    if (place > 0) barrier();  // all threads have read the previous places\n",
            "",
        ),
        "absent places are added as zeros": (
            "      if (slot < 0) continue;\n",
            "      if (slot < 0) {\n        slots[r][j] = 1;\n        gates[r][j] = components[r][j] = 0.0f;\n        continue;\n      }\n",
        ),
        "one column too many is stored": (
            "store_eight(to, p.result.strides[2], x[i], there,",
            "store_eight(to, p.result.strides[2], x[i], there + 1,",
        ),
    },
    "edited_projection_backward.cuh": {
        "the last part of the sum over O is left out": ("split < plan.splits; ++split", "split + 1 < plan.splits; ++split"),
    },
    "rank_one_backward.cuh": {
        "gradients of both sides have one sign": ("sum[i] = side.sign * total", "sum[i] = total"),
        "a slot's sum leaves out the last rows": (
            "      for (int64_t t = warp(); t < p.T; t += rank_one_warps) {",
            "      for (int64_t t = warp(); t < p.T && b < 2; t += rank_one_warps) {",
        ),
        "the sums of eight places are overwritten before they are read": (
            "    if (place > 0) barrier();  // all threads have read the previous sums\n",
            "",
        ),
        "a gate's derivative is of the next slot": (
            "load_columns(o, side.table, slot, x,",
            "load_columns(o, side.table, slot + 1 < p.S ? slot + 1 : slot, x,",
        ),
        "a derivative looks an index out of range up": (
            "bank_slot(index + (place + j) * p.index.strides[1], p.S, p.errors)",
            "load(index + (place + j) * p.index.strides[1])",
        ),
        "a table's derivative does not see an index out of range": (
            "bank_slot(index + b * p.index.strides[0] + j * p.index.strides[1], p.S, p.errors)",
            "load(index + b * p.index.strides[0] + j * p.index.strides[1])",
        ),
        "sides that share a gradient run apart": (
            "p.side[block() % p.sides];\n  const int64_t tile = block() / p.sides, b",
            "p.side[block() / tiles / p.B];\n  const int64_t tile = block() % (tiles * p.B), b",
        ),
    },
    "fused_edited_attention.cuh": {
        "the edit does not wait for the projection": ("    barrier();  // all warps have written K and V\n", ""),
        "rows that share a head's weights run apart": (
            "B = static_cast<int>(p.B), b = head % B, h = head / B;",
            "H = static_cast<int>(p.H), b = head / H, h = head % H;",
        ),
        "another head's rows of a weight": ("+ h * d * weight.strides[0], d,", "+ (h ? h - 1 : h) * d * weight.strides[0], d,"),
        "the second tile of tokens is the first": ("Tokens(encodings, first, 0), side", "Tokens(encodings, 0, 0), side"),
        "values are projected by the keys' weight": (
            "side == 0 ? key() : value(), wide, steps_of_sum",
            "side == 0 ? key() : key(), wide, steps_of_sum",
        ),
        "a row of a weight goes on after D": ("d, static_cast<int>(D), weight", "d, static_cast<int>(D + 7) / 8 * 8, weight"),
    },
    "fused_edited_attention.cu": {
        "blocks are counted without their waves": ("const int64_t work = waves * (", "const int64_t work = (void(waves), 1) * ("),
    },
}  # fmt: skip
CHECKS = {  # of bits, bytes and order, or at another head width
    "rows of shared memory meet in a bank": partial(attention.test_no_two_rows_of_a_matrix_share_a_bank, d=96),
    "tokens behind the last": gates.test_nothing_else_is_read,
    "each concept's edit is rounded by itself": projection.test_rounded_once_more,
    "absent places are added as zeros": projection.test_rows_without_a_concept,
    "the sums of eight places are overwritten before they are read": partial(operators.test_schedules_agree, operator="edited_projection_backward"),
    "sides that share a gradient run apart": projection_backward.test_sides_and_slots_share_the_gradient,
    "rows that share a head's weights run apart": fused.test_rows_share_weights,
    "the second tile of tokens is the first": fused.test_one_side_after_the_other,
    "values are projected by the keys' weight": fused.test_one_side_after_the_other,
    "blocks are counted without their waves": fused.test_no_other_share_is_cheaper,
}
OPERATORS = {  # whose sources alone see a change of the file: the others need not be compiled again
    **dict.fromkeys(
        ("edited_attention.cuh", "attention_tiles.cuh", "query_stream.cuh", "edited_tiles.cuh", "device/memory.cuh"), "edited_attention"
    ),
    **dict.fromkeys(("fused_edited_attention.cuh", "fused_edited_attention.cu"), "fused_edited_attention"),
    **dict.fromkeys(("concept_gates.cuh", "concept_gates_products.cuh", "device/warp.cuh"), "concept_gates"),
    **dict.fromkeys(("edited_projection.cuh", "matrix_product.cuh"), "edited_projection"),
    **dict.fromkeys(("edited_projection_backward.cuh", "rank_one_backward.cuh"), "edited_projection_backward"),
}
WIDTHS = (40, 96)  # of the heads that the checks have


def test_every_check_has_its_mutant():
    assert CHECKS.keys() <= {name for faults in MUTANTS.values() for name in faults}


@pytest.mark.parametrize("file, name", [(file, name) for file, faults in MUTANTS.items() for name in faults])
def test_a_mutant_is_killed(file, name):
    change = Change(file, *MUTANTS[file][name], operator=OPERATORS[file])
    if name not in CHECKS:
        runs = (sweep(*concerned(change.operator), changes=(change,), multiprocessors=m, order=o) for m, o in zip(SCHEDULES, "012"))
        assert any(ran.returncode for ran in runs), "the sweep finds nothing"
        return
    mutant = Host(build_module((*only_widths(*WIDTHS), change)))
    with pytest.raises((AssertionError, Refused)) as killed:
        CHECKS[name](mutant)
    assert "no kernel for d" not in str(killed.value)  # which would be no fault of the mutant
