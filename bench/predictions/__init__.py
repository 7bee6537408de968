"""What time each kernel should take on each chip, before any GPU has run one: bench/predictions.jsonl, for the first run to judge.

    PYTHONPATH=.:python python -m bench.predictions      # writes the rows and the pages' tables anew; needs g++, for the plans; no GPU

`cuda` and `triton` make the rows, from launch plans, published rates (bench/chips.py) and assumptions (assumptions.py). No row is a speed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from bench import chips, roofline

FILE = Path(__file__).parents[1] / "predictions.jsonl"
T = 77
KERNELS = {  # suite of bench/run.py: what it measures
    "attention": "edited_attention", "fused": "fused_edited_attention", "gates": "concept_gates", "projection": "edited_projection",
    "layer": "cross_attention_layer",
}  # fmt: skip
SIZES = {
    "edited_attention": ("N", "H", "d", "J"), "fused_edited_attention": ("N", "H", "d", "D", "J"), "concept_gates": ("D", "J"),
    "edited_projection": ("D", "O", "J"), "fused_edited_projection": ("D", "O", "J"), "cross_attention_layer": ("N", "C", "H", "d"),
    "edited_attention_backward": ("N", "H", "d"), "concept_gates_backward": ("D", "J"), "edited_projection_backward": ("D", "O", "J"),
}  # fmt: skip


@functools.cache
def _all() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines() if line.strip())


def read(chip: str, backend: str | None = None) -> list[dict[str, Any]]:
    """The predictions for a chip, as it is called there: "H200"; backend: of "cuda" or "triton" alone."""
    return [each for each in _all() if each["chip"] == chip and backend in (None, each["backend"])]


def of(row: dict[str, Any]) -> dict[str, Any] | None:
    """The prediction for a measured row: of a kernel of ours in a graph, on a chip and of sizes that were predicted; else None."""
    kernel, (backend, _, form) = row.get("operator") or KERNELS.get(row["suite"]), row["provider"].partition(" ")
    if kernel == "edited_projection" and form == "fused graph":
        kernel, form = "fused_edited_projection", "graph"
    if kernel is None or form != "graph":
        return None
    shapes, chip = row.get("shapes", {}), chips.of_device(row["device"])
    for each in read(chip, backend) if chip else ():
        if each["kernel"] == kernel and each["rows"] == shapes.get("B") and all(each[name] == shapes.get(name) for name in SIZES[kernel]):
            return each
    return None


def work(each: dict[str, Any]) -> roofline.Work:
    """What a predicted call has to move and to compute."""
    sizes = {name: each[name] for name in SIZES[each["kernel"]]}
    return getattr(roofline, each["kernel"].replace("fused_edited_projection", "edited_projection"))(B=each["rows"], T=T, **sizes)
