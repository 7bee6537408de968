"""`perfusion covariance`: compute, find or copy the covariance of a model's text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.checks import check_device, refuse_existing
from perfusion.cli.models import MODEL_HELP
from perfusion.cli.strict_json import strict_json


def covariance(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "toybox",
    captions: Annotated[
        Optional[Path], typer.Option(help="Captions to count: .txt, .jsonl or .csv. By default the built-in corpus.")
    ] = None,
    count: Annotated[
        Optional[int], typer.Option(min=1, help="At most this many captions. By default 20,000, or the whole file.")
    ] = None,
    output: Annotated[Optional[Path], typer.Option(help="Write the file here too: a file name, or a model's folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions encoded at once.")] = 64,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, mps; by default CUDA where there is one.")] = None,
    max_condition: Annotated[
        float, typer.Option(help="Shrink a covariance whose condition number exceeds this. [default: 1e6]", show_default=False)
    ] = 1e6,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Second moment of a model's text encodings, found or computed, and what it is like.

    Training does this by itself, and a concept file carries what drawing needs of it. Use it to look at the numbers, to
    count captions of your own, or to put covariance.safetensors into a model's folder.

    Exit codes: 0 done, 2 bad input, 3 a model that cannot be used, 130 interrupted: nothing is stored then.
    """
    from perfusion.covariance import FILE_NAME, get_covariance
    from perfusion.models import load_pipeline

    if not 1 < max_condition <= 1e12:
        raise ValueError(f"--max-condition must be above 1 and at most 1e12, got {max_condition:g}")
    if output is not None:
        output = output / FILE_NAME if output.is_dir() else output
        refuse_existing([output], overwrite)
    check_device(device)
    found = get_covariance(
        load_pipeline(model, device=device), captions, count=count, batch_size=batch_size, max_condition=max_condition
    )
    if output is not None:
        found = found.save(output)
    facts = {
        "model": model,
        "width": found.width,
        "source": found.source,
        "captions": found.captions,
        "tokens": found.tokens,
        "condition_before": found.condition_before,
        "condition": found.condition,
        "shrinkage": found.shrinkage,
        "max_condition": found.max_condition,
        "fingerprint": found.fingerprint,
        "text_encoder": found.text_encoder,
        "file": None if found.path is None else str(found.path),
    }
    print(strict_json(facts) if json else _describe(facts))


def _describe(facts: dict) -> str:
    shrinkage = "none"
    if facts["shrinkage"]:
        shrinkage = f"{facts['shrinkage']:.2g} of it is now the identity; it was {facts['condition_before']:.3g}"
    return "\n".join(
        (
            f"covariance   {facts['fingerprint']}, {facts['width']} x {facts['width']}, of {facts['model']}",
            f"captions     {facts['captions']:,} ({facts['tokens']:,} tokens) from {facts['source']}",
            f"condition    {facts['condition']:.3g} (limit {facts['max_condition']:.3g})",
            f"shrinkage    {shrinkage}",
            f"file         {facts['file'] or 'not written'}",
        )
    )
