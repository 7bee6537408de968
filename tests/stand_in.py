"""What the command line needs, at a size that tests can afford: a model folder, and concepts for that model.

The model is `tiny_sd`: every part of a Stable Diffusion 1.x checkpoint, random weights, 16 x 16 pixels. Its tokenizer knows
the words of `tests.perfusion.tiny.WORDS`.
"""

from pathlib import Path

import torch

from perfusion.base import describe_base
from perfusion.concept import Concept
from tests.perfusion.tiny import tiny_sd


def save_model(folder: Path, **shape) -> Path:
    """Write the model in diffusers' folder format; `shape` as `tiny_sd` takes it."""
    tiny_sd(**shape).save_pretrained(folder)
    return folder


def save_concept(file: Path, superclass: str, seed: int = 0, **shape) -> Path:
    """Write a concept for that model, named as the file. Its gate opens at its own word; what it draws is noise."""
    pipe = tiny_sd(**shape)
    base = describe_base(pipe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        encoding = pipe.encode_prompt(f"a {superclass}", "cpu", 1, False)[0][0, 2]
    target = encoding + 0.1 * torch.randn(encoding.shape, generator=generator)
    Concept(
        name=file.stem,
        superclass=superclass,
        base=base,
        value_outputs=torch.randn(base.outputs, generator=generator),
        target=target,
        metric_target=target,
        superclass_encoding=encoding,
        word_embeddings=tuple(torch.randn(width, generator=generator) for width in base.text_widths),
        covariance="0123456789abcdef",
    ).save(file, torch.float32)
    return file
