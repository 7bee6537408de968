"""`perfusion info`: a model's family, its size, the memory it takes, and what will work."""

from __future__ import annotations

from typing import Annotated

import typer

from perfusion.cli.models import MODEL_HELP
from perfusion.cli.strict_json import strict_json
from perfusion.files import size_text

PARTS = {"unet": "UNet", "text_encoders": "text encoders", "vae": "VAE"}


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model is, what memory it takes to train and to draw with, and what will work.

    Reads configurations and headers, and no weights. Memory is reckoned part by part for each number format: what the backward
    keeps is counted on shapes alone, attention being fused. Of a model on the hub the configurations are fetched, and no weights.

    Exit codes: 0 done, 2 bad input.
    """
    from perfusion.model_info import describe

    facts = describe(model)
    print(strict_json(facts) if json else "\n".join(_lines(facts)))


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.0f} M" if parameters >= 1e7 else f"{parameters / 1e6:.2g} M" if parameters >= 1e5 else f"{parameters:,}"


def _lines(facts: dict) -> list[str]:
    lines = [
        f"model        {facts['model']}",
        f"family       {facts['title']}{', inpainting' if facts['inpainting'] else ''}, predicts {facts['prediction_type']}",
        "parameters   " + ", ".join(f"{title} {_count(facts['parameters'][name])}" for name, title in PARTS.items()),
        f"on disk      {size_text(facts['bytes'])}",
        f"concepts     {facts['layers']} cross-attention layers, {facts['outputs']:,} outputs; text width {facts['encoding_dim']}",
        f"pictures     {facts['size']} x {facts['size']} pixels",
        "",
        f"{'memory':14}{'drawing':>12}{'training':>12}{'--low-memory':>14}",
    ]
    for dtype, found in facts["memory"].items():
        drawing, training, low = (size_text(found[key] * 1e9) for key in ("drawing", "training", "low_memory"))
        lines.append(f"{dtype:14}{drawing:>12}{training:>12}{low:>14}")
    lines += ["", f"training     {facts['training_parts']} (bfloat16, --low-memory)", ""]
    lines += [f"{'ok ' if works else 'no '} {what}" for what, works in facts["works"].items()]
    return lines
