"""`perfusion info`: a model's family, its size, the memory it takes, and what will work."""

from __future__ import annotations

from typing import Annotated

import typer

from perfusion.cli.models import MODEL_HELP
from perfusion.cli.strict_json import strict_json


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model is, what memory it takes to train and to draw with, and what will work.

    Reads configurations and headers, and no weights. Memory is reckoned part by part for each number format: what the backward
    keeps is counted on shapes alone, attention being fused.

    Exit codes: 0 done, 2 bad input.
    """
    from perfusion.model_info import describe

    facts = describe(model)
    print(strict_json(facts) if json else "\n".join(_lines(facts)))


def _lines(facts: dict) -> list[str]:
    lines = [
        f"model        {facts['model']}",
        f"family       {facts['title']}{', inpainting' if facts['inpainting'] else ''}, predicts {facts['prediction_type']}",
        f"parameters   UNet {facts['parameters']['unet'] / 1e6:,.0f} M, text encoders {facts['parameters']['text_encoders'] / 1e6:,.0f} M, "
        f"VAE {facts['parameters']['vae'] / 1e6:,.0f} M",
        f"on disk      {facts['bytes'] / 1e9:.2f} GB",
        f"concepts     {facts['layers']} cross-attention layers, {facts['outputs']:,} outputs; text width {facts['encoding_dim']}",
        f"pictures     {facts['size']} x {facts['size']} pixels",
        "",
        f"{'memory in GB':22}{'drawing':>9}{'training':>10}{'--low-memory':>14}",
    ]
    for dtype, found in facts["memory"].items():
        lines.append(f"{dtype:22}{found['drawing']:9.1f}{found['training']:10.1f}{found['low_memory']:14.1f}")
    lines += ["", f"training     {facts['training_parts']} (bfloat16, --low-memory)", ""]
    lines += [f"{'ok ' if works else 'no '} {what}" for what, works in facts["works"].items()]
    return lines
