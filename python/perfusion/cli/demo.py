"""`perfusion demo`: see it work, on any computer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.checks import check_device


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("perfusion-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the folder holds of an earlier demo.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each concept.")] = 250,
    samples: Annotated[int, typer.Option(min=6, help="Pictures that each score is taken over.")] = 24,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, mps; by default CUDA where there is one.")] = None,
) -> None:
    """Learn a teddy and a teapot from five pictures each, and put the one into the other.

    Uses toybox, the model that comes with the package: nothing is downloaded, and two CPU cores take some five minutes. Writes two
    concept files, the pictures that they were learned from, overview.png, and report.html: a page with all results that can be
    sent as it is. Files that are there already are replaced with --overwrite only.

    Exit codes: 0 done, 2 bad input, 130 interrupted.
    """
    from perfusion.demo import run_demo

    check_device(device)
    result = run_demo(output, steps=steps, samples=samples, device=device, overwrite=overwrite)
    for name, value in result.figures.items():
        print(f"{value:.2f}  {name}")
    print(f"Open {result.report} in a browser.")
