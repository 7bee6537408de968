"""Denoisers that project the text encoder's output before their cross-attention reads it, as PixArt and Kolors do.

A concept lives where W_K and W_V read: its target, its superclass and the covariance are of projected encodings. A projection
looks at one token alone, so what `encode_prompt` gives stands for what it becomes, and is recognised in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfusion.base.parts import plain_module, text_encoding_width

if TYPE_CHECKING:
    import torch

__all__ = ["project_text", "text_input_width", "text_projection"]


def text_projection(model: Any) -> torch.nn.Module | None:
    """The module of a denoiser that projects text encodings, or None where cross-attention reads them as they are."""
    model = plain_module(model)
    config = getattr(model, "config", None)
    if getattr(config, "encoder_hid_dim_type", None) == "text_proj":
        return model.encoder_hid_proj
    # where an IP-Adapter has taken the place of the text's projection, that one is kept under another name
    return getattr(model, "caption_projection", None) or getattr(model, "text_encoder_hid_proj", None)


def text_input_width(model: Any) -> int | list[int]:
    """The width of the text encodings that a denoiser is given."""
    projection = text_projection(model)
    if projection is None:
        return text_encoding_width(model)
    return next(module.in_features for module in projection.modules() if hasattr(module, "in_features"))


def project_text(model: Any, encodings: torch.Tensor) -> torch.Tensor:
    """What the cross-attention layers read [R, T, D] of the text encoder's output [R, T, D']. The module is called, not read."""
    projection = text_projection(model)
    if projection is None:
        return encodings
    weight = next(projection.parameters())
    dtype = weight.dtype if weight.dtype.itemsize > 1 else encodings.dtype  # float8 is how weights are kept, not what is computed
    there = encodings if weight.is_meta else encodings.to(weight.device)
    return projection(there.to(dtype)).to(encodings.device)
