"""What a denoiser reads beside noisy latents and timesteps while a concept is learned, as its pipeline would give it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perfusion.base import denoiser
from perfusion.base.parts import added_conditioning, plain_module
from perfusion.errors import UnsupportedPipeline

__all__ = ["Encoded", "encode", "noise_of"]


class Encoded:
    """Captions as the text encoders give them: encodings [n, T, D'], and what goes into the denoiser beside them, row by row."""

    def __init__(self, encodings: Tensor, added: dict[str, Tensor | None] | None, mask: Tensor | None):
        self.encodings, self.added, self.mask = encodings, added, mask

    def arguments(self, rows: Tensor) -> dict[str, Any]:
        """The denoiser's further arguments for a batch whose row r has the caption rows[r]."""
        found: dict[str, Any] = {}
        if self.added is not None:
            found["added_cond_kwargs"] = {name: None if each is None else each[rows] for name, each in self.added.items()}
        if self.mask is not None:
            found["encoder_attention_mask"] = self.mask[rows]
        return found


def encode(pipe: Any, captions: list[str], device: torch.device, size: tuple[int, int] | None) -> Encoded:
    """Captions, encoded by the pipeline. size: height and width of the picture in pixels, which some denoisers read; None: no matter."""
    result = pipe.encode_prompt(prompt=captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    encodings, kind = result[0], added_conditioning(denoiser(pipe))
    height, width = size or (1, 1)
    if kind == "text_time":
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=encodings.dtype, device=device)
        return Encoded(encodings, {"text_embeds": result[2], "time_ids": sizes.expand(len(captions), -1)}, None)
    if kind == "resolution":
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if plain_module(denoiser(pipe)).use_additional_conditions:
            sides = torch.tensor([[float(height), float(width)]], dtype=encodings.dtype, device=device)
            ratio = torch.tensor([[height / width]], dtype=encodings.dtype, device=device)
            added = {"resolution": sides.expand(len(captions), -1), "aspect_ratio": ratio.expand(len(captions), -1)}
        return Encoded(encodings, added, result[1])
    if kind is not None:
        raise UnsupportedPipeline(f"training does not know what a denoiser with addition_embed_type={kind!r} reads beside the text.")
    return Encoded(encodings, None, None)


def noise_of(prediction: Tensor, channels: int) -> Tensor:
    """The noise [R, C, h, w] in what a denoiser predicts: some predict its variance beside it."""
    return prediction[:, :channels]
