"""Instructions and bytes by class of the loop over a warp's tiles of `edited_attention`, for 77 keys.

    python bench/kernels/tile_instructions.py [--arch 90] [--width 64 …] [--source csrc]      needs nvcc and cuobjdump, no GPU

Compiles a copy of the sources in which the run-time conditions of a call with 77 keys, without regions and with 16-byte accesses are
replaced by constants, so that untaken branches are not counted. Per 16 rows, so that tiles of 16 and of 32 rows compare.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from nvcc_matrix import ROOT, cuobjdump

CONSTANTS = {  # file: (condition, its constant)
    "query_stream.cuh": (
        ("static_cast<int>(p.T)", "77"), ("plan.wide_query", "true"), ("plan.wide_output", "true"), ("plan.stages == 2", "true"),
        ("key_regions,\n", "nullptr,\n"),
    ),
    "attention_tiles.cuh": (("if (!(scale > 0.0f)) {", "if (false) {"),),
}  # fmt: skip
CLASSES = {
    "tensor": "HMMA", "shared, matrices": "LDSM", "shared, others": "LDS|STS", "global": "LDG|STG|LDGSTS|LDGDEPBAR|DEPBAR",
    "exp2": "MUFU", "float": "FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|F2F|HADD|FSWZ", "shuffle": "SHFL",
}  # fmt: skip
BYTES = {"LDSM.16.M88.4": 512, "LDSM.16.MT88.4": 512, "LDSM.16.M88.2": 256, "LDSM.16.MT88.2": 256}


def loops(sass: str) -> dict[str, list[str]]:
    """For each function, the instructions of the loop with the most HMMA instructions."""
    found = {}
    for part in sass.split("Function : ")[1:]:
        name, lines = part.split()[0], []
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", part):
            lines.append((int(address, 16), text.strip()))
        best: list[str] = []
        for at, text in lines:
            target = re.match(r"BRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < at:
                body = [each for where, each in lines if int(target[1], 16) <= where <= at]
                if sum(each.startswith("HMMA") for each in body) > sum(each.startswith("HMMA") for each in best):
                    best = body
        found[name] = best
    return found


def counted(body: list[str]) -> tuple[Counter, Counter]:
    """Instructions by class, and bytes that a warp loads or stores by class."""
    instructions, moved = Counter(), Counter()
    for text in body:
        operation = text.split()[0]
        kind = next((name for name, names in CLASSES.items() if re.match(rf"({names})\b", operation)), "integer and control")
        instructions[kind] += 1
        size = BYTES.get(operation) or (512 if ".128" in operation else 256 if ".64" in operation else 128)
        if kind.startswith(("shared", "global")) and "DEPBAR" not in operation:
            moved[kind] += size
    return instructions, moved


def compile_loop(source: Path, arch: str, widths: list[int]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(source, copy)
        for file, changes in CONSTANTS.items():
            text = (copy / file).read_text()
            for old, new in changes:
                if old not in text and source == ROOT / "csrc":  # other commits may lack a condition
                    raise ValueError(f"{file} lacks a condition to replace: {old!r}. CONSTANTS must follow the sources.")
                text = text.replace(old, new)
            (copy / file).write_text(text)
        text = (copy / "attention_widths.h").read_text()
        kept = [line for line in text.split("\n") if not line.startswith("  CASE(") or int(line.split("(")[1].split(")")[0]) in widths]
        (copy / "attention_widths.h").write_text("\n".join(kept))
        target = Path(folder) / "loop.cubin"
        command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", str(copy / "edited_attention_float16.cu"), "-o", str(target)]
        subprocess.run(command, check=True)
        return subprocess.run([cuobjdump(), "-sass", str(target)], check=True, capture_output=True, text=True).stdout


NAMES = (*CLASSES, "integer and control")
TITLES = ("head width", "rows of a tile", "all", *NAMES, "bytes, shared", "bytes, global")


def rows(source: Path, arch: str, widths: list[int]) -> list[list[int]]:
    """A line of the table, TITLES, for each tile of 80 keys; counts for 16 rows."""
    found = []
    for name, body in loops(compile_loop(source, arch, widths)).items():
        numbers = [int(number) for number in re.findall(r"Li(\d+)E", name)]
        d, groups, m = *numbers[:2], numbers[2] if len(numbers) > 2 else 1
        if groups != 5:
            continue
        instructions, moved = counted(body)
        shared = moved["shared, matrices"] + moved["shared, others"]
        cells = (sum(instructions.values()), *(instructions[each] for each in NAMES), shared, moved["global"])
        found.append([d, 16 * m, *(round(cell / m) for cell in cells)])
    return sorted(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="90")
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--source", type=Path, default=ROOT / "csrc")
    options = parser.parse_args()
    print("| " + " | ".join(TITLES) + " |\n|" + "---|" * len(TITLES))
    for row in rows(options.source, options.arch, options.width or [40, 64, 80, 160]):
        print("| " + " | ".join(map(str, row)) + " |")
