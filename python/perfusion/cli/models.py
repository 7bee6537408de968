"""Options that name a model and what is loaded beside it, the same for every command."""

from __future__ import annotations

import enum
import math
import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

MODEL_HELP = "toybox, a diffusers folder, one .safetensors checkpoint, or an id on the Hugging Face hub: user/model."


class Precision(str, enum.Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Prediction(str, enum.Enum):
    epsilon = "epsilon"
    v_prediction = "v_prediction"


VaeOption = Annotated[Optional[Path], typer.Option(help="A VAE to use instead of the model's own: a file or a folder.")]
PredictionOption = Annotated[Optional[Prediction], typer.Option(help="What a checkpoint file predicts, where it does not say it itself.")]
TextBitsOption = Annotated[
    Optional[int],
    typer.Option(min=8, max=8, metavar="8", help="Keep text encoders in 8 bits (optimum-quanto).", show_default=False),
]
EmbeddingOption = Annotated[
    Optional[list[str]],
    typer.Option(metavar="FILE", help="A textual inversion, or WORD=FILE; a bare name is looked for beside the model. May be repeated."),
]
LoraOption = Annotated[
    Optional[list[str]],
    typer.Option(metavar="FILE", help="A LoRA, or FILE:0.8 for its strength; a bare name is looked for beside the model. May be repeated."),
]


def add_parts(pipe: Any, model: str, embeddings: list[str] | None, loras: list[str] | None) -> list[str]:
    """Load textual inversions and LoRAs into a pipeline; returns the words that prompts may write."""
    from perfusion.models import add_embedding, add_lora

    words = []
    for text in embeddings or ():
        word, equals, file = text.partition("=")
        if not equals or os.path.exists(os.path.expanduser(text)):
            word, file = None, text
        words.append(add_embedding(pipe, file, token=word, model=model))
    for text in loras or ():
        file, scale = _file_and_scale(text)
        add_lora(pipe, file, scale=scale, model=model)
    return words


def _file_and_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; what follows the last colon is of the name where it is no number (C:/x.safetensors), or the file is there."""
    file, _, scale = text.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        return text, 1.0
    if not file or os.path.isfile(os.path.expanduser(text)):
        return text, 1.0
    if not math.isfinite(number):
        raise ValueError(f"the strength of a LoRA must be a finite number, got {scale!r} in --lora {text}.")
    return file, number
