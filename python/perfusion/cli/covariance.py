"""`perfusion covariance`: compute, find or copy the covariance of a model's text encoder."""

from __future__ import annotations

import sys
import warnings
from json import dumps
from pathlib import Path
from typing import Annotated, Optional

import typer

BAD_INPUT = 2  # something the caller named is missing or malformed
BAD_MODEL = 3  # the model loads, but has no covariance to give


def covariance(
    model: Annotated[str, typer.Option(help="A diffusers folder or hub name, or toybox.")] = "toybox",
    captions: Annotated[
        Optional[Path], typer.Option(help="Captions to count: .txt, .jsonl or .csv. By default the built-in corpus.")
    ] = None,
    count: Annotated[
        Optional[int], typer.Option(min=1, help="At most this many captions. By default 20,000, or the whole file.")
    ] = None,
    output: Annotated[Optional[Path], typer.Option(help="Write the file here too: a file name, or a model's folder.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions encoded at once.")] = 64,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, mps; by default the best there is.")] = None,
    max_condition: Annotated[
        Optional[float], typer.Option(help="Shrink a covariance whose condition number exceeds this. By default 1e6.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Second moment of a model's text encodings, found or computed, and what it is like.

    Training and generation do this by themselves; use it to look at the numbers, to count captions of your own, or to put
    covariance.safetensors into a model's folder. Exit codes: 0 done, 2 bad input, 3 a model that cannot be used.
    """
    from perfusion.base import UnsupportedPipeline
    from perfusion.covariance import FILE_NAME, MAX_CONDITION, CovarianceError, get_covariance
    from perfusion.models import load_pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            found = get_covariance(
                load_pipeline(model, device=device),
                captions,
                count=count,
                batch_size=batch_size,
                max_condition=MAX_CONDITION if max_condition is None else max_condition,
            )
            if output is not None:
                found = found.save(output / FILE_NAME if output.is_dir() else output)
        except KeyboardInterrupt:
            print("interrupted: nothing was stored", file=sys.stderr)
            raise typer.Exit(130) from None
        except (UnsupportedPipeline, CovarianceError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(BAD_MODEL) from None
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None

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
    print(dumps(facts) if json else _describe(facts))


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
