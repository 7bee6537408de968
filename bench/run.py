"""Measures our operators against the library's and an expert's, and appends one row per candidate to a file.

    python bench/run.py --suite attention --out bench/results/attention.jsonl      # on a GPU: bfloat16 at the shapes of real UNets
    python bench/run.py --suite all --quick --out /tmp/rows.jsonl                  # small shapes in seconds, on any computer
    python bench/report.py /tmp/rows.jsonl                                         # tables of ratios

Nothing is timed that did not agree with the float64 formula in the same run, by the tolerance of the tests. Candidates take
turns; on a GPU with a cold L2 cache, between CUDA events. On a CPU only ratios between candidates of one run mean
anything. A candidate that cannot run has a row that says why. The status is 1 if a kernel of ours gave a wrong result, or failed in a
call that it supports; all rows are written first. If it is interrupted it tells what lacks rows, and the status is 75. Suites: see
bench/suites.

    python bench/run.py --suite layer --compile max-autotune --missing --out FILE   # goes on where an earlier run was stopped
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]  # the cases of the tests, and the packages as they are here

import torch  # noqa: E402

from bench import roofline, rows, suites  # noqa: E402
from bench.measure import Options  # noqa: E402
from perfusion_kernels import backend  # noqa: E402

MODELS = ("toybox", *roofline.UNETS, "sd15-thin", "sdxl-thin")  # thin: the blocks at a tenth of the width
UNSUPPORTED = backend.BackendUnavailable.__name__
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: another run goes on


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = Options(
        device=torch.device(options.device),
        dtype=getattr(torch, options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")),
        quick=options.quick,
        models=tuple(options.model or MODELS),
        rows=tuple(options.rows or (1, 2, 8, 16)),
        seconds=0.05 if options.quick else options.seconds,
        rounds=(3, 5) if options.quick else (options.rounds, 10 * options.rounds),
        clock=options.clock,
        tokens=tuple(options.tokens or ()),
        places=tuple(options.places or ()),
        compile=tuple(mode for mode in options.compile or ["default"] if mode != "none"),
    )
    rows.provenance(options.device)  # the commit is the one whose code was loaded
    names = suites.NAMES if "all" in options.suite else options.suite
    if options.missing:
        parts = suites.missing(names, chosen, rows.read(options.out) if options.out.exists() else ())
    else:
        parts = [(suite, suites.measured(suite, chosen)) for suite in names]
    left, count, failed = [name for name, _ in parts], 0, []
    try:
        for _, part in parts:
            for row in part:
                rows.append(options.out, row)
                count += 1
                what = f"{row['suite']}, {row['case']}, {row['provider']}"
                if row["provider"].split()[0] in backend.ORDER and row.get("error", UNSUPPORTED) != UNSUPPORTED:
                    failed.append(f"{what}: {row['reason']}")
                print(f"{what}: {_said(row)}", flush=True)
            del left[0]
    except KeyboardInterrupt:
        pass  # said below, by what is left
    print(f"{count} rows in {options.out}. Tables: python bench/report.py {options.out}", flush=True)
    if left:
        print(f"stopped; not all rows are there of {len(left)}: {'; '.join(left)}", file=sys.stderr, flush=True)
    errors = "\n".join([f"error: kernels of ours were wrong or failed, {len(failed)} times:", *failed])
    if left:
        if failed:
            print(errors, file=sys.stderr, flush=True)
        os._exit(1 if failed else STOPPED)  # any other exit waits, for up to 300 s, for what torch's processes still compile
    if failed:
        raise SystemExit(errors)


def _said(row: dict) -> str:
    """Times only where they mean something."""
    if "overhead_us" in row:
        return f"{row['overhead_us']:.1f} µs beside the work, of {row['limit_us']:.0f} allowed"
    if "file_bytes" in row:
        return f"{row['file_bytes']} bytes {row['gate']}"
    if row["gate"] == "counted":
        return f"{row['what']}: {row['value']:,} {row['unit']}"
    if row["gate"] != "passed":
        return row["reason"]
    return f"passed, {row['repeats']} samples" if row["device"] == "cpu" else f"{row['median_us']:.1f} µs"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", required=True, choices=[*suites.NAMES, "all"], help="may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file; rows are appended")
    parser.add_argument("--quick", action="store_true", help="small shapes and few samples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="by default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; by default all; toybox is trained only")
    parser.add_argument("--rows", action="append", type=int, help="batch rows; may be repeated; by default 1, 2, 8 and 16")
    parser.add_argument("--tokens", action="append", type=int, help="image tokens: layers with so many alone; may be repeated")
    parser.add_argument("--places", action="append", type=int, help="concepts of a row; may be repeated; by default those of the suite")
    modes = ["none", "default", "max-autotune"]
    parser.add_argument("--compile", action="append", choices=modes, help="modes of torch.compile that take part; may be repeated")
    parser.add_argument(
        "--missing", action="store_true", help="those problems alone that have no row yet of --compile, beside cuda and the experts alone"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate of a case, within the limits of --rounds")
    parser.add_argument("--rounds", type=int, default=10, help="samples at least; at most ten times as many")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall", help="process: a CPU's time for this process alone")
    parser.add_argument("--threads", type=int, help="of a CPU")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out to run on the CPU")
    if options.missing and not (set(options.suite) <= set(suites.PLANNED) and set(options.compile or ["none"]) - {"none"}):
        parser.error(f"--missing is for --suite {' and '.join(suites.PLANNED)}, and for a mode of torch.compile, as --compile max-autotune")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what it runs in the background
    main()
