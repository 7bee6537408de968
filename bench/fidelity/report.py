"""Tables of docs/fidelity.md and of README.md, and plots of docs/fidelity/, from rows and nothing else.

    python -m bench.fidelity.report                     # the pages and plots anew, from bench/results/fidelity.jsonl
    python -m bench.fidelity.report --rows FILE         # print the tables of other rows
    python -m bench.fidelity.report --check             # status 1 if page or plots are not of the rows

Rows are those of the weights that were measured last, drawn at the same guidance; each method of a section at the largest scale that
it was measured at, which stands beside its figures as things × prompts × seeds. A cell is the mean with its 95 % interval. A table
stands in the page between `<!-- fidelity: SECTION -->` and `<!-- end of fidelity -->`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from bench import rows  # noqa: E402
from bench.fidelity.judging import spread  # noqa: E402
from bench.fidelity.scale import SCALES  # noqa: E402
from bench.fidelity.sections import SECTIONS  # noqa: E402

STORAGE = ROOT / "bench/results/storage.jsonl"
ROWS, PAGES, PLOTS = ROOT / "bench/results/fidelity.jsonl", (ROOT / "docs/fidelity.md", ROOT / "README.md"), ROOT / "docs/fidelity"
OURS, OTHERS, INK, GRID = (
    "#0b6e99",
    ("#d9730d", "#6b7a3a", "#8a5a9e", "#b23a48", "#3a8a7a", "#a0764b", "#555555", "#c2185b"),
    "#222222",
    "#e3e3e3",
)
Rows = list[dict[str, Any]]
PLACE = re.compile(r"(<!-- fidelity: (?P<section>[\w ]+) -->\n).*?(<!-- end of fidelity -->)", re.DOTALL)


def current(found: Rows) -> Rows:
    """Of the weights and guidance measured last; of each method and section those of its largest scale and of the most pictures a thing;
    of a row made twice the last."""
    own = [row for row in found if _weights(row) == _weights(found[-1])]
    order = list(SCALES)

    def rank(row: dict[str, Any]) -> tuple[int, int]:
        return -order.index(row["scale"]), row["prompts"] * row["seeds"]

    best: dict[tuple[str, str], tuple[int, int]] = {}
    for row in own:
        key = row["section"], row["variant"]
        best[key] = max(best.get(key, rank(row)), rank(row))
    kept = [row for row in own if rank(row) == best[row["section"], row["variant"]]]
    sections = {name: number for number, name in enumerate(SECTIONS)}
    last = {(row["section"], row["variant"], row["subject"]): row for row in kept}
    return sorted(last.values(), key=lambda row: sections[row["section"]])


def _weights(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["toybox"], row["settings"].get("guidance", 4.0)  # rows of before it was kept were drawn at 4


def amount(found: Rows) -> str:
    """How much a row of a table rests on: things (or pairs) × prompts × seeds, and its scale where that is not the page's."""
    if not found:
        return ""
    said = f"{len(found)} × {found[0]['prompts']} × {found[0]['seeds']}"
    return said if found[0]["scale"] == "full" else f"{said}, {found[0]['scale']}"


def cell(found: Sequence[dict[str, Any]], name: str, percent: bool = True) -> str:
    """Mean and interval of a score over rows."""
    middle, low, high = spread([row["scores"][name] for row in found if name in row.get("scores", {})])
    if middle != middle:
        return ""
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def size(value: float) -> str:
    for unit, factor in (("MB", 1e6), ("KB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *("| " + " | ".join(line) + " |" for line in lines)])


def by_variant(found: Rows, section: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in found:
        if row["section"] == section:
            groups.setdefault(row["variant"], []).append(row)
    return groups


def concepts(found: Rows) -> str:
    names = ("identity", "text", "object", "scene", "own colour", "own pattern", "apart")
    groups, lines = by_variant(found, "concepts"), []
    for row in groups.get("perfusion", []):
        base = next(each for each in groups["superclass words"] if each["subject"] == row["subject"])
        lines.append([row["subject"], amount([row]), *(cell([row], name) for name in names), cell([base], "text"), size(row["bytes"])])
    if len(lines) > 1:
        own, base = groups["perfusion"], groups["superclass words"]
        middle = sorted(spread([row["scores"]["identity"]])[0] for row in own)
        lines.append(["**all**", amount(own), *(cell(own, name) for name in names), cell(base, "text"), ""])
        lines.append(
            ["**median, worst**", "", f"{(middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2:.2f}, {middle[0]:.2f}", *[""] * 8]
        )
    return table(["thing", "n", *names, "text, superclass word", "file"], lines)


def variants(found: Rows, section: str) -> str:
    names = ("identity", "text", "own colour", "own pattern")
    groups = by_variant(found, section)
    reference = default_rows(found, groups)
    lines = [["**as it is by default**", *_line(reference, names)]] if reference else []
    ordered = sorted(groups.items()) if section in ("bias", "pictures") else groups.items()
    lines += [[variant, *_line(group, names)] for variant, group in ordered]
    return table(["", "n", *names, "file"], lines)


def _line(group: Rows, names: Sequence[str]) -> list[str]:
    return [amount(group), *(cell(group, name) for name in names), size(_mean(group, "bytes"))]


def default_rows(found: Rows, groups: dict[str, Rows]) -> Rows:
    """Ours as it is by default, on the pictures that some methods were measured on."""
    return on_pictures_of([row for rows_ in groups.values() for row in rows_], by_variant(found, "concepts").get("perfusion", []))


def on_pictures_of(others: Rows, found: Rows) -> Rows:
    """Rows of the things of others, and where these have fewer prompts and seeds each, on those alone: they are the first."""
    things = {row["subject"] for row in others}
    prompts, seeds = max(((row["prompts"], row["seeds"]) for row in others), default=(0, 0))
    kept = []
    for row in found:
        if row["subject"] not in things:
            continue
        if "scores" in row and prompts <= row["prompts"] and seeds <= row["seeds"]:
            first = [prompt * row["seeds"] + seed for prompt in range(prompts) for seed in range(seeds)]
            scores = {name: [values[place] for place in first] for name, values in row["scores"].items()}
            row = {**row, "prompts": prompts, "seeds": seeds, "scores": scores}
        kept.append(row)
    return kept


def pairs(found: Rows, section: str) -> str:
    groups = by_variant(found, section)
    names = ("both", "identity of the first", "identity of the second", "identity of the third", "both and like", "relation", "scene")
    names = [name for name in names if any(name in row["scores"] for group in groups.values() for row in group)]
    heads = [name.replace("both", "all") if section == "triples" else name for name in names]
    return table(["", "n", *heads], [[variant, amount(group), *(cell(group, name) for name in names)] for variant, group in groups.items()])


def peers(found: Rows) -> str:
    """Everything about everybody, the default of ours among them; absent ones below with the reason."""
    groups, together = by_variant(found, "peers"), by_variant(found, "peer pairs")
    own = default_rows(found, groups)
    lines = []
    for name, group in {"**perfusion**": own, **groups}.items():
        measured = [row for row in group if "scores" in row]
        if not measured:
            continue
        both = by_variant(found, "pairs").get("local lock, published gates", []) if group is own else together.get(name, [])
        lines.append([
            name, amount(measured), size(_mean(measured, "bytes")), f"{_mean(measured, 'trained'):,.0f}",
            f"{_mean(measured, 'seconds'):.0f}",
            f"{_mean(measured, 'steps'):.0f}", size(_mean(measured, "memory")), cell(measured, "identity"), cell(measured, "text"),
            cell(both, "both and like") or "–",
        ])  # fmt: skip
    heads = ["", "n", "file", "numbers trained", "processor s", "steps", "memory", "identity", "text", "two in one picture, both like"]
    absent = {name: group[0]["absent"] for name, group in groups.items() if "absent" in group[0]}
    notes = [f"- {name}: not measured, {reason}" for name, reason in absent.items()]
    notes += [f"- {name}: {group[0]['note']}" for name, group in groups.items() if group[0].get("note")]
    return "\n".join([table(heads, lines), "", *notes]) if lines else "No rows yet."


SHORT = (
    "Textual Inversion", "LoRA, rank 4", "LoRA, rank 4, and a word (pivotal tuning)", "Custom Diffusion, K and V",
    "DreamBooth, the whole UNet",
)  # fmt: skip


def in_short(found: Rows) -> str:
    """Ours and those that everybody knows."""
    groups, together = by_variant(found, "peers"), by_variant(found, "peer pairs")
    chosen = {"**perfusion**": default_rows(found, groups), **{name: groups[name] for name in SHORT if name in groups}}
    lines = []
    for name, group in chosen.items():
        both = by_variant(found, "pairs").get("local lock, published gates", []) if "**" in name else together.get(name, [])
        like = cell(both, "both and like")
        lines.append([name, amount(group), size(_mean(group, "bytes")), cell(group, "identity"), cell(group, "text"), like or "–"])
    return table(["", "n", "file", "identity", "text", "two in one picture, both like"], lines)


def provenance(found: Rows) -> str:
    if not found:
        return "No rows yet."
    lines = []
    for scale in (name for name in SCALES if any(row["scale"] == name for row in found)):
        one = next(row["settings"] for row in found if row["scale"] == scale)
        lines.append(
            f"`{scale}`: trainings of {one['steps']} steps of {one['batch']}, pictures in {one['sampling_steps']} steps at guidance "
            f"{one.get('guidance', 4.0):g}, in {one.get('drawn_in', 'float32')}"
        )
    pictures = sum(row["prompts"] * row["seeds"] for row in found if "scores" in row)
    return (
        f"Weights `{found[0]['toybox']}`; {'; '.join(lines)}. {pictures:,} pictures. *n* is things (or pairs) × prompts × seeds of each "
        f"row{', at scale `full` where it names no other' if len(lines) > 1 else ''}."
    )


def goals(found: Rows) -> str:
    """What was to be reached, what was measured, and on how much; a goal counts as held by the mean, the interval stands beside it."""
    lines = []
    own, base = (by_variant(found, "concepts").get(name, []) for name in ("perfusion", "superclass words"))
    base = [row for row in base if row["subject"] in {each["subject"] for each in own}]

    def goal(text: str, figure: str, held: bool | str, group: Rows) -> None:
        lines.append([text, figure, held if isinstance(held, str) else "yes" if held else "**no**", amount(group)])

    if own and base:
        each = sorted((spread([row["scores"]["identity"]])[0], row["subject"]) for row in own)
        middle = statistics.median(value for value, _ in each)
        goal("identity of the median thing ≥ 0.75", f"{middle:.2f}", middle >= 0.75, own)
        goal("identity of the worst thing ≥ 0.6", f"{each[0][0]:.2f} ({each[0][1]})", each[0][0] >= 0.6, own)
        for name in ("object", "scene"):
            plain = {row["subject"]: spread([row["scores"][name]])[0] for row in base}
            shares = [spread([row["scores"][name]])[0] / plain[row["subject"]] for row in own]
            share = statistics.median(shares)
            goal(f"{name} ≥ 0.95 of the superclass word's, median thing", f"{share:.2f} (worst {min(shares):.2f})", share >= 0.95, own)
    two = by_variant(found, "pairs").get("local lock, published gates", [])
    if two:
        both = spread([row["scores"]["both"] for row in two])[0]
        goal("two in one picture: both seen ≥ 0.9", cell(two, "both"), both >= 0.9, two)
        likes = [(spread([row["scores"][f"identity of the {place}"]])[0]) for row in two for place in ("first", "second")]
        means = [spread([row["scores"][f"identity of the {place}"] for row in two])[0] for place in ("first", "second")]
        figure = f"{means[0]:.2f} and {means[1]:.2f} (lowest of any thing in a pair {min(likes):.2f})"
        goal("two in one picture: identity of each ≥ 0.6", figure, min(means) >= 0.6, two)
    groups = by_variant(found, "peers")
    ours = default_rows(found, groups)
    for name in ("LoRA, rank 4", "Textual Inversion"):
        if ours and name in groups:
            gains = [gain(ours, groups[name], kind) for kind in ("identity", "text")]
            better = [kind for kind, (_, low, _) in zip(("identity", "text"), gains) if low > 0]
            worse = any(high < 0 for _, _, high in gains)
            held = f"in {' and '.join(better)}" if better and not worse else "**no**" if worse else "no more than the interval"
            figure = ", ".join(f"{kind} {m:+.2f} ({low:+.2f} to {high:+.2f})" for kind, (m, low, high) in zip(("identity", "text"), gains))
            goal(f"ahead of {name}, picture by picture", figure, held, groups[name])
    lines.append(["file ≤ 1/30 of a LoRA's of rank 4 at Stable Diffusion 1.5's shapes", *_file_sizes()])
    return table(["goal", "measured", "held", "n"], lines)


def gain(ours: Rows, theirs: Rows, name: str) -> tuple[float, float, float]:
    """How much ours is above another's, with its interval: differences of pictures of the same thing, prompt and noise."""
    other = {row["subject"]: row["scores"][name] for row in theirs}
    pairs_ = [zip(row["scores"][name], other[row["subject"]]) for row in ours if row["subject"] in other]
    return spread([[a - b for a, b in each if a is not None and b is not None] for each in pairs_])


def _file_sizes() -> list[str]:
    """Of bench/results/storage.jsonl, which the real libraries wrote."""
    kept = {row["provider"]: row["file_bytes"] for row in rows.read(STORAGE) if row["case"] == "sd15"}
    ours, lora = kept["perfusion"], kept["LoRA, rank 4"]
    return [f"{size(ours)} against {size(lora)}, 1/{lora / ours:.0f}", "yes" if lora >= 30 * ours else "**no**", "files"]


TABLES = {"concepts": concepts, "peers": peers, "provenance": provenance, "goals": goals, "in short": in_short}


def text_of(section: str, found: Rows) -> str:
    if section in TABLES:
        return TABLES[section](found)
    if not by_variant(found, section):
        return "Not measured yet at this scale."
    return pairs(found, section) if "pairs" in section or section == "triples" else variants(found, section)


def _mean(found: Rows, name: str) -> float:
    values = [row.get(name, 0) for row in found]
    return sum(values) / len(values) if values else 0.0


def refreshed(page: str, found: Rows) -> str:
    return PLACE.sub(lambda place: f"{place[1]}\n{text_of(place['section'], found)}\n\n{place[3]}", page)


# plots


def tidy(axes: Any) -> None:
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def pareto(figure: Any, found: Rows) -> None:
    """Identity against text: one file of ours over β, and everybody else as a point, on the same pictures."""
    axes = figure.subplots()

    def point(group: Rows, colour: str, mark: str, label: str | None) -> tuple[float, float]:
        x, y = (spread([row["scores"][name] for row in group]) for name in ("text", "identity"))
        axes.errorbar(
            x[0], y[0], xerr=[[x[0] - x[1]], [x[2] - x[0]]], yerr=[[y[0] - y[1]], [y[2] - y[0]]], fmt=mark, color=colour,
            ms=6, lw=0.9, capsize=2, label=label,
        )  # fmt: skip
        return x[0], y[0]

    sweep = sorted((float(name.split("=")[1]), group) for name, group in by_variant(found, "bias").items())
    line = []
    for number, (bias, group) in enumerate(sweep):
        line.append(point(group, OURS, "o", "perfusion, one file over β" if number == 0 else None))
        above = 26 if number % 2 == 0 else -32
        axes.annotate(f"β {bias:g}", line[-1], textcoords="offset points", xytext=(-9, above), fontsize=8, color=OURS)
    axes.plot(*zip(*line), color=OURS, lw=1.2) if line else None
    on = [row for _, group in sweep for row in group]
    measured = {name: group for name, group in by_variant(found, "peers").items() if "scores" in group[0]}
    measured = {name: on_pictures_of(on, group) if on else group for name, group in measured.items()}
    measured = {name: group for name, group in measured.items() if group}
    for number, (name, group) in enumerate(measured.items()):
        point(group, OTHERS[number % len(OTHERS)], "sD^v"[number // len(OTHERS) * 2 % 4], f"{name}, {size(_mean(group, 'bytes'))}")
    axes.set_xlabel("share of what the prompt asked for")
    axes.set_ylabel("identity: 0 the superclass word, 1 true pictures (not from 0)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    tidy(axes)


def together(figure: Any, found: Rows) -> None:
    """Two learned things in one picture: identity of each."""
    axes = figure.subplots()
    groups = {
        name: group for section in ("pairs", "peer pairs") for name, group in by_variant(found, section).items() if "scores" in group[0]
    }
    for number, (name, group) in enumerate(reversed(groups.items())):
        for place, colour, dy in (("first", OURS, 0.13), ("second", OTHERS[0], -0.13)):
            middle, low, high = spread([row["scores"][f"identity of the {place}"] for row in group])
            label = f"the {place} thing" if number == 0 else None
            axes.errorbar(middle, number + dy, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=2, ms=5, label=label)
    axes.set_yticks(range(len(groups)), list(groups)[::-1])
    axes.axvline(0, color=INK, lw=0.6)
    axes.set_xlabel("identity of each of two things in one picture")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    tidy(axes)


PLOTTED = {"pareto": (pareto, (11, 6), ("bias", "peers")), "together": (together, (9, 5), ("pairs", "peer pairs"))}


def digest(found: Rows, name: str) -> str:
    """Of what is drawn and of how."""
    used = [[row["variant"], row["subject"], row.get("scores"), row.get("bytes")] for row in found if row["section"] in PLOTTED[name][2]]
    return hashlib.sha256((json.dumps(used) + Path(__file__).read_text(encoding="utf-8")).encode()).hexdigest()[:16]


def draw(found: Rows, folder: Path) -> None:
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for name, (plot, inches, _) in PLOTTED.items():
        figure = pyplot.figure(figsize=inches, layout="constrained")
        plot(figure, found)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"rows": digest(found, name)})
        pyplot.close(figure)


def examples(found: Rows, work: Path, path: Path) -> bool:
    """A picture of each of the first prompts by every peer, of the first thing, from sheets in `work`; False where one is missing."""
    from PIL import Image, ImageDraw, ImageFont

    chosen = {"superclass words": "concepts", "perfusion": "concepts"}
    chosen |= {row["variant"]: "peers" for row in found if row["section"] == "peers" and "scores" in row}
    subject = next((row["subject"] for row in found if row["section"] == "peers" and "scores" in row), None)
    own = next((row for row in found if row["subject"] == subject), None)
    files = {}
    if own:
        folder = work / own["toybox"] / "sheets" / own["scale"]
        files = {name: folder / f"{section}, {name}, {subject}.png".replace("/", "-") for name, section in chosen.items()}
    if not files or not all(file.exists() for file in files.values()):
        return False
    tile, shown = 128, min(8, *(row["prompts"] for row in found if row["section"] in ("concepts", "peers")))
    whole = Image.new("RGB", (tile * (shown + 2), tile * len(files)), "white")
    brush, font = ImageDraw.Draw(whole), ImageFont.load_default(15)
    for number, (name, file) in enumerate(files.items()):
        row = next(each for each in found if each["variant"] == name and each["section"] == chosen[name])
        brush.multiline_text((8, tile * number + 40), "\n".join(textwrap.wrap(name, 24)), INK, font)
        sheet, columns = Image.open(file), row["seeds"] * 4
        for prompt in range(shown):
            place = prompt * row["seeds"]
            x, y = place % columns * tile, place // columns * tile
            whole.paste(sheet.crop((x, y, x + tile, y + tile)), (tile * (prompt + 2), tile * number))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    return True


def stale(found: Rows, pages: Sequence[Path] = PAGES, folder: Path = PLOTS) -> list[str]:
    """Names of what is not of these rows."""
    from PIL import Image

    names = [page.name for page in pages if refreshed(page.read_text(encoding="utf-8"), found) != page.read_text(encoding="utf-8")]
    for name in PLOTTED:
        path = folder / f"{name}.png"
        if not path.exists() or Image.open(path).text.get("rows") != digest(found, name):
            names.append(path.name)
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, help="print the tables of these rows instead")
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "fidelity", help="as in measuring: docs/fidelity/examples.png is of its sheets"
    )
    options = parser.parse_args(arguments)
    found = current(rows.read(options.rows or ROWS))
    if options.check:
        names = stale(found)
        print(f"Not of these rows: {', '.join(names)}. python -m bench.fidelity.report" if names else "Page and plots are of these rows.")
        return int(bool(names))
    if options.rows:
        for section in dict.fromkeys(["provenance", *(row["section"] for row in found)]):
            print(f"**{section}**\n\n{text_of(section, found)}\n")
        return 0
    for page in PAGES:
        page.write_text(refreshed(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    draw(found, PLOTS)
    if not examples(found, options.work, PLOTS / "examples.png"):
        print(f"docs/fidelity/examples.png is as it was: not every method has a sheet in {options.work}.")
    print(f"{', '.join(page.name for page in PAGES)}, {', '.join(f'docs/fidelity/{name}.png' for name in PLOTTED)}: {provenance(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
