"""A predicted call as a row of bench/predictions.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.chips import CHIPS
from bench.predictions.assumptions import LATENCY
from bench.roofline import Work


def row(
    backend: str, kernel: str, chip: str, facts: Mapping[str, Any], launches: Sequence[Mapping[str, float]], work: Work,
    before: Mapping[str, float] = {},
) -> dict[str, Any]:
    """launches: of each, one after the other, seconds by what may bound it, of which the longest counts. before: seconds of phases that
    nothing hides. `of_floor` is the roofline, `work` on this chip, over the predicted time; `bound` names the longest part."""
    parts = [*(max(launch.items(), key=lambda part: part[1]) for launch in launches), *before.items()]
    seconds = sum(each for _, each in parts) + len(launches) * LATENCY
    bound = max(parts, key=lambda part: part[1])[0]
    found = {"bound": bound, "microseconds": round(1e6 * seconds, 2), "of_floor": round(CHIPS[chip].floor(work) / seconds, 3)}
    return {"backend": backend, "kernel": kernel, "chip": chip, **facts, **found, "measured": False}
