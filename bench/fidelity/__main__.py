"""Makes the rows of the fidelity lab that are missing; run it again to go on.

python -m bench.fidelity                          # full scale, every section
python -m bench.fidelity --scale small --minutes 30
python -m bench.fidelity --section pairs --section peers
python -m bench.fidelity --list                   # what is missing, and what it would cost here
python -m bench.fidelity.report                   # tables of docs/fidelity.md and plots, from the rows
python -m bench.fidelity.real --model dreamshaper_8.safetensors --data dreambooth/dataset --clip CLIP --dino DINO
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import diffusers  # noqa: E402
import transformers  # noqa: E402

from bench.fidelity.lab import Lab, folder_of  # noqa: E402
from bench.fidelity.running import cost, make, missing  # noqa: E402
from bench.fidelity.scale import SCALES  # noqa: E402
from bench.fidelity.sections import SECTIONS, jobs  # noqa: E402

ROWS = ROOT / "bench" / "results" / "fidelity.jsonl"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    for library in (diffusers, transformers):  # which prefix a LoRA has not, and which caption was cut, would bury the rows
        library.utils.logging.set_verbosity_error()
    lab = Lab(SCALES[options.scale], options.work, folder=folder_of(options.model), device=options.device)
    every = [job for job in jobs(lab.scale, tuple(options.section or SECTIONS)) if _named(job.method.name, options.variant)]
    todo = missing(lab, every, options.out)
    if options.list:
        for job in todo:
            print(f"{job.section}: {job.method.name}: {', '.join(target.name for target in job.targets)}: {job.pictures} pictures")
    if not todo:
        print(f"Nothing is missing for these weights ({lab.digest}) at scale {lab.scale.name}. Tables: python -m bench.fidelity.report")
        return 0
    pictures, trainings, seconds = cost(lab, todo)
    print(
        f"{len(todo)} jobs: at most {pictures} pictures and {trainings} trainings of {lab.scale.steps} steps, about "
        f"{seconds / 60:.0f} processor minutes on this machine, by the speed just measured; what is there already is not made again.",
        flush=True,
    )
    if options.list:
        return 0
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    left = make(lab, todo, options.out, until=until, tell=lambda text: print(text, flush=True))
    print(f"{left} jobs left: run the command again." if left else "All rows are there. Tables and plots: python -m bench.fidelity.report")
    return 0


def _named(name: str, wanted: list[str] | None) -> bool:
    return not wanted or any(part in name for part in wanted)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated; by default all")
    parser.add_argument("--variant", action="append", help="methods whose name holds this; may be repeated; by default all")
    parser.add_argument("--model", default="toybox", help="toybox, or a folder with its parts and its judge")
    parser.add_argument("--out", type=Path, default=ROWS, help="a .jsonl file; rows are appended")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fidelity", help="concepts, weights of peers, sheets to look at")
    parser.add_argument("--minutes", type=float, help="begin no further job after so many minutes of the clock")
    parser.add_argument("--device", help="by default CUDA where there is one")
    parser.add_argument("--list", action="store_true", help="say what is missing and what it costs, and make nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
