"""The table of choices that the package ships, made from rows of bench/run.py and nothing else.

    python bench/choices.py bench/results/h200.jsonl          # into perfusion_kernels/choices.json and docs/benchmarks.md
    python bench/choices.py                                   # the page's table anew
    python bench/choices.py --out FOLDER rows.jsonl           # FOLDER/choices.json and choices.md, from these rows alone

A row decides where its gate passed, on a GPU, in full size. The compiled `edited_projection` must need at most 0.97 of the
time of the expert's product and `baddbmm`, and of what runs by default, with every number of concepts that was measured; an
absorbed layer the same of the plain one, each on the backend that runs by default. A shape that was measured twice counts
as it was the last time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.rows import read  # noqa: E402
from perfusion_kernels import choices  # noqa: E402
from perfusion_kernels.backend import ORDER  # noqa: E402
from perfusion_kernels.choices import Choice  # noqa: E402

OPERATORS = {"projection": "edited_projection", "layer": "cross_attention_layer"}  # by suite
PAGE = ROOT / "docs" / "benchmarks.md"
PLACE = re.compile(r"(<!-- choices -->\n).*?(<!-- end of choices -->)", re.DOTALL)
NONE = (
    "Nothing has been measured on a GPU, so the table is empty: the library's product and the plain layer are taken at every shape,\n"
    "unless somebody measured on a machine of their own."
)

Rows = Mapping[str, Mapping[str, Any]]  # by provider


def decided(rows: Sequence[Mapping[str, Any]]) -> dict[tuple, Choice | str]:
    """By shape, the choice that the rows make, or why they make none. ValueError: rows that say nothing about a GPU."""
    shapes: dict[tuple, dict[int, dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        if row["suite"] not in OPERATORS:
            continue
        if row["device"] == "cpu" or row["quick"]:
            what = "a CPU" if row["device"] == "cpu" else "small shapes (--quick)"
            raise ValueError(f"the shipped table is for GPUs, from full measurements; got a row of {what}: {row['suite']}, {row['case']}")
        operator = OPERATORS[row["suite"]]
        key = row["device"], operator, row["dtype"], tuple(row["shapes"][letter] for letter in choices.SIZES[operator])
        shapes.setdefault(key, {}).setdefault(row["shapes"].get("J", 0), {})[row["provider"]] = row
    return {key: _decision(key, list(cases.values())) for key, cases in shapes.items()}


def _decision(key: tuple, cases: list[Rows]) -> Choice | str:
    """cases: those of one shape, by number of concepts. The worst of the ratios counts."""
    device, operator, dtype, sizes = key
    pairs = []
    for case in cases:
        passed = {name: row for name, row in case.items() if row["gate"] == "passed"}
        first, others = (_product if operator == "edited_projection" else _layer)(passed)
        if first not in passed or not others:
            return "; ".join(f"{name}: {row['reason']}" for name, row in case.items() if name not in passed) or "contestants are missing"
        pairs += [(passed[first]["ratios"][name][1], name, passed[first]) for name in others]
    ratio, against, row = max(pairs, key=lambda pair: pair[0])
    return Choice(
        device, operator, dtype, dict(zip(choices.SIZES[operator], sizes)), choices.OUTCOMES[operator][not choices.won(ratio)],
        ratio, against, row["repeats"], row["date"], row["torch"], row["commit"],
    )  # fmt: skip


def _product(passed: Rows) -> tuple[str | None, list[str]]:
    """The compiled kernel; the expert's library calls and what runs by default, both or there is no contest."""
    others = ["expert", *_first(passed, ORDER[1:])]
    return "cuda", others if len(others) == 2 and "expert" in passed else []


def _layer(passed: Rows) -> tuple[str | None, list[str]]:
    return next(iter(_first(passed, [f"{name} absorbed" for name in ORDER])), None), _first(passed, ORDER)


def _first(passed: Rows, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in passed][:1]


def table(rows: Sequence[Choice]) -> str:
    """Markdown."""
    if not rows:
        return NONE
    lines = ["| device | operator | dtype | shape | taken | why | rounds | measured |", "|---" * 8 + "|"]
    for row in sorted(rows, key=lambda row: row.key):
        sizes = ", ".join(f"{letter} = {size}" for letter, size in row.sizes.items())
        measured = f"{row.date[:10]}, torch {row.torch}, {row.commit}"
        lines.append(f"| {row.device} | {row.operator} | {row.dtype} | {sizes} | {row.choice} | {row.why} | {row.rounds} | {measured} |")
    return "\n".join(lines)


def refreshed(page: str, rows: Sequence[Choice]) -> str:
    return PLACE.sub(lambda found: f"{found[1]}\n{table(rows)}\n\n{found[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="rows of bench/run.py, of the suites projection and layer; others are left out")
    parser.add_argument("--out", type=Path, help="a folder for the table of these rows; the package and the page stay as they are")
    options = parser.parse_args()
    try:
        found = decided(read(*options.files))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    before = [] if options.out else [row for row in choices.read(choices.SHIPPED)[0] if row.key not in found]
    rows = sorted([*before, *(row for row in found.values() if isinstance(row, Choice))], key=lambda row: row.key)
    for key, why in found.items():
        if isinstance(why, str):
            print(f"no choice for {key}: {why}", file=sys.stderr)
    file = options.out / "choices.json" if options.out else choices.SHIPPED
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if options.out:
        (options.out / "choices.md").write_text(table(rows) + "\n", encoding="utf-8")
    else:
        PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(f"{len(rows)} choices in {file}")


if __name__ == "__main__":
    main()
