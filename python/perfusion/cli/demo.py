"""`perfusion demo`: see it work, on any computer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.checks import check_device


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("perfusion-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the folder holds of an earlier demo.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each concept.")] = 400,
    samples: Annotated[int, typer.Option(min=6, help="Pictures that each score is taken over.")] = 66,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, mps; by default CUDA where there is one.")] = None,
) -> None:
    """Learn a teddy and a teapot from five pictures each, and put the one into the other.

    Uses toybox, the model that comes with the package: nothing is downloaded, and two CPU cores take a few minutes. Writes two concept
    files, the pictures, and report.md and report.html with scores of what was learned. Files that are there already are
    replaced with --overwrite only.

    Exit codes: 0 done, 2 bad input, 130 interrupted.
    """
    from perfusion.demo import run_demo

    check_device(device)
    report = run_demo(output, steps=steps, samples=samples, device=device, overwrite=overwrite)
    files = sorted(path for path in output.glob("*") if path.is_file())
    print("Wrote " + ", ".join(str(path) for path in files) + ".")
    print(f"Open {report.with_suffix('.html')} in a browser, or read {report}.")
