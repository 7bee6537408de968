"""Plots, from rows and nothing else.

    python bench/plot.py                    # docs/plots/*.png anew, from bench/results
    python bench/plot.py --check            # status 1 if one of them is not of these rows
    python bench/plot.py --rows rows.jsonl --out FOLDER     # of other rows, those of a GPU for instance

A picture carries a digest of the rows and of this file that it was drawn from, by which it is known to be stale. What is predicted is
drawn open or dashed and says so; what was measured is filled.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RESULTS, PLOTS = ROOT / "bench" / "results", ROOT / "docs" / "plots"
OURS, OTHERS, INK, GRID = "#0b6e99", ("#d9730d", "#6b7a3a", "#8a5a9e", "#b23a48", "#7a7a7a"), "#222222", "#e3e3e3"
MODELS = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL"}
Rows = list[dict[str, Any]]


def read(files: list[Path]) -> Rows:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def digest(rows: Rows) -> str:
    """Of what is drawn and of how."""
    text = json.dumps(rows, sort_keys=True) + Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Which rows a plot is of, and how it is drawn: (axes, rows)


def storage(figure: Any, rows: Rows) -> None:
    """Bytes of one learned subject on disk."""
    models = list(dict.fromkeys(row["case"] for row in rows))
    for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models):
        mine = sorted((row for row in rows if row["case"] == model and "file_bytes" in row), key=lambda row: -row["file_bytes"])
        colours = [OURS if row["provider"] == "perfusion" else OTHERS[-1] for row in mine]
        axes.barh([row["provider"] for row in mine], [row["file_bytes"] for row in mine], color=colours, height=0.62)
        axes.set_xscale("log")
        axes.set_xlim(500, 6e10)
        for number, row in enumerate(mine):
            axes.text(1.25 * row["file_bytes"], number, size_of(row["file_bytes"]), va="center", fontsize=8, color=INK)
        axes.set_title(MODELS.get(model, model))
        axes.set_xlabel("bytes, as the library writes them")
        tidy(axes, "x")


def ratios(figure: Any, rows: Rows) -> None:
    """Times over those of one candidate, the median of rounds with the 20th and 80th percentile."""
    cases = list(dict.fromkeys((row["suite"], row["case"]) for row in rows))
    axes = figure.subplots()
    against = "plain" if any(row["provider"] == "plain" for row in rows) else "expert"
    marks = dict(zip(dict.fromkeys(row["provider"] for row in rows if row["provider"] != against), (OURS, *OTHERS)))
    for number, case in enumerate(cases):
        mine = {row["provider"]: row for row in rows if (row["suite"], row["case"]) == case and row["gate"] == "passed"}
        for place, (name, colour) in enumerate(marks.items()):
            if name in mine and against in mine[name]["ratios"]:
                low, middle, high = mine[name]["ratios"][against]
                y = number + 0.16 * (place - (len(marks) - 1) / 2)
                axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=2, ms=5)
    axes.axvline(1, color=INK, lw=0.8)
    axes.set_yticks(range(len(cases)), [name for _, name in cases])
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.set_xlabel(f"time over that of {against}" + (" (CPU ratios)" if all(row["device"] == "cpu" for row in rows) else ""))
    handles = [axes.plot([], [], "o", color=colour, label=name)[0] for name, colour in marks.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.12 + 0.02 * len(cases)), ncols=len(handles), frameon=False)
    tidy(axes, "x")


def startup(figure: Any, rows: Rows) -> None:
    axes = figure.subplots()
    mine = [row for row in rows if row["gate"] == "passed"][::-1]
    for number, row in enumerate(mine):
        low, middle, high = (1.0, 1.0, 1.0) if row["provider"] == "import torch" else row["ratios"]["import torch"]
        axes.barh(number, middle, color=OURS if "perfusion" in row["provider"] else OTHERS[-1], height=0.62)
        axes.errorbar(middle, number, xerr=[[middle - low], [high - middle]], color=INK, capsize=2, lw=1)
        axes.text(high + 0.08, number, f"{row['peak_bytes'] / 2**20:.0f} MiB", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(mine)), [row["provider"] for row in mine])
    axes.margins(x=0.15)
    axes.set_xlabel("processor time of a fresh process over that of `import torch`, and its peak memory")
    tidy(axes, "x")


def step(figure: Any, rows: Rows) -> None:
    """A step with a concept over the stock pipeline's without one, with the interval of 95 %; by processor time beside it."""
    cases = list(dict.fromkeys(row["case"] for row in rows if row["gate"] == "passed"))
    names = [name for name in dict.fromkeys(row["provider"] for row in rows if row["gate"] == "passed") if name != "stock"][::-1]
    for axes, case in zip(figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases):
        mine = {row["provider"]: row for row in rows if row["case"] == case and row["gate"] == "passed"}
        for number, name in enumerate(names):
            if name not in mine:
                axes.text(1, number, "  not run", va="center", fontsize=8, color=OTHERS[-1])
                continue
            interval(axes, mine[name], "stock", number, OURS if name.startswith("perfusion") and "pytorch" not in name else OTHERS[-1])
        axes.axvline(1, color=INK, lw=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(titled(case))
        axes.set_xlabel("time over that of the stock step" + cpu(rows))
        tidy(axes, "x")
    key(figure.axes[-1])


def swap(figure: Any, rows: Rows) -> None:
    """A subject exchanged, in steps of the UNet."""
    cases = list(dict.fromkeys(row["case"] for row in rows if row["gate"] == "passed"))
    for axes, case in zip(figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases):
        mine = [row for row in rows if row["case"] == case and row["gate"] == "passed" and row["provider"] != "step"][::-1]
        for number, row in enumerate(mine):
            interval(axes, row, "step", number, OURS if row["provider"].startswith("perfusion") else OTHERS[-1])
        axes.axvline(1, color=INK, lw=0.8)
        axes.set_xscale("log")
        ticks = [0.01, 0.1, 1, 10]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlim(0.01, 20)
        axes.set_yticks(range(len(mine)), [row["provider"] for row in mine])
        axes.set_title(titled(case))
        tidy(axes, "x")
    figure.supxlabel("until a step with another subject can begin, in steps" + cpu(rows), fontsize=9)
    key(figure, "outside right center")


def interval(axes: Any, row: dict[str, Any], against: str, y: float, colour: str) -> None:
    """The median with its interval of 95 %, and a small mark for the ratio of processor times."""
    low, high = row["intervals"][against]
    middle = row["ratios"][against][1]
    axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=3, ms=5)
    if against in row.get("processor_ratios", {}):
        axes.plot(row["processor_ratios"][against][1], y - 0.25, "|", color=colour, ms=6)


def key(where: Any, place: str = "lower right") -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], marker="o", color=INK, lw=1, ms=4, label="median and its 95 % interval")]
    marks.append(Line2D([], [], marker="|", color=INK, lw=0, label="by processor time"))
    where.legend(handles=marks, frameon=False, fontsize=7, loc=place)


def cpu(rows: Rows) -> str:
    return " (CPU ratios)" if all(row["device"] == "cpu" for row in rows) else ""


def titled(case: str) -> str:
    name, _, rest = case.partition(",")
    return MODELS.get(name, name) + (f",{rest}" if rest else "")


def tenants(figure: Any, rows: Rows) -> None:
    """Cost of a batch in which every row has concepts of its own: predicted of real models, measured of what ran."""
    predicted, measured = [row for row in rows if row["gate"] == "predicted"], [row for row in rows if row["gate"] == "passed"]
    models = list(dict.fromkeys(row["case"] for row in predicted))
    cases = list(dict.fromkeys(row["case"] for row in measured))
    panels = figure.subplots(1, len(models) + len(cases), sharey=True, squeeze=False)[0]
    ways = (("perfusion", OURS), ("PEFT mixed batch", OTHERS[0]))
    for axes, model in zip(panels, models):
        for name, colour in ways:
            points = sorted((row["tenants"], row["value"]) for row in predicted if row["case"] == model and row["provider"] == name)
            axes.plot(*zip(*points), "o--", color=colour, mfc="white", label=name, ms=5)
        axes.set_title(f"{MODELS.get(model, model)}, predicted")
    for axes, case in zip(panels[len(models) :], cases):
        for way, colour in ways:
            for row in (row for row in measured if row["case"] == case and row.get("way") == way):
                one = row["provider"] == "perfusion, 1"
                middle = 1.0 if one else row["ratios"]["perfusion, 1"][1]
                low, high = (1.0, 1.0) if one else row["intervals"]["perfusion, 1"]
                axes.errorbar(row["tenants"], middle, yerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=3, ms=5)
        axes.set_title(f"{titled(case)}, measured{cpu(measured)}", fontsize=9)
    for axes in panels:
        axes.axhline(1, color=INK, lw=0.6)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
        axes.set_yscale("log", base=2)
        axes.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
        axes.minorticks_off()
        axes.set_xlabel("tenants in a batch")
        tidy(axes, "both")
    panels[0].set_ylabel("time of a step over ours with one tenant" if not models else "time of a step over ours")
    panels[0].legend(frameon=False, loc="upper left")


def concepts(figure: Any, rows: Rows) -> None:
    """Predicted time of a step over the concepts in a row."""
    models = list(dict.fromkeys(row["case"] for row in rows))
    colours = {"perfusion, slots": OURS, "perfusion, schedule": "#5fb0cf", "gated edit": OTHERS[1], "LoRA": OTHERS[0]}
    for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models):
        for name, colour in colours.items():
            points = sorted((row["concepts"], row["value"]) for row in rows if row["case"] == model and row["provider"] == name)
            axes.plot(*zip(*points), "o--", color=colour, mfc="white", label=name, ms=5)
        axes.axhline(1, color=INK, lw=0.6)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8], [1, 2, 4, 8])
        axes.set_yscale("log", base=2)
        axes.set_yticks([1, 2, 4], [1, 2, 4])
        axes.minorticks_off()
        axes.set_title(f"{MODELS.get(model, model)}, predicted, eager, 2 rows")
        axes.set_xlabel("concepts in the prompt")
        tidy(axes, "both")
    figure.axes[0].set_ylabel("time of a step over stock without one")
    figure.axes[0].legend(frameon=False, loc="upper left", fontsize=8)


def launches(figure: Any, rows: Rows) -> None:
    """Counted operator launches of a step beyond the stock pipeline's."""
    mine = [row for row in rows if row["gate"] == "counted" and row["unit"] == "launches"]
    cases = list(dict.fromkeys(row["case"] for row in mine))
    names = [name for name in dict.fromkeys(row["provider"] for row in mine) if name != "stock"][::-1]
    for axes, case in zip(figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases):
        found = {row["provider"]: row["value"] for row in mine if row["case"] == case}
        for number, name in enumerate(names):
            if name not in found:
                continue
            ratio = found[name] / found["stock"]
            axes.barh(number, ratio - 1, left=1, color=OURS if name in ("perfusion", "perfusion, hooks") else OTHERS[-1], height=0.62)
            axes.text(max(ratio, 1) * 1.04, number, f"{found[name] - found['stock']:+,}", va="center", fontsize=8, color=INK)
        axes.axvline(1, color=INK, lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.7, 40)
        axes.set_xticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
        axes.minorticks_off()
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{MODELS.get(case, case)}: stock {found['stock']:,}")
        axes.set_xlabel("launches of a step over stock's, counted")
        tidy(axes, "x")


def capacity(figure: Any, rows: Rows) -> None:
    """Predicted concepts that one GPU holds, how long one takes that it does not hold, and what residents were measured to cost."""
    measured = [row for row in rows if row["suite"] == "capacity" and row["gate"] == "passed"]
    left, right, *third = figure.subplots(1, 3 if measured else 2)
    rows = [row for row in rows if row["suite"] == "model"]
    names = [MODELS.get(row["case"], row["case"]) for row in rows if row["what"] == "concepts on one GPU"]
    for place, (what, label) in enumerate((("concepts on one GPU", "one GPU"), ("concepts in a node's memory", "a node's host memory"))):
        values = [row["value"] for row in rows if row["what"] == what]
        bars = left.bar([n + 0.36 * (place - 0.5) for n in range(len(names))], values, 0.34, label=label, fill=place == 0,
                        color=OURS if place == 0 else "none", edgecolor=OURS, hatch="" if place == 0 else "//", alpha=0.85)  # fmt: skip
        left.bar_label(bars, [short(value) for value in values], fontsize=8)
    left.set_yscale("log")
    left.set_ylim(top=3e8)
    left.set_xticks(range(len(names)), names)
    left.set_title("concepts that fit, predicted")
    left.legend(frameon=False, loc="upper right")
    kinds = {"a miss, from the host's memory": "ours, host memory", "a miss, from disk": "ours, disk"}
    kinds |= {"a LoRA loaded and fused": "LoRA, fused"}
    for place, (what, label) in enumerate(kinds.items()):
        values = [row["value"] for row in rows if row["what"] == what]
        colour, alpha = (OTHERS[0], 0.9) if "LoRA" in label else (OURS, (0.9, 0.5)[place])
        bars = right.bar([n + 0.27 * (place - 1) for n in range(len(names))], values, 0.25, label=label, color=colour, alpha=alpha)
        right.bar_label(bars, [f"{value / 1e6:.1f} s" if value > 1e5 else f"{value:.0f} µs" for value in values], fontsize=7)
    right.set_yscale("log")
    right.set_ylim(top=1e8)
    right.set_xticks(range(len(names)), names)
    right.set_title("a new tenant's first step waits, predicted")
    right.set_ylabel("µs")
    right.legend(frameon=False, loc="upper left")
    for axes in third:
        first = measured[0]["provider"]
        for number, row in enumerate(measured):
            middle = 1.0 if row["provider"] == first else row["ratios"][first][1]
            low, high = (1.0, 1.0) if row["provider"] == first else row["intervals"][first]
            axes.errorbar(number, middle, yerr=[[middle - low], [high - middle]], fmt="o", color=OURS, capsize=3, ms=5)
        axes.set_xticks(range(len(measured)), [f"{row['provider']}\n{size_of(row['bank_bytes'])}" for row in measured])
        axes.set_xlim(-0.5, len(measured) - 0.5)
        axes.set_ylim(0.8, 1.2)
        axes.axhline(1, color=INK, lw=0.6)
        axes.set_title(f"time of a step, measured on toybox{cpu(measured)}")
    for axes in (left, right, *third):
        tidy(axes, "y")


def roofline(figure: Any, rows: Rows) -> None:
    """FLOPs a second over FLOPs a byte of operators at the shapes of real UNets: floors, and what was measured or predicted of them."""
    from bench import roofline

    axes, machine = figure.subplots(), roofline.H200
    balance = machine.tensor / machine.bandwidth
    axes.plot([1, balance, 1e4], [machine.bandwidth, machine.tensor, machine.tensor], color=INK, lw=1)
    axes.annotate(f"{machine.bandwidth / 1e12:.1f} TB/s", (15, 15 * machine.bandwidth), (-48, 4), textcoords="offset points", fontsize=8)
    axes.annotate(f"{machine.tensor / 1e12:.0f} TFLOP/s", (600, machine.tensor), (0, 4), textcoords="offset points", fontsize=8)
    kinds = list(dict.fromkeys(row["suite"] for row in rows))
    styles = itertools.cycle(zip((OURS, *OTHERS), "os^vDP", strict=True))  # shapes, too: two operators may stand at one point
    for kind, (colour, marker) in zip(kinds, styles):
        for row in (row for row in rows if row["suite"] == kind):
            fill = colour if row["gate"] == "passed" else "none"
            axes.plot(row["flops"] / row["bytes"], row["flops_per_s"], marker, color=colour, mfc=fill, ms=5)
        axes.plot([], [], marker, color=colour, mfc=fill, label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(8, 2000)
    axes.set_ylim(0.7 * min(row["flops_per_s"] for row in rows), 2 * machine.tensor)
    axes.set_xlabel("FLOP per byte of device memory")
    axes.set_ylabel("FLOP per second")
    axes.set_title(f"roofline of one {machine.name}: filled is measured, open is predicted")
    axes.legend(frameon=False, loc="lower right")
    tidy(axes, "both")


def size_of(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def short(value: float) -> str:
    return f"{value / 1e6:.2g} M" if value >= 1e6 else f"{value / 1e3:.0f} k"


def tidy(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def predicted_kernels(rows: Rows) -> Rows:
    """Rows of the operators at real shapes: those measured, or where there are none, those of bench/predictions.jsonl for an H200 and two
    rows."""
    from bench import predictions, roofline

    measured = [row for row in rows if row.get("flops_per_s") and row.get("bytes") and row["provider"].split()[0] in ("cuda", "triton")]
    if measured:
        return measured
    found = []
    for each in predictions.read(roofline.H200.name, "cuda"):
        edited = each["kernel"] == "edited_attention" and each["J"] > 0
        if each["rows"] == 2 and not edited and each["kernel"] not in ("concept_gates", "edited_projection_backward"):
            work, seconds = predictions.work(each), 1e-6 * each["microseconds"]
            facts = {"flops": work.flops, "bytes": work.bytes, "flops_per_s": work.flops / seconds}
            found.append({"suite": each["kernel"], "gate": "predicted", **facts})
    return found


def of_capacity(rows: Rows) -> Rows:
    paper = [row for row in rows if row["suite"] == "model" and not row.keys() & {"rows", "tenants", "concepts"}]
    return [*paper, *(row for row in rows if row["suite"] == "capacity")]


PLOTTED: dict[str, tuple[Callable[[Any, Rows], None], Callable[[Rows], Rows], tuple[float, float]]] = {
    "storage": (storage, lambda rows: [row for row in rows if row["suite"] == "storage"], (9, 2.8)),
    "train": (ratios, lambda rows: [row for row in rows if row["suite"] == "train"], (7, 2.2)),
    "startup": (startup, lambda rows: [row for row in rows if row["suite"] == "startup"], (7, 2.6)),
    "step": (step, lambda rows: [row for row in rows if row["suite"] == "step"], (10, 3.4)),
    "swap": (swap, lambda rows: [row for row in rows if row["suite"] == "swap"], (10, 2.6)),
    "tenants": (tenants, lambda rows: [row for row in rows if row["suite"] in ("model", "tenants") and "tenants" in row], (12, 3)),
    "concepts": (concepts, lambda rows: [row for row in rows if row["suite"] == "model" and "concepts" in row], (10, 3)),
    "launches": (launches, lambda rows: [row for row in rows if row["suite"] == "static"], (10, 2.8)),
    "capacity": (capacity, of_capacity, (12, 3.4)),
    "roofline": (roofline, predicted_kernels, (7, 4.2)),
}  # fmt: skip


def draw(name: str, rows: Rows, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot, _, size = PLOTTED[name]
    settings = {"font.size": 9, "axes.titlesize": 10, "text.color": INK, "axes.edgecolor": "#999999", "figure.facecolor": "white"}
    with pyplot.rc_context(settings):
        figure = pyplot.figure(figsize=size, layout="constrained")
        plot(figure, rows)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=130, metadata={"rows": digest(rows), "Software": None})
        pyplot.close(figure)


def stale(rows: Rows, folder: Path) -> list[str]:
    """The plots that are missing or of other rows."""
    from PIL import Image

    found = []
    for name, (_, chosen, _) in PLOTTED.items():
        mine, file = chosen(rows), folder / f"{name}.png"
        if mine and (not file.exists() or Image.open(file).text.get("rows") != digest(mine)):
            found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="append", type=Path, help="a .jsonl file; may be repeated; by default all of bench/results")
    parser.add_argument("--out", type=Path, default=PLOTS, help="a folder")
    parser.add_argument("--check", action="store_true", help="draw nothing; say which are stale")
    options = parser.parse_args()
    rows = read(options.rows or sorted(RESULTS.glob("*.jsonl")))
    rows = [row for row in rows if {"suite", "gate", "provider"} <= row.keys()]
    if options.check:
        wrong = stale(rows, options.out)
        raise SystemExit(f"stale: {', '.join(wrong)}; python bench/plot.py" if wrong else 0)
    for name, (_, chosen, _) in PLOTTED.items():
        if mine := chosen(rows):
            draw(name, mine, options.out)
            print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
