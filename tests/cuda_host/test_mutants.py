"""Deliberate faults in the kernels, each of which a named check must find. A check that passes on a mutant is no check."""

import pytest

from . import test_concept_gates as gates
from . import test_edited_attention as attention
from .build import Change, build_module, only_widths
from .host import Host, Refused

ATTENTION, TILES, EDIT, STREAM, GATES = (
    f"{name}.cuh" for name in ("edited_attention", "attention_tiles", "edited_tiles", "query_stream", "concept_gates")
)
MUTANTS = {
    "the barrier after K and V is gone": (
        Change(ATTENTION, "  wait_for_copies<0>();\n  barrier();\n", "  wait_for_copies<0>();\n"), attention.check_long_streams
    ),
    "the mask lets one key too many in": (
        Change(TILES, "8 * n + first + e % 2 < T ?", "8 * n + first + e % 2 <= T ?"), attention.check_short_last_group
    ),
    "the maximum is of half a row": (
        Change(TILES, "    high[r] = maximum(high[r], shuffle_xor(high[r], 2));\n", ""), attention.check_mixed_rows
    ),
    "the sum is of the wrong lanes": (
        Change(TILES, "    sum[r] += shuffle_xor(sum[r], 2);\n", "    sum[r] += shuffle_xor(sum[r], 4);\n"), attention.check_mixed_rows
    ),
    "the next tile lands on this one": (
        Change(STREAM, "load(which ^ 1, tile + step)", "load(which, tile + step)"), attention.check_long_streams
    ),
    "a stage is read before it has landed": (
        Change(STREAM, "        commit_copies();\n        wait_for_copies<1>();\n", "        commit_copies();\n        wait_for_copies<2>();\n"),
        attention.check_long_streams,
    ),
    "the stage is never changed": (Change(STREAM, "        which ^= 1;\n", "        which ^= 0;\n"), attention.check_long_streams),
    "gates of the neighbour's concept": (
        Change(EDIT, "p.gates.strides[1] + j * p.gates", "p.gates.strides[1] + (j ? j - 1 : 0) * p.gates"), attention.check_mixed_rows
    ),
    "edits of the first row's concepts": (
        Change(EDIT, "static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];\n  const auto* gates",
               "static_cast<const int32_t*>(p.index.data) + p.index.strides[0];\n  const auto* gates"), attention.check_mixed_rows
    ),
    "components are added": (Change(EDIT, "g * o[i] - a * w[i]", "g * o[i] + a * w[i]"), attention.check_mixed_rows),
    "one token too many is written": (
        Change(STREAM, "    if (n >= N) continue;\n", "    if (n > N) continue;\n"), attention.check_nothing_is_written_outside
    ),
    "halves of the left operand exchanged": (
        Change(TILES, "load_matrices(a, queries + l % 16 * pitch + k + l / 16 * 8)", "load_matrices(a, queries + l % 16 * pitch + k + (1 - l / 16) * 8)"),
        attention.check_mixed_rows,
    ),
    "the last 8 columns of a head are left out": (
        Change(TILES, "load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 8)", "load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 16)"),
        attention.check_mixed_rows,
    ),
    "another head's edit": (Change(EDIT, "column, t + r < T ? 8 : 0, wide);\n    }\n    add_edit(x, p, b, t, h * d + piece * 8",
               "column, t + r < T ? 8 : 0, wide);\n    }\n    add_edit(x, p, b, t, piece * 8"), attention.check_mixed_rows),
    "rows are divided by another's energy": (
        Change(GATES, "system[i] /= energies[i / J]", "system[i] /= energies[i % J]"), gates.check_mixed_rows
    ),
    "approximate components": (Change(GATES, "if (j < J) c[t][j] -= system[j * J + k] * c[t][k];", "(void)k;"), gates.check_mixed_rows),
    "the factors are read too early": (
        Change(GATES, "      system[i * J + k] -= system[i * J + j] * system[j * J + k];\n    }\n    barrier();\n",
               "      system[i * J + k] -= system[i * J + j] * system[j * J + k];\n    }\n"), gates.check_any_order
    ),
    "another place's temperature": (
        Change(GATES, "p.temperature.strides[0] +\n                                         (place + j)", "p.temperature.strides[0] +\n                                         (place + (j ? j - 1 : 1))"),
        gates.check_mixed_rows,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    change, check = MUTANTS[name]
    mutant = Host(build_module((*only_widths(40), change)))
    with pytest.raises((AssertionError, Refused)):
        check(mutant)
