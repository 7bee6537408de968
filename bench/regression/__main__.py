"""Times operators, a step, load and swap beside a saved run, as ratios to a yardstick of the same run.

    python -m bench.regression                 # the first run is saved; later ones are compared with it
    python -m bench.regression --save          # saves this run in its place
    python -m bench.regression --limit 1.3     # how many times slower, beside the yardstick, is an error (status 1)

A time of another moment or machine says nothing, so none is kept: only medians divided by the yardstick's median in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]
SAVED = ROOT / "build" / "bench-regression.json"
CASES = ROOT / "bench" / "regression" / "test_speed.py"
YARDSTICK = "test_yardstick"


def measured(arguments: list[str]) -> dict[str, float]:
    """Case -> median over the yardstick's, from a run of pytest-benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES, f"--benchmark-json={file}"]
        ran = subprocess.run([*command, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
        if ran.returncode:
            raise SystemExit(f"error: the benchmarks failed with status {ran.returncode}: python -m pytest {CASES.relative_to(ROOT)}")
        return ratios(json.loads(file.read_text(encoding="utf-8")))


def ratios(run: dict) -> dict[str, float]:
    medians = {case["name"]: case["stats"]["median"] for case in run["benchmarks"]}
    yardstick = medians.pop(YARDSTICK)
    return {name: median / yardstick for name, median in medians.items()}


def compared(now: dict[str, float], before: dict[str, float], limit: float) -> tuple[list[str], list[str]]:
    """Lines of a table, and the cases that are slower than the limit allows."""
    lines, slower = [f"{'case':44}{'saved':>10}{'now':>10}{'now/saved':>11}"], []
    for name in sorted({*now, *before}):
        a, b = before.get(name), now.get(name)
        if a is None or b is None:
            lines.append(f"{name:44}{'new' if a is None else 'was there':>10}")
            continue
        lines.append(f"{name:44}{a:10.2f}{b:10.2f}{b / a:11.2f}")
        if b > limit * a:
            slower.append(name)
    return lines, slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep this run for later ones")
    parser.add_argument("--saved", type=Path, default=SAVED, help="where it is kept")
    parser.add_argument("--limit", type=float, default=1.5, help="by default 1.5: a shared processor is no quiet place")
    options, rest = parser.parse_known_args()  # the rest is for pytest
    now = measured(rest)
    if options.save or not options.saved.exists():
        options.saved.parent.mkdir(parents=True, exist_ok=True)
        options.saved.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        print("\n".join(f"{name:44}{value:10.2f}" for name, value in sorted(now.items())))
        print(f"saved in {options.saved}: medians over that of a product of matrices")
        return
    lines, slower = compared(now, json.loads(options.saved.read_text(encoding="utf-8")), options.limit)
    print("\n".join(lines))
    if slower:
        raise SystemExit(f"error: slower than {options.limit} times the saved run: {', '.join(slower)}")


if __name__ == "__main__":
    main()
