"""Compares two commits of this repository: suites of bench/run.py, run alternately in a work tree of each.

    python bench/compare.py main HEAD --suite attention --suite layer            # on a GPU: the shapes of real UNets
    python bench/compare.py HEAD~1 HEAD --suite gates --quick --repeats 3 -- --device cpu

Order: base, head, head, base, ... so that drift affects both. A number is head's median over base's, for our candidates only,
each first divided by the expert's or the stock step's of its own run, because a busy machine slows both. It is the median over
the repeats, with the least and the largest; four repeats on one side of 1 are a difference. Cases measured by one commit only are
listed. Options after -- are passed to bench/run.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = ("cuda", "triton", "reference", "perfusion")
YARDSTICKS = ("expert", "stock", "step")  # that a time is divided by: the first of them that ran in the same case
CERTAIN = 4  # repeats, all on one side of 1, before a difference is called one: by chance one time in eight
Key = tuple[str, str, str]


def speeds(found: list[dict[str, Any]]) -> dict[Key, float]:
    """(suite, case, provider) -> median over the yardstick's in the same run, of what is ours."""
    ours = {}
    for row in found:
        yardstick = next((name for name in YARDSTICKS if name in row.get("ratios", {})), None)
        if row["gate"] == "passed" and yardstick and re.split(r"[ ,]", row["provider"])[0] in OURS:
            ours[row["suite"], row["case"], row["provider"]] = row["ratios"][yardstick][1]
    return ours


def compared(base: list[dict[Key, float]], head: list[dict[Key, float]]) -> list[str]:
    """Markdown: head over base, one line per case and backend, the repeats in pairs."""
    lines, alone = ["| suite | case | provider | head / base | least | largest |", "|---|---|---|---|---|---|"], []
    for key in dict.fromkeys(key for run in (*base, *head) for key in run):
        pairs = [b[key] / a[key] for a, b in zip(base, head) if key in a and key in b]
        if not pairs:
            alone.append(f"- measured by {'base' if any(key in run for run in base) else 'head'} alone: {', '.join(key)}")
            continue
        sign = "" if len(pairs) < CERTAIN or min(pairs) <= 1 <= max(pairs) else " slower" if min(pairs) > 1 else " faster"
        lines.append(f"| {' | '.join(key)} | {statistics.median(pairs):.3f}{sign} | {min(pairs):.3f} | {max(pairs):.3f} |")
    return lines + ([""] + alone if alone else [])


def run(tree: Path, options: list[str]) -> list[dict[str, Any]]:
    """One run of bench/run.py in a work tree, with its own code and case factory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, tree / "bench/run.py", *options, "--out", file]
        ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"error: bench/run.py of {tree.name} failed: {(ran.stderr.strip() or ran.stdout.strip()).splitlines()[-1]}")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def git(*arguments: str) -> str:
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"error: git {' '.join(arguments)}: {ran.stderr.strip()}")
    return ran.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("--suite", action="append", required=True, help="may be repeated")
    parser.add_argument("--repeats", type=int, default=4, help="runs of each commit")
    parser.add_argument("--quick", action="store_true", help="small shapes and few samples")
    parser.add_argument("--build", action="store_true", help="compile the CUDA kernels of each commit first")
    arguments, rest = sys.argv[1:], []
    if "--" in arguments:
        arguments, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    options = parser.parse_args(arguments)
    passed_on = [word for suite in options.suite for word in ("--suite", suite)] + ["--quick"] * options.quick + rest
    commits = {name: git("rev-parse", "--verify", f"{getattr(options, name)}^{{commit}}") for name in ("base", "head")}
    found: dict[str, list[dict[Key, float]]] = {"base": [], "head": []}
    with tempfile.TemporaryDirectory() as folder:
        trees = {name: Path(folder, name) for name in commits}
        try:
            for name, tree in trees.items():
                git("worktree", "add", "--quiet", "--detach", str(tree), commits[name])
                if options.build:
                    subprocess.run([sys.executable, "setup.py", "-q", "build_cuda", "--inplace"], cwd=tree, check=True)
            for number in range(options.repeats):
                for name in ("base", "head") if number % 2 == 0 else ("head", "base"):
                    found[name].append(speeds(run(trees[name], passed_on)))
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)
    print("\n".join(compared(found["base"], found["head"])))


if __name__ == "__main__":
    main()
