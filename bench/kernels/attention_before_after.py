"""`edited_attention` before and after tiles of 32 rows and stretches over heads, by all that shows without a GPU.

    PYTHONPATH=.:python python bench/kernels/attention_before_after.py [--before COMMIT]     writes bench/results/edited_attention.md

Instructions and bytes of a warp's tile from the disassembly for 9.0, of both commits' sources (nvcc, cuobjdump); how evenly the plans
fill each chip, for every cross-attention layer of three UNets at 1 to 64 rows; and bank conflicts of matrix loads, counted by the run
on the host (g++). Nothing here is a time.
"""

from __future__ import annotations

import argparse
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


def before(plan: plans.Plan) -> plans.Plan:
    """As many parts of a head as fit at once, and another wave where there are more heads than that."""
    useful = -(-plan.of_head // plan.warps)
    splits = max(1, min(useful, plan.at_once // plan.heads))
    return plans.replace(plan, splits=splits, blocks=plan.heads * splits)


def fills(host, chip: str) -> list[str]:
    """A line for each layer, "before → after" for each number of rows. `before` has tiles of 16 rows."""
    lines = ["| layer | " + " | ".join(f"{rows} rows" for rows in plans.ROWS) + " |", "|---|" + "---|" * len(plans.ROWS)]
    for layer in plans.layers():
        cells = []
        for rows in plans.ROWS:
            now = plans.plan(host, chip, layer, rows)
            cells.append(f"{before(plans.plan(host, chip, layer, rows, tall=False)).fill():.2f} → {now.fill():.2f}")
        lines.append(f"| N = {layer.N}, {layer.H} heads of {layer.d} | " + " | ".join(cells) + " |")
    return lines


def conflicts(host) -> list[str]:
    """Shared-memory cycles of 8 x 8 matrices loaded, over their number: 1 without a conflict."""
    lines = ["| head width | rows of a tile | matrices | cycles |", "|---|---|---|---|"]
    for d in WIDTHS:
        for N, multiprocessors in ((32, 1), (512, 1)):
            host.configure(multiprocessors)
            q, k = torch.randn(1, N, 1, d).half(), torch.randn(1, plans.T, 1, d).half()
            tensors = dict(query=q, key=k, value=k)
            rows = 16 * host.planned("edited_attention", tensors)["m"]
            host.edited_attention(**tensors)
            counted = host.counted()
            lines.append(f"| {d} | {rows} | {counted['matrices']:,} | {counted['matrix_cycles']:,} |")
    return list(dict.fromkeys(lines))


def instructions(commit: str) -> list[str]:
    titles = ("sources", *tile_instructions.TITLES)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "csrc"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        found = [("before", row) for row in tile_instructions.rows(Path(folder, "csrc"), "90", WIDTHS)]
    found += [("now", row) for row in tile_instructions.rows(ROOT / "csrc", "90", WIDTHS)]
    found.sort(key=lambda row: (row[1][0], row))
    return lines + ["| " + " | ".join([name, *(f"{cell:,}" for cell in row)]) + " |" for name, row in found]


def main() -> None:
    from tests.cuda_host.build import build_module
    from tests.cuda_host.host import Host

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT")
    commit = parser.parse_args().before
    host = Host(build_module())
    page = ["# `edited_attention`, before and after", "", *__doc__.split("\n\n")[2].strip().split("\n")]
    page += ["", "## A warp's tile", ""]
    page += [f"For each 16 rows of 77 keys; before is commit {commit}. Code, in which a loop inside counts once."]
    page += ["", *instructions(commit), ""]
    page += ["## Fill", "", "Mean work of a multiprocessor over that of the busiest."]
    for chip in CHIPS:
        page += ["", f"### {chip}", "", *fills(host, chip)]
    page += ["", "## Bank conflicts", "", "Now; the rows of shared memory are as far apart as before.", "", *conflicts(host)]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
