"""What bench/predictions.jsonl says of the compiled kernels, chip by chip, beside rows of bench/run.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from bench import plans, roofline

FILE = Path(__file__).with_name("predictions.jsonl")
T = 77
KERNELS = {
    "attention": "edited_attention", "fused": "fused_edited_attention", "gates": "concept_gates", "projection": "edited_projection",
    "layer": "cross_attention_layer",
}  # fmt: skip
SIZES = {
    "edited_attention": ("N", "H", "d"), "fused_edited_attention": ("N", "H", "d", "D"), "concept_gates": ("D", "J"),
    "edited_projection": ("D", "O"), "fused_edited_projection": ("D", "O"),
    "cross_attention_layer": ("N", "C", "H", "d"), "edited_projection_backward": ("D", "O"),
}  # fmt: skip


@functools.cache
def _all() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines() if line.strip())


def read(chip: str) -> list[dict[str, Any]]:
    """The predictions for a chip, as it is called there: "H200"."""
    return [each for each in _all() if each["chip"] == chip]


def of(row: dict[str, Any]) -> dict[str, Any] | None:
    """The prediction for a measured row: of a compiled kernel in a graph, on a chip that was predicted; else None. Attention was
    predicted for keys that are edited already."""
    kernel, provider = KERNELS.get(row["suite"]), row["provider"]
    if kernel == "edited_projection" and " fused" in provider:
        kernel = "fused_edited_projection"
    shapes = row.get("shapes", {})
    if kernel is None or provider not in ("cuda graph", "cuda fused graph") or (kernel == "edited_attention" and shapes.get("J")):
        return None
    chip = plans.chip(row["device"])
    for each in read(chip) if chip else ():
        if each["kernel"] == kernel and each["rows"] == shapes.get("B") and all(each[name] == shapes.get(name) for name in SIZES[kernel]):
            return each
    return None


def work(each: dict[str, Any]) -> roofline.Work:
    """What a predicted call has to move and to compute."""
    sizes = {name: each[name] for name in SIZES[each["kernel"]]}
    if each["kernel"].endswith("projection"):
        return roofline.edited_projection(B=each["rows"], T=T, J=1, **sizes)
    more = dict(J=1) if each["kernel"] in ("fused_edited_attention", "edited_projection_backward") else {}
    return getattr(roofline, each["kernel"])(B=each["rows"], T=T, **sizes, **more)
