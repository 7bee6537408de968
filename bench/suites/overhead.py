"""Overhead of one eager call (bench/overhead.py), as rows. Nothing is computed, so there is no result to check."""

from collections.abc import Iterator
from typing import Any

from bench import overhead, rows
from bench.measure import Options


def measured(options: Options) -> Iterator[dict[str, Any]]:
    for found in overhead.overheads(**({"calls": 10, "rounds": 5} if options.quick else {})):
        yield {
            "suite": "overhead", "case": found["operator"], "provider": "eager call", "dtype": "float32", "shapes": {},
            **rows.provenance("cpu"), "load": rows.load(), "quick": options.quick, "gate": "nothing is computed", "clock": "wall",
            **{f"{key}_us": round(value, 3) for key, value in found.items() if key != "operator"},
        }  # fmt: skip
