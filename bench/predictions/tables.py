"""The tables of predictions on the kernels' pages.

A table stands between the comments `<!-- predicted: BACKEND KERNEL -->` and `<!-- end of predicted -->`. A cell is microseconds, the
fraction of the roofline, the fill where there is one, and the bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import predictions, roofline

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/kernels-cuda.md", ROOT / "docs/kernels-triton.md"
CHIPS = "A100", "RTX 4090", "H100", "H200", "B200"
ROWS = 2, 16
MAIN = {"SD 1.5": "sd15", "SDXL": "sdxl"}
BEGIN, END = r"<!-- predicted: (?P<backend>\w+) (?P<kernel>\w+)(?P<edited>, edited)? -->\n", "<!-- end of predicted -->"
PLACE = re.compile(f"({BEGIN}).*?({END})", re.DOTALL)


def refreshed(page: str) -> str:
    """A page with its tables made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found['backend'], found['kernel'], bool(found['edited']))}\n{found[5]}", page)


def table(backend: str, kernel: str, edited: bool = False) -> str:
    """edited: calls with concepts, of the layers that most of the time is in."""
    lines = [f"| {_heads(kernel, edited)} | {' | '.join(CHIPS)} |", "|---" * (1 + len(CHIPS)) + "|"]
    for name, wanted in _calls(kernel, edited):
        lines.append(f"| {name} | {' | '.join(_cell(_found(chip, backend, kernel, wanted)) for chip in CHIPS)} |")
    return "\n".join(lines)


def _heads(kernel: str, edited: bool) -> str:
    if "N" not in predictions.SIZES[kernel]:
        return "D, O, rows" if "O" in predictions.SIZES[kernel] else "D, rows"
    if kernel == "fused_edited_attention":
        return "N, d, D, rows"
    return "layer, concepts, rows" if edited else "layer, rows"


def _calls(kernel: str, edited: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what a line is called, what its rows have)."""
    sizes = predictions.SIZES[kernel]
    if "N" not in sizes:
        for unet, D in roofline.TEXT_WIDTHS.items():
            O = sum(layer.count * layer.C for layer in roofline.UNETS[unet])
            for rows in ROWS:
                outputs = {"O": O} if "O" in sizes else {}
                yield (f"{D}, {O:,}, {rows}" if outputs else f"{D}, {rows}"), {"D": D, "rows": rows, **outputs}
        return
    for title, unet in MAIN.items():
        D = roofline.TEXT_WIDTHS[unet]
        for layer in roofline.UNETS[unet]:
            small = layer.N == 64 or (edited and layer.N not in (4096, 1024))
            if small and kernel != "fused_edited_attention":
                continue
            for J in (1, 8) if edited else (0,):
                for rows in ROWS:
                    wanted = {"N": layer.N, "d": layer.d, "rows": rows}
                    if kernel == "fused_edited_attention":
                        yield f"{layer.N}, {layer.d}, {D}, {rows}", {**wanted, "D": D}
                    else:
                        name = f"{title}, N = {layer.N}, d = {layer.d}, " + (f"{J}, " if edited else "") + f"{rows}"
                        yield name, {**wanted, **({"J": J} if "J" in sizes else {})}


def _found(chip: str, backend: str, kernel: str, wanted: dict[str, Any]) -> dict[str, Any]:
    found = [
        each for each in predictions.read(chip, backend)
        if each["kernel"] == kernel and all(each[name] == value for name, value in wanted.items())
    ]  # fmt: skip
    (one,) = found
    return one


def _cell(each: dict[str, Any]) -> str:
    fill = f"{each['fill']:.2f}, " if each["kernel"] == "edited_attention" else ""
    return f"{each['microseconds']:.1f}, {each['of_floor']:.2f}, {fill}{each['bound']}"
