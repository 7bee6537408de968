"""Measures what a machine can in a quarter of an hour: rows, tables and plots. `make bench` runs it.

    python bench/all.py                       # into build/bench: rows.jsonl, report.md, plots/*.png, log.txt
    python bench/all.py --minutes 5 --out FOLDER
    python bench/all.py --minutes 2 --quick   # tiny models: a check that it works here

Stages, most important first, each a process of its own with the remaining time; one that does not finish keeps its rows
and is named in the report, as is every candidate that could not run, with the reason. On a GPU the kernels are measured too; a longer
run of these is bench/gpu.sh.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One call of bench/run.py. against: the baseline of its table. share: its largest share of the whole time."""

    name: str
    options: str
    against: str
    share: float = 0.2

    @property
    def file(self) -> str:
        return "-".join(re.findall(r"\w+", self.name)) + ".jsonl"


STAGES = (
    Stage("static", "--suite static", "stock"),
    Stage("storage", "--suite storage", "perfusion", 0.1),
    Stage("step", "--suite step --model toybox --model sd15-thin --model sdxl-thin --rounds 20 --seconds 2 --compile none", "stock"),
    Stage("tenants", "--suite tenants --model toybox --rounds 15 --seconds 2", "perfusion, 1"),
    Stage("swap", "--suite swap --model toybox --rounds 10 --seconds 2", "step"),
    Stage("capacity", "--suite capacity --rounds 40 --seconds 4", "16 resident", 0.15),
    Stage("startup", "--suite startup --rounds 3 --seconds 2", "import torch"),
    Stage("train", "--suite train --model toybox --clock process --compile none --rounds 7 --seconds 3", "plain"),
    Stage("step, SD 1.5's shape", "--suite step --model sd15 --rounds 8 --seconds 5 --compile none", "stock"),
    Stage("overhead", "--suite overhead", "eager call", 0.05),
    Stage("operators", "--suite gates --suite projection --suite attention --suite fused --suite layer --quick", "expert"),
    Stage("step, compiled", "--suite step --model toybox --rounds 20 --seconds 2", "stock", 0.3),
    Stage("step, SDXL's shape", "--suite step --model sdxl --rounds 6 --seconds 5 --compile none", "stock", 0.3),
)
ON_GPU = (Stage("attention", "--suite attention --model sd15 --model sdxl --rows 2 --rows 16 --places 1 --seconds 0.3", "expert graph"),)


def run(stage: Stage, out: Path, seconds: float, more: list[str]) -> str:
    """Why a stage did not finish; "" if it did. Its rows go to a file of its own."""
    file = out / "rows" / stage.file
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *stage.options.split(), *more, "--out", str(file)]
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n== {' '.join(command)}\n")
        log.flush()
        try:
            ran = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s, its share of the time; {_count(file)} rows were there"
    if ran.returncode:
        said = (out / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
        return f"ended with status {ran.returncode}: {said}"
    return ""


def _count(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def main() -> None:
    from bench import plot, report, rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14, help="by default 14, and a minute for tables and plots")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--quick", action="store_true", help="tiny models and few samples: whether it works here")
    options = parser.parse_args()
    import torch

    stages = STAGES + (ON_GPU if torch.cuda.is_available() else ())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "log.txt").write_text("", encoding="utf-8")
    for stage in stages:
        (options.out / "rows" / stage.file).unlink(missing_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS")
    more = ["--quick"] * options.quick + (["--threads", threads] if threads else [])
    start, whole, missing, texts = time.monotonic(), 60 * options.minutes, {}, []
    for stage in stages:
        left = whole - (time.monotonic() - start)
        if left < 10:
            missing[stage.name] = "no time was left"
        else:
            print(f"==> {stage.name}, {left / 60:.1f} minutes left", flush=True)
            reason = run(stage, options.out, min(left, stage.share * whole), more)
            if reason:
                missing[stage.name] = reason
                print(f"    {reason}", flush=True)
    found = []
    for stage in stages:
        file = options.out / "rows" / stage.file
        mine = rows.read(file) if file.exists() else []
        found += mine
        if mine:
            texts.append(report.tables(mine, stage.against))
    (options.out / "rows.jsonl").unlink(missing_ok=True)
    for row in found:
        rows.append(options.out / "rows.jsonl", row)
    texts += ["**not finished**\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in missing.items()) + "\n"] if missing else []
    (options.out / "report.md").write_text(f"# Measured at {rows.commit()}\n\n" + "\n".join(texts), encoding="utf-8")
    drawn = plot.read([ROOT / "bench" / "results" / "model.jsonl"]) + found
    for name, (_, chosen, _) in plot.PLOTTED.items():
        if mine := chosen(drawn):
            plot.draw(name, mine, options.out / "plots")
    print(f"{len(found)} rows: {options.out / 'report.md'}, {options.out / 'plots'}")
    if not found:
        raise SystemExit(f"error: nothing was measured: {options.out / 'log.txt'}")


if __name__ == "__main__":
    main()
