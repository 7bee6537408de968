"""Counters of Nsight Compute for one run of our kernels at the shapes that take most of the time: L2 and memory traffic, issue slots.

    python bench/nsight.py --out rows.jsonl      # needs a GPU, ncu on PATH and permission to read counters

A row per kernel; a run that cannot be profiled has one row with the reason, and the status is 1, unless there is no ncu or no permission to
read counters. The profiled calls are those of `--target`.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

METRICS = {  # by ncu's names
    "time": "gpu__time_duration.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "memory_bytes": "dram__bytes.sum",
    "issue_active": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor_active": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}
SHAPES = ({"B": 2, "N": 4096, "H": 8, "d": 40}, {"B": 2, "N": 1024, "H": 20, "d": 64}, {"B": 16, "N": 1024, "H": 20, "d": 64})
SCALES = {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "ns": 1e-9, "us": 1e-6, "ms": 1e-3}  # of base units, which differ by version
KERNELS = "^edited_(attention|projection)_kernel$"  # of csrc/: those that `target` calls, none of torch's
LIMIT = 25  # seconds


def target() -> None:
    """One call of our attention at each shape, and one of the projection, by the compiled kernels."""
    import torch

    from perfusion_kernels import edited_attention, edited_projection
    from tests.kernels import cases

    def case(**sizes: int) -> cases.Case:
        return cases.make(T=77, S=3, channels=1, dtype=torch.bfloat16, device="cuda", drawn_on="cuda", full=True, **sizes)

    for shape in SHAPES:
        one = case(**shape, D=16, J=1)
        edited_attention(one.query, one.key, one.value, backend="cuda", validate=False)
    edited_projection(**case(B=2, N=1, H=1, d=12480, D=768, J=1).arguments("edited_projection"), backend="cuda", validate=False)
    torch.cuda.synchronize()


def measured() -> Iterator[dict[str, Any]]:
    """The rows' own parts."""
    if shutil.which("ncu") is None:
        yield reason("ncu is not on PATH", may_be=True)
        return
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--kernel-name", f"regex:{KERNELS}"]
    command += ["--clock-control", "none", "--metrics", ",".join(METRICS.values())]
    try:
        ran = subprocess.run([*command, sys.executable, __file__, "--target"], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        yield reason(f"ncu took more than {LIMIT} s")
        return
    found = list(kernels(ran.stdout))
    if not found:
        lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "ERR" in line or "Error" in line] or lines
        said = errors[-1].strip() if errors else f"status {ran.returncode}"
        yield reason(f"ncu profiled nothing: {said}", may_be="ERR_NVGPUCTRPERM" in said)
    yield from found
    if found and ran.returncode:
        yield reason(f"the profiled program ended with status {ran.returncode}")


def reason(why: str, may_be: bool = False) -> dict[str, Any]:
    """A row of what was not profiled. may_be: the reason is the machine, not our kernels."""
    return {"case": "ours", "provider": "ncu", "gate": "not passed", "reason": why, "failed": not may_be}


def kernels(text: str) -> Iterator[dict[str, Any]]:
    """One dict per launch from the raw page of ncu, a CSV table whose second line has the units: metrics in bytes, seconds, percent."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    table = list(csv.DictReader(lines[start:]))
    units, launches = table[0], table[1:]
    for number, launch in enumerate(launches):
        values = {
            name: float(launch[metric].replace(",", "")) * SCALES.get(units[metric], 1)
            for name, metric in METRICS.items()
            if launch.get(metric) not in (None, "", "n/a")
        }
        kernel = re.sub(r"^(void )?(perfusion::)?|\(.*$", "", launch["Kernel Name"])
        yield {"case": f"launch {number + 1}", "provider": kernel, "gate": "profiled", "grid": launch.get("Grid Size"), **values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a .jsonl file; rows are appended")
    parser.add_argument("--target", action="store_true", help="only make the calls")
    options = parser.parse_args()
    if options.target:
        return target()
    if options.out is None:
        parser.error("--out is needed")
    import torch

    from bench import rows

    common = {"dtype": "bfloat16", "shapes": {}, "quick": False, **rows.provenance("cuda" if torch.cuda.is_available() else "cpu")}
    failed = False
    for row in measured():
        failed |= row.get("failed", False)
        rows.append(options.out, {"suite": "nsight", **row, **common})
        print(row.get("reason") or f"{row['provider']}: {row}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
