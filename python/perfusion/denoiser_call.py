"""`DenoiserCall`: what is read from a call of a denoiser, whatever kind of model it is.

A UNet and a transformer name their arguments alike and order them differently; some project the text before cross-attention reads
it, and some mask its padding. The engine asks here, and sees encodings [R, T, D] as the layers read them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfusion.base import project_text, text_projection
from perfusion.layer_state import parameter_stamp
from perfusion.regions import padding_bits

__all__ = ["DenoiserCall"]


class DenoiserCall:
    """The calls of one denoiser. `projects`: whether it projects the text encoder's output."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.projects = text_projection(model) is not None
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._places = {name: place for place, name in enumerate(names)}
        self._sample = "sample" if "sample" in self._places else names[0] if names else "sample"
        self._scales = "down_blocks" in model._modules  # diffusers' UNets scale LoRA in their forward, and its transformers do not
        self._texts: Any = WeakTensorKeyDictionary()  # encodings -> (their stamp, that of the projection, what it makes of them)
        self._masks: Any = WeakTensorKeyDictionary()  # a text mask -> (its stamp, what closes the fast path, the bits of padding)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of the denoiser's forward by name; None where it was not given."""
        place = self._places.get(name, len(args))
        return kwargs.get(name, args[place] if place < len(args) else None)

    def encodings(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What the text encoder gave [R, T, D'], or None."""
        found = self.argument("encoder_hidden_states", args, kwargs)
        return found if isinstance(found, Tensor) else None

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """Height and width of the latents."""
        return tuple(self.argument(self._sample, args, kwargs).shape[-2:])

    def lora_scale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """What the denoiser multiplies LoRA by in this call, which `cross_attention_kwargs` say."""
        given = self.argument("cross_attention_kwargs", args, kwargs) if self._scales else None
        return 1.0 if given is None else given.get("scale", 1.0)

    def stamp(self) -> tuple[Any, ...]:
        """Changes with the weights of the text's projection."""
        projection = text_projection(self.model) if self.projects else None
        return () if projection is None else parameter_stamp(projection)

    def text(self, encodings: Tensor) -> Tensor:
        """What the cross-attention layers read [R, T, D] of encodings [R, T, D'], computed anew when these or the weights change."""
        if not self.projects:
            return encodings
        if torch.is_grad_enabled() and encodings.requires_grad:
            return self._project(encodings)
        stamp, known = self.stamp(), self._texts.get(encodings)
        if known is None or known[1] != stamp or not _unchanged(encodings, known[0]):
            known = _stamp(encodings), stamp, self._project(encodings)
            self._texts[encodings] = known
        return known[2]

    def row(self, encoding: Tensor, like: Tensor) -> Tensor:
        """What the layers read of one row [T, D'] that is no part of the batch, where and as encodings `like` are."""
        return self.text(encoding.to(like)[None])[0] if self.projects else encoding

    def _project(self, encodings: Tensor) -> Tensor:
        load(self.model)
        return project_text(self.model, encodings)

    def mask_obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any], encodings: Tensor) -> str | None:
        """Why the text mask of a call is more than one of padding; None where it is not."""
        mask = self.argument("encoder_attention_mask", args, kwargs)
        return None if mask is None else self._mask(mask, encodings)[1]

    def padding(self, args: tuple[Any, ...], kwargs: dict[str, Any], encodings: Tensor) -> Tensor | None:
        """The padding of a call as bit sets [R, T] int32 for `key_regions`, the same object while the mask stays; None without any."""
        mask = self.argument("encoder_attention_mask", args, kwargs)
        return None if mask is None else self._mask(mask, encodings)[2]

    def _mask(self, mask: Tensor, encodings: Tensor) -> tuple[Any, str | None, Tensor | None]:
        known = self._masks.get(mask)
        if known is None or not _unchanged(mask, known[0]):
            known = _stamp(mask), *_read(mask, encodings)
            self._masks[mask] = known
        return known


def load(model: torch.nn.Module) -> None:
    """Have accelerate load a model that it offloads as a whole: it would do so when the model is called, and parts of it are called now."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)


def _read(mask: Tensor, encodings: Tensor) -> tuple[str | None, Tensor | None]:
    if mask.shape != encodings.shape[:2]:
        return f"the batch has a text mask of shape {list(mask.shape)}", None
    read = mask != 0
    if not (read | (mask == 0)).all() or not ((mask == 1) | ~read).all() or not read.any(1).all():
        return "the batch has a text mask of other numbers than 0 and 1", None
    return None, None if read.all() else padding_bits(read)


def _stamp(tensor: Tensor) -> int | Tensor:
    """What a later change in place is noticed by: an inference tensor counts no versions, so a copy."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, stamp: int | Tensor) -> bool:
    return torch.equal(tensor, stamp) if isinstance(stamp, Tensor) else tensor._version == stamp
