"""Tables of ratios, from rows of bench/run.py only.

    python bench/report.py bench/results/*.jsonl                     # each suite against its strongest candidate, `BASELINES`
    python bench/report.py --against plain bench/results/train.jsonl
    python bench/report.py --page docs/benchmarks.md                 # updates the page's tables

A cell is the median, over rounds, of a candidate's time divided by the baseline's in the same round: below 1 is faster. Of a
case that was measured twice, the last measurement counts. In a page, a table is between the comments
`<!-- rows: FILE, against PROVIDER -->` and `<!-- end of rows -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import model, predictions, serve_sim  # noqa: E402
from bench.providers import compiled_name  # noqa: E402
from bench.rows import read  # noqa: E402
from bench.suites import PLANNED  # noqa: E402

# What a suite's rows are divided by, the first of these that ran: in a graph, since ours are in one, and launches cost little in either.
OF_OPERATORS = ("expert graph", "expert")
BASELINES = {
    "layer": ("expert addmm graph", *OF_OPERATORS), "train": ("plain",), "gradients": ("eager",), "export": ("torch",), "step": ("stock",),
    "tenants": ("perfusion, 1",), "swap": ("step",), "capacity": ("16 resident",),
}  # fmt: skip
AUTOTUNE = compiled_name("max-autotune")
OURS = ("cuda graph", "triton graph", "cuda", "triton")  # of which the first that ran has its fraction of the floor in a table


def baseline(suite: str, found: dict[tuple[str, str], dict]) -> str:
    """The provider that a suite's times are divided by, of those that ran."""
    wanted, ran = BASELINES.get(suite, OF_OPERATORS), {name for (_, name), row in found.items() if row["gate"] == "passed"}
    return next((name for name in wanted if name in ran), wanted[-1])


def tables(rows: list[dict[str, Any]], against: str | None = None) -> str:
    """Markdown, one table per suite, device and dtype; then the predictions of these kernels. against: None: as `baseline` says."""
    groups: dict[tuple, dict[tuple[str, str], dict]] = {}
    for row in rows:
        group = groups.setdefault((row["suite"], row["device"], row["dtype"]), {})
        group[row["case"], row.get("what", row["provider"])] = row
    made = [_table(key, found, against or baseline(key[0], found)) for key, found in groups.items()]
    return "\n\n".join([*made, *filter(None, [_predicted([row for found in groups.values() for row in found.values()])])]) + "\n"


def _predicted(rows: list[dict[str, Any]]) -> str:
    """Measured times of kernels over those of bench/predictions.jsonl for this chip."""
    lines = []
    for row in rows:
        expected = predictions.of(row) if row["gate"] == "passed" else None
        if expected:
            over = row["median_us"] / expected["microseconds"]
            numbers = f"{expected['microseconds']:.1f} | {row['median_us']:.1f} | {over:.2f} | {expected['bound']}"
            lines.append(f"| {row['suite']}, {row['case']} | {row['provider']} | {numbers} |")
    heads = "| case | what | predicted, µs | measured, µs | measured / predicted | bound by, as predicted |"
    return "\n".join(["**predictions, and what became of them**", "", heads, "|---" * 6 + "|", *lines]) if lines else ""


def _table(key: tuple[str, str, str], found: dict[tuple[str, str], dict], against: str) -> str:
    suite, device, dtype = key
    if suite == "overhead":
        return _overheads(list(found.values()))
    if suite == "model":
        return model.table(list(found.values()))
    if suite == "serve_sim":
        return serve_sim.table(list(found.values()))
    if suite == "storage":
        return _storage(list(found.values()))
    if suite == "startup":
        return _startup(list(found.values()))
    if suite == "static":
        return _static(list(found.values()))
    if suite in WHOLE:
        return _whole(suite, dtype, device, list(found.values()), against)
    if suite == "nsight":
        return _counters(device, list(found.values()))
    if suite == "decide":
        return _rates(device, list(found.values()))
    cases = list(dict.fromkeys(case for case, _ in found))
    # no empty columns: candidates that ran nowhere are listed below
    ran = list(dict.fromkeys(name for (_, name), row in found.items() if row["gate"] == "passed"))
    what = "CPU ratios" if device == "cpu" else f"Ratios on one {device}, and the baseline's median in µs"
    lines = [f"**{suite}, {dtype}: {what}; time over that of `{against}`**", ""]
    timed = [] if device == "cpu" else ["µs", "ours, of the floor"]
    lines += ["| case | " + " | ".join([*ran, *timed]) + " |", "|---" * (1 + len(ran) + len(timed)) + "|"]
    for case in cases:
        base = found.get((case, against))
        cells = [_cell(found.get((case, name)), against) for name in ran]
        if timed:
            cells += [f"{base['median_us']:.1f}" if base and base["gate"] == "passed" else "", _of_floor(case, found)]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    reasons: dict[str, str] = {name: row["reason"] for (_, name), row in found.items() if name not in ran}
    lines += ["", *(f"- {name} did not run: {reason}" for name, reason in reasons.items())] if reasons else []
    lines += ["", *absent] if (absent := _without_autotune(suite, device, found)) else []
    return "\n".join(lines)


def _without_autotune(suite: str, device: str, found: dict[tuple[str, str], dict]) -> list[str]:
    """Which cases of those that are asked of max-autotune have no time of it; on a CPU it may have been left out."""
    mine = {case: row for (case, name), row in found.items() if name == AUTOTUNE}
    if suite not in PLANNED or (device == "cpu" and not mine):
        return []
    reasons: dict[str, list[str]] = {}
    for case in dict.fromkeys(case for (case, _), row in found.items() if not row.get("shapes", {}).get("J")):
        if case not in mine:
            reasons.setdefault("not measured yet", []).append(case)
        elif mine[case]["gate"] != "passed":
            reasons.setdefault(mine[case]["reason"], []).append(case)
    return [f"- no time of {AUTOTUNE}, {reason}, {len(cases)}: {'; '.join(cases)}" for reason, cases in reasons.items()]


def _of_floor(case: str, found: dict[tuple[str, str], dict]) -> str:
    """The fraction of this chip's roofline that our kernel reaches: the least time over its own."""
    rows = (found.get((case, name)) for name in OURS)
    mine = next((row for row in rows if row and row["gate"] == "passed" and "floor_us" in row), None)
    return f"{mine['floor_us'] / mine['median_us']:.2f} ({mine['provider']})" if mine else ""


WHOLE = ("step", "tenants", "swap", "capacity")


def _whole(suite: str, dtype: str, device: str, rows: list[dict[str, Any]], against: str) -> str:
    """Of whole UNets: every ratio with its interval; candidates that did not run are listed below."""
    said = "CPU ratios" if device == "cpu" else f"ratios on one {device}"
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["provider"], row["case"]): row for row in rows if row["gate"] == "passed"}
    ran = [name for name in dict.fromkeys(row["provider"] for row in rows) if any((name, case) in found for case in cases)]
    cases = [case for case in cases if any((name, case) in found for name in ran)]
    lines = [f"**{suite}, {dtype}: {said}; time over that of `{against}`, the median of rounds with its interval of 95 %**", ""]
    if not ran:
        lines = lines[:1]
    else:
        lines += [f"| | {' | '.join(cases)} |", "|---" * (1 + len(cases)) + "|"]
        lines += [f"| {name} | {' | '.join(_interval(found.get((name, case)), against) for case in cases)} |" for name in ran]
        for case in cases:
            one = next(row for (_, its), row in found.items() if its == case)
            lines += ["", f"{case}: {one['repeats']} rounds, {_spread([row for (_, its), row in found.items() if its == case], against)}"]
            if one.get("load") is not None:
                lines[-1] += f"; {one['load']:g} processes wanted the {one.get('cores', '?')} processors of the machine."
    absent = {(row["provider"], row["case"]): row["reason"] for row in rows if row["gate"] == "not passed"}
    reasons: dict[tuple[str, str], list[str]] = {}
    for (name, case), reason in absent.items():
        reasons.setdefault((name, reason), []).append(case)
    lines += ["", *(f"- {name}, {'; '.join(where)}: absent, {reason}" for (name, reason), where in reasons.items())] if absent else []
    return "\n".join(lines)


def _interval(row: dict | None, against: str) -> str:
    if row is None:
        return "–"
    if row["provider"] == against:
        return "1"
    if against not in row["ratios"]:
        return "?"
    low, high = row["intervals"][against]
    return f"{_number(row['ratios'][against][1])} ({_number(low)} to {_number(high)})"


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _spread(rows: list[dict[str, Any]], against: str) -> str:
    """The same by the processor's time, which others on the machine lengthen less."""
    told = {row["provider"]: row["processor_ratios"][against][1] for row in rows if against in row.get("processor_ratios", {})}
    if not told:
        return "timed by events on the device"
    return "by processor time " + ", ".join(f"{name} {_number(ratio)}" for name, ratio in told.items())


def _static(rows: list[dict[str, Any]]) -> str:
    """Launches as they are and over the stock pipeline's; bytes below."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["what"], row["case"]): row for row in rows if row["gate"] == "counted"}
    lines = ["**static: operator launches of one step, and of them beyond the stock pipeline's**", ""]
    lines += [f"| | {' | '.join(cases)} |", "|---" * (1 + len(cases)) + "|"]
    for what in dict.fromkeys(what for what, _ in found if what.startswith("launches, ")):
        cells = []
        for case in cases:
            one, stock = found.get((what, case)), found.get(("launches, stock", case))
            more = one["value"] - stock["value"] if one and stock else 0
            cells.append("–" if one is None else f"{one['value']:,}" + (f" ({more:+,})" if what != "launches, stock" and stock else ""))
        lines.append(f"| {what.removeprefix('launches, ')} | {' | '.join(cells)} |")
    memory = [what for what in dict.fromkeys(what for what, _ in found) if what.startswith("memory, ")]
    if memory:
        sized = [case for case in cases if any((what, case) in found for what in memory)]
        lines += ["", "**static: bytes of memory in float16**", "", f"| | {' | '.join(sized)} |", "|---" * (1 + len(sized)) + "|"]
        names = {"memory, a concept": "a resident concept", "memory, a slot": "a prompt's keys and values, for one row"}
        for what in memory:
            cells = [f"{found[what, case]['value']:,}" if (what, case) in found else "–" for case in sized]
            lines.append(f"| {names.get(what, what)} | {' | '.join(cells)} |")
    absent = {row["provider"]: row["reason"] for row in rows if row["gate"] == "not passed"}
    lines += ["", *(f"- {name}: absent, {reason}" for name, reason in absent.items())] if absent else []
    return "\n".join(lines)


def _storage(rows: list[dict[str, Any]]) -> str:
    models = list(dict.fromkeys(row["case"] for row in rows))
    lines = ["**storage: bytes of one learned subject, in float16**", ""]
    lines += [f"| what | {' | '.join(models)} | over ours, {models[0]} | what it holds |", "|---" * (len(models) + 3) + "|"]
    found = {(row["provider"], row["case"]): row for row in rows if "file_bytes" in row}
    for name in dict.fromkeys(row["provider"] for row in rows):
        cells = [f"{found[name, model]['file_bytes']:,}" if (name, model) in found else "–" for model in models]
        one = found.get((name, models[0]))
        times = f"{one['file_bytes'] / found['perfusion', models[0]]['file_bytes']:,.2f}" if one else "–"
        lines.append(f"| {name} | {' | '.join(cells)} | {times} | {one['holds'] if one else ''} |")
    return "\n".join(lines)


def _startup(rows: list[dict[str, Any]]) -> str:
    lines = ["**startup: a fresh process; processor time over that of `import torch`, 20th to 80th percentile, and peak memory**", ""]
    lines += ["| process | time | | peak, MiB |", "|---|---|---|---|"]
    for row in rows:
        if row["gate"] != "passed":
            lines.append(f"| {row['provider']}: {row['reason']} | – | | – |")
            continue
        low, middle, high = row["ratios"].get("import torch", (1.0, 1.0, 1.0))
        lines.append(f"| {row['provider']} | {middle:.2f} | {low:.2f} to {high:.2f} | {row['peak_bytes'] / 2**20:.0f} |")
    return "\n".join(lines)


def _counters(device: str, rows: list[dict[str, Any]]) -> str:
    heads = ("launch", "kernel", "µs", "L2, MB", "L2, TB/s", "memory, MB", "issue slots", "bank conflicts")
    lines = [f"**nsight: counters on one {device}**", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if row["gate"] != "profiled":
            lines.append(f"| | {row['reason']} | | | | | | |")
            continue
        time, l2, memory = row["time"], row.get("l2_bytes", 0), row.get("memory_bytes", 0)
        numbers = f"{1e6 * time:.1f} | {l2 / 1e6:.1f} | {l2 / time / 1e12:.2f} | {memory / 1e6:.1f}"
        numbers += f" | {row.get('issue_active', 0):.0f} % | {row.get('bank_conflicts', 0):.0f}"
        lines.append(f"| {row['case']} | `{row['provider']}` | {numbers} |")
    return "\n".join(lines)


def _rates(device: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"**decide: rates on one {device}**", "", "| case | what | µs | TB/s | TFLOP/s |", "|---|---|---|---|---|"]
    for row in rows:
        if row["gate"] != "passed":
            lines.append(f"| {row['case']} | {row['provider']}: {row['reason']} | | | |")
            continue
        rates = [f"{row[name] / 1e12:.2f}" if name in row else "" for name in ("bytes_per_s", "flops_per_s")]
        time = "ran" if device == "cpu" else f"{row['median_us']:.2f}"
        lines.append(f"| {row['case']} | {row['provider']} | {time} | {rates[0]} | {rates[1]} |")
    return "\n".join(lines)


def _overheads(rows: list[dict[str, Any]]) -> str:
    lines = ["**overhead: µs of an eager call beside the work, on the CPU of these rows**", ""]
    lines += ["| operator | overhead | allowed | validate=False | after a write |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row['overhead_us']:.1f} | {row['limit_us']:.0f} | {row['unvalidated_us']:.1f} | {row['fresh_us']:.1f}"
        lines.append(f"| {row['case']} | {numbers} |")
    return "\n".join(lines)


def _cell(row: dict | None, against: str) -> str:
    if row is None or row["gate"] != "passed":
        return "–"
    if row["provider"] == against:
        return "1"
    return f"{row['ratios'][against][1]:.2f}" if against in row["ratios"] else "?"


PLACE = re.compile(r"(<!-- rows: (?P<file>\S+), against (?P<against>[\w ,]+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)


def refreshed(page: str) -> str:
    """A page with its tables regenerated from the rows that it names."""
    return PLACE.sub(lambda found: f"{found[1]}\n{tables(read(ROOT / found['file']), found['against'])}\n{found[4]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--against", help="the provider that others are divided by; by default each suite's strongest")
    parser.add_argument("--page", type=Path, help="a page whose tables are written anew, instead of printing any")
    options = parser.parse_args()
    if options.page:
        options.page.write_text(refreshed(options.page.read_text(encoding="utf-8")), encoding="utf-8")
    elif not options.files:
        parser.error("files of rows are needed, or --page")
    else:
        print(tables(read(*options.files), options.against), end="")


if __name__ == "__main__":
    main()
