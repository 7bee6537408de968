"""The page's tables of the server under load are those of the rows that were measured."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARRIVALS = {"burst": "all at once", "poisson": "at random"}


def test_the_tables_of_the_page_are_those_of_the_rows():
    rows = [json.loads(line) for line in (ROOT / "bench/results/serve_load.jsonl").read_text().splitlines()]
    page = (ROOT / "docs/server.md").read_text(encoding="utf-8")
    loads = [row for row in rows if "load" in row]
    assert {(row["load"], row["clients"]) for row in loads} == {(load, count) for load in ARRIVALS for count in (16, 64)}
    for row in loads:
        ratios = [f"{row[key]:.2f}" for key in ("throughput", "p50", "p95", "p99")] + [f"{row[key]:.1f}" for key in ("rows_mixed", "rows_split")]
        assert f"| {row['clients']} | {ARRIVALS[row['load']]} | {' | '.join(ratios)} |" in page
    for row in rows:
        if "forward" in row and row["steps"] == 8:
            assert f"| {row['forward']} | {row['unet']:.2f} | {row['all']:.2f} | {100 * row['beside']:.1f} % |" in page
    parts = {(row["part"], row["steps"]): f"{100 * row['share']:.0f} % | {row['split']:.2f}" for row in rows if "part" in row}
    for part in {part for part, _ in parts}:
        assert f"| {part} | {parts[part, 8]} | {parts[part, 25]} |" in page
