"""What a denoiser reads beside noisy latents and timesteps while a concept is learned, as its pipeline would give it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perfusion.base import denoiser
from perfusion.base.parts import added_conditioning, plain_module
from perfusion.errors import UnsupportedPipeline
from perfusion.families import CONDITIONINGS

__all__ = ["beside_text", "encode", "noise_of"]


def encode(pipe: Any, captions: list[str], device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    """Captions as the pipeline encodes them: encodings [n, T, D'] and, where the denoiser reads it, pooled text [n, P]; and its mask."""
    result = pipe.encode_prompt(prompt=captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    kind = added_conditioning(denoiser(pipe))
    if kind not in CONDITIONINGS:
        raise UnsupportedPipeline(f"training does not know what a denoiser with addition_embed_type={kind!r} reads beside the text.")
    if kind == "resolution":
        return [result[0]], result[1]
    return [result[0], result[2]] if kind == "text_time" else [result[0]], None


def beside_text(model: torch.nn.Module, read: list[Tensor], size: tuple[int, int]) -> dict[str, Any]:
    """The denoiser's `added_cond_kwargs` for rows of which `read` [R, ...] was encoded; size: height and width in pixels."""
    kind, (height, width) = added_conditioning(model), size
    like = dict(dtype=read[0].dtype, device=read[0].device)
    if kind == "text_time":
        sizes = torch.tensor([height, width, 0, 0, height, width], **like)
        return {"added_cond_kwargs": {"text_embeds": read[1], "time_ids": sizes.expand(len(read[1]), -1)}}
    if kind is None:
        return {}
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if plain_module(model).use_additional_conditions:
        sides, ratio = torch.tensor([[float(height), float(width)]], **like), torch.tensor([[height / width]], **like)
        added = {"resolution": sides.expand(len(read[0]), -1), "aspect_ratio": ratio.expand(len(read[0]), -1)}
    return {"added_cond_kwargs": added}


def noise_of(prediction: Tensor, channels: int) -> Tensor:
    """The noise [R, C, h, w] in what a denoiser predicts: some predict its variance beside it."""
    return prediction[:, :channels]
