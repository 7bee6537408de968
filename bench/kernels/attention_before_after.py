"""`edited_attention` before and after tiles of 32 rows and blocks that go on from head to head: what can be measured without a GPU.

    PYTHONPATH=.:python python bench/kernels/attention_before_after.py [--before COMMIT]     writes bench/results/edited_attention.md

Instructions and bytes of a warp's tile are counted in the disassembly for 9.0 of both commits' sources (nvcc, cuobjdump). Fill is the mean
work of a multiprocessor over that of the most loaded, from the launch plans of both commits' libraries (g++), for every cross-attention
layer of three UNets at 1 to 64 rows. Bank conflicts of matrix loads (ldmatrix) are counted while both commits' kernels run on the host,
for 32 and for 512 rows of queries; the earlier sources get today's counter, csrc/host/banks.h, and nothing else. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import tile_instructions  # noqa: E402
from nvcc_matrix import ROOT  # noqa: E402

from bench import plans  # noqa: E402

PAGE = ROOT / "bench" / "results" / "edited_attention.md"
BEFORE = "25cfc7d"  # the last commit with tiles of 16 rows alone, and whole blocks of one head
WIDTHS = [40, 64, 80, 160]
CHIPS = ("A100", "RTX 4090", "H100", "B200")
QUERIES = (32, 512)  # with tiles of 16 rows and of 32 rows on one multiprocessor
# What gives the host layer of that commit today's counter: (file, text, text with the counter).
COUNTER = (
    ("csrc/host/block.h", "uint64_t products = 0;", "uint64_t matrices = 0, matrix_cycles = 0, products = 0;"),
    (
        "csrc/host/block.h",
        "exchange_matrices(uint32_t* r, const uint16_t* row, int",
        "exchange_matrices(uint32_t* r, const uint16_t* row, const void* address, int",
    ),
    ("csrc/host/layer.h", "exchange_matrices(r, elements, matrices", "exchange_matrices(r, elements, row, matrices"),
    ("csrc/host/warp.cpp", '#include "run.h"', '#include "banks.h"\n#include "run.h"'),
    (
        "csrc/host/warp.cpp",
        "exchange_matrices(uint32_t* r, const uint16_t* row, int matrices, bool transposed) {",
        "exchange_matrices(uint32_t* r, const uint16_t* row, const void* address, int matrices, bool transposed) {",
    ),
    ("csrc/host/warp.cpp", "    const uint16_t* row;\n  };", "    const uint16_t* row;\n    const void* address;\n  };"),
    (
        "csrc/host/warp.cpp",
        "Operand{r, row}, [=](const Operand* const* lanes) {\n",
        """Operand{r, row, address}, [=](const Operand* const* lanes) {
    for (int m = 0; m < matrices; ++m) {
      machine().matrices += 1, machine().matrix_cycles += cycles_of_matrix([=](int i) { return lanes[8 * m + i]->address; });
    }
""",
    ),
    (
        "tests/cuda_host/binding.cpp",
        '  result["products"] = machine.products;\n',
        """  result["products"] = machine.products;
  result["matrices"] = machine.matrices;
  result["matrix_cycles"] = machine.matrix_cycles;
""",
    ),
)
OLD_PLANS = """
import json, sys, torch
from tests.cuda_host.build import build_module
from tests.cuda_host.host import Host, attention_call, described
host, found = Host(build_module()), []
for machine, (B, N, T, H, d) in json.load(sys.stdin):
    host.configure(machine[0], machine[1], shared_per_multiprocessor=machine[2])
    one = torch.empty(1, dtype=torch.half)
    query, key = one.expand(B, N, H, d), one.expand(B, T, H, d)
    sizes, given = attention_call(dict(query=query, key=key, value=key), query)
    found.append(host.module.plan_edited_attention(sizes, described(given)))
json.dump(found, sys.stdout)
"""
OLD_CONFLICTS = """
import json, sys, torch
from tests.cuda_host.build import build_module
from tests.cuda_host.host import Host
host, found = Host(build_module()), []
for d, N, T in json.load(sys.stdin):
    host.configure(1)
    query, key = torch.ones(1, N, 1, d).half(), torch.ones(1, T, 1, d).half()
    assert torch.equal(host.edited_attention(query=query, key=key, value=key), query)
    found.append([host.counted()[name] for name in ("matrices", "matrix_cycles")])
json.dump(found, sys.stdout)
"""


def every(chips: tuple[str, ...] = CHIPS) -> list[tuple]:
    return [(chip, layer, rows) for chip in chips for layer in plans.layers() for rows in plans.ROWS]


def count_conflicts(folder: Path) -> None:
    """Gives the sources in `folder`, of the earlier commit, the counter of bank conflicts."""
    shutil.copy(ROOT / "csrc" / "host" / "banks.h", folder / "csrc" / "host")
    for file, old, new in COUNTER:
        text = (folder / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{file} has {text.count(old)} times, where the counter needs it once: {old}")
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")


def ask(folder: Path, script: str, calls: list) -> list:
    """What the script in that folder answers, in JSON."""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=folder, input=json.dumps(calls), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


def plans_before(folder: Path) -> dict[tuple, plans.Plan]:
    """(chip, layer, rows) -> the plan of the library whose sources are in `folder`."""
    calls = []
    for chip, layer, rows in every():
        one = plans.CHIPS[chip]
        machine = one.multiprocessors, one.shared_per_block, one.shared_per_multiprocessor
        calls.append((machine, (rows, layer.N, plans.T, layer.H, layer.d)))
    found = {}
    for (chip, layer, rows), made in zip(every(), ask(folder, OLD_PLANS, calls), strict=True):
        blocks = rows * layer.H * made["splits"]
        found[chip, layer, rows] = plans.Plan(chip, layer, rows, made["warps"], 1, made["stages"], made["splits"], blocks, 0, made["bytes"])
    return found


def fills(host, before: dict[tuple, plans.Plan]) -> dict[tuple, tuple[float, float]]:
    return {key: (before[key].fill(), plans.plan(host, *key).fill()) for key in every()}


def fill_table(found: dict[tuple, tuple[float, float]], chip: str) -> list[str]:
    """A line for each layer, "before → after" for each number of rows."""
    lines = ["| layer | " + " | ".join(_rows(rows) for rows in plans.ROWS) + " |", "|---|" + "---|" * len(plans.ROWS)]
    for layer in plans.layers():
        cells = ("{:.2f} → {:.2f}".format(*found[chip, layer, rows]) for rows in plans.ROWS)
        lines.append(f"| N = {layer.N}, {layer.H} heads of {layer.d} | " + " | ".join(cells) + " |")
    return lines


Conflicts = dict[tuple[int, int], tuple[int, int]]  # (head width, rows of queries) -> 8 x 8 matrices loaded, cycles: 1 each at best


def conflicts_before(folder: Path) -> Conflicts:
    calls = [(d, N, plans.T) for d in WIDTHS for N in QUERIES]
    return {(d, N): tuple(counted) for (d, N, _), counted in zip(calls, ask(folder, OLD_CONFLICTS, calls), strict=True)}


def conflicts(host) -> Conflicts:
    found = {}
    for d in WIDTHS:
        for N in QUERIES:
            host.configure(1)
            query, key = torch.ones(1, N, 1, d).half(), torch.ones(1, plans.T, 1, d).half()
            host.edited_attention(query=query, key=key, value=key)
            counted = host.counted()
            found[d, N] = counted["matrices"], counted["matrix_cycles"]
    return found


def conflict_rows(before: Conflicts, now: Conflicts) -> list[str]:
    def cell(counted: tuple[int, int]) -> str:
        return f"{counted[1] / counted[0]:.2f}, {counted[0]:,}"

    what = "cycles of an 8 x 8 matrix loaded, and matrices, for {} rows of heads of {}"
    return [f"| {what.format(N, d)} | {cell(before[d, N])} | {cell(now[d, N])} |" for d, N in now]


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def mean(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def summary(before: list[list[int]], now: list[list[int]], loads: list[str], found: dict[tuple, tuple[float, float]]) -> list[str]:
    """The table of all; `loads`: the rows of matrix loads. Instructions are of the largest tiles, which layers of many tokens use."""
    lines = ["| | before | now |", "|---|---|---|"]
    for title in ("all", "tensor", "float", "integer and control", "bytes, shared", "bytes, global"):
        at = tile_instructions.TITLES.index(title)
        for d in WIDTHS:
            old, new = (max((row for row in rows if row[0] == d), key=lambda row: row[1])[at] for rows in (before, now))
            what = title if title.startswith("bytes") else f"instructions, {title}"
            lines.append(f"| {what}, for 16 rows of heads of {d} | {old:,} | {new:,} |")
    lines += loads
    for chip in CHIPS:
        for rows in plans.ROWS:
            cells = [found[chip, layer, rows] for layer in plans.layers()]
            old, new = zip(*cells)
            lines.append(
                f"| fill of {chip} at {_rows(rows)}, mean and least over the layers "
                f"| {mean(old):.2f}, {min(old):.2f} | {mean(new):.2f}, {min(new):.2f} |"
            )
    return lines


def worse(found: dict[tuple, tuple[float, float]]) -> list[str]:
    """What lost more than a twentieth of its fill, by chip."""
    lines = []
    for chip in CHIPS:
        lost = [
            f"N = {layer.N}, {layer.H} heads of {layer.d}, {_rows(rows)} ({old:.2f} → {new:.2f})"
            for (each, layer, rows), (old, new) in found.items()
            if each == chip and new < old - 0.05
        ]
        lines.append(f"- {chip}: {'; '.join(lost) or 'nothing'}.")
    return lines


def instruction_table(before: list[list[int]], now: list[list[int]]) -> list[str]:
    lines = ["| " + " | ".join(("sources", *tile_instructions.TITLES)) + " |", "|" + "---|" * (len(tile_instructions.TITLES) + 1)]
    found = sorted([*(("before", row) for row in before), *(("now", row) for row in now)], key=lambda row: (row[1][0], row))
    return lines + ["| " + " | ".join([name, *(f"{cell:,}" for cell in row)]) + " |" for name, row in found]


def main() -> None:
    from tests.cuda_host.build import build_module
    from tests.cuda_host.host import Host

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT")
    commit = parser.parse_args().before
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        count_conflicts(Path(folder))
        old_plans, old_conflicts = plans_before(Path(folder)), conflicts_before(Path(folder))
        before = tile_instructions.rows(Path(folder, "csrc"), "90", WIDTHS)
    now, host = tile_instructions.rows(ROOT / "csrc", "90", WIDTHS), Host(build_module())
    found = fills(host, old_plans)
    page = ["# `edited_attention`, before and after", "", *__doc__.split("\n\n")[2].strip().split("\n")]
    page += ["", f"Before is commit {commit}. A row of 77 keys; code, in which a loop inside counts once.", ""]
    page += summary(before, now, conflict_rows(old_conflicts, conflicts(host)), found)
    page += ["", "Tiles of 32 rows halve what a row of queries costs in loads, and are half as many: where a call has few, they fill a"]
    page += ["chip less evenly. More than 0.05 lost:", ""]
    page += worse(found)
    page += ["", "## A warp's tile", "", "For each 16 rows. Tiles of 16 rows are taken where tiles of 32 would be too few.", ""]
    page += instruction_table(before, now)
    page += ["", "## Fill of each layer"]
    for chip in CHIPS:
        page += ["", f"### {chip}", "", *fill_table(found, chip)]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
