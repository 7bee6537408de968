"""`Concept`: everything that one learned word is, and nothing else.

Symbols: D text width, O = sum of d_l outputs of all cross-attention layers. With the encoding e of a token,

    energy      i* . m                          m = C^-1 i*, at any scale
    similarity  c(e) = (e . m) / (i* . m)       1 at e = i*
    gate        g(e) = sigmoid((c(e) - bias) / temperature)
    value       W_V (e - c i*) + g o*_V         per layer; keys likewise with o*_K = W_K s (the key lock)

The scale of m cancels in c, and in the Gram solve over several concepts as well (the Gram matrix is then not symmetric).
So a concept stores m with its largest entry scaled to 1 and needs no covariance at run time.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfusion.base import Base
from perfusion.concept_fields import check_fields, check_name
from perfusion.concept_file import decode, read_bytes
from perfusion.concept_file.encoding import encode
from perfusion.files import user_path, write_bytes
from perfusion.settings import BIAS, TEMPERATURE

__all__ = ["Concept", "check_name"]


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Concept:
    """One concept. Tensors are floating point, finite, detached, on one device; treat them as read-only.

    name                 `[a-z0-9][a-z0-9_-]{0,31}`; prompts write it as <name>
    superclass           what the concept is one of: "teddy"
    base                 the base it was trained for; decides all shapes
    value_outputs        [O] o*_V of all layers, concatenated in the order of `base.layers`
    target               [D] i*, the encoding at the concept word
    metric_target        [D] C^-1 i* up to scale; stored with largest absolute entry 1
    superclass_encoding  [D] s, the mean encoding at the superclass word; the key lock is o*_K = W_K s
    word_embeddings      one [width] per text encoder: the learned input embedding of the word
    key_outputs          [O] o*_K, only when the keys were trained without the lock; otherwise None
    bias, temperature    the gate's defaults at inference; free at run time
    covariance           short fingerprint of C: concepts combine exactly only when it agrees; "" when unknown
    recipe               how it was trained: a small flat dict of JSON values, 248 bytes as JSON text
    created              UTC time, "2025-01-31T12:00:00Z"
    license, author      free text; these and the superclass are one printable line of at most 64 bytes in UTF-8

    ValueError says which field broke which rule, and what came.
    """

    name: str
    superclass: str
    base: Base
    value_outputs: Tensor
    target: Tensor
    metric_target: Tensor
    superclass_encoding: Tensor
    word_embeddings: tuple[Tensor, ...]
    key_outputs: Tensor | None = None
    bias: float = BIAS.default
    temperature: float = TEMPERATURE.default
    covariance: str = ""
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    created: str = dataclasses.field(default_factory=_now)
    license: str = ""
    author: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        self._set("recipe", dict(self.recipe))
        if not isinstance(self.base, Base):
            raise ValueError(f"a concept's base must be a perfusion.base.Base, got {type(self.base).__name__}")
        if not self.base.text_encoder:
            raise ValueError("a concept's base must know its text encoders; this one is of a pipeline without them")
        self._check_tensors()

    def _check_tensors(self) -> None:
        outputs, width = self.base.outputs, self.base.encoding_dim
        self._set("value_outputs", _vector("value_outputs", self.value_outputs, outputs))
        if self.key_outputs is not None:
            self._set("key_outputs", _vector("key_outputs", self.key_outputs, outputs))
        for field in ("target", "metric_target", "superclass_encoding"):
            self._set(field, _vector(field, getattr(self, field), width))
        if isinstance(self.word_embeddings, Tensor) or len(self.word_embeddings) != len(self.base.text_widths):
            raise ValueError(f"a concept's word_embeddings must be a tuple of {len(self.base.text_widths)}, one per text encoder")
        words = zip(self.word_embeddings, self.base.text_widths)
        self._set("word_embeddings", tuple(_vector(f"word_embeddings[{i}]", w, size) for i, (w, size) in enumerate(words)))

        largest = self.metric_target.abs().max()
        if largest == 0:
            raise ValueError("a concept's metric_target must not be all zero")
        if largest != 1:  # idempotent, so that saving and loading changes no bit
            self._set("metric_target", self.metric_target / largest)
        if not self.energy > 0:
            raise ValueError(
                f"a concept's energy target . metric_target must be positive, got {self.energy:.3g}. "
                "C^-1 is positive definite, so the two vectors do not belong together."
            )

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    @functools.cached_property
    def energy(self) -> float:
        """i* . m, in the scale of the stored `metric_target`; positive."""
        return torch.dot(self.target.cpu().double(), self.metric_target.cpu().double()).item()

    def similarity(self, encodings: Tensor) -> Tensor:
        """c(e) for encodings [..., D]: [...] in float32; 1 at the target itself."""
        return encodings.float() @ self.metric_target.float() / self.energy

    def gate(self, encodings: Tensor, bias: float | None = None, temperature: float | None = None) -> Tensor:
        """g(e) for encodings [..., D]: [...] in float32, between 0 and 1. By default at the concept's own bias and temperature."""
        bias = self.bias if bias is None else bias
        temperature = self.temperature if temperature is None else temperature
        return torch.sigmoid((self.similarity(encodings) - bias) / temperature)

    def value_output(self, layer: str) -> Tensor:
        """o*_V of one layer [d_l], a view. KeyError on a layer that the base does not have."""
        return self.value_outputs[self._slice(layer)]

    def key_output(self, layer: str) -> Tensor | None:
        """o*_K of one layer [d_l], a view; None with the key lock."""
        where = self._slice(layer)
        return None if self.key_outputs is None else self.key_outputs[where]

    def _slice(self, layer: str) -> slice:
        slices = self.base.slices
        if layer not in slices:
            raise KeyError(f"concept {self.name!r} has no layer {layer!r}; its layers are {', '.join(slices)}")
        return slices[layer]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Concept:
        """The same concept with its tensors on a device and in a floating point type."""
        moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self._single_tensors().items()}
        words = tuple(word.to(device=device, dtype=dtype) for word in self.word_embeddings)
        return dataclasses.replace(self, **moved, word_embeddings=words)

    def _single_tensors(self) -> dict[str, Tensor]:
        fields = ("value_outputs", "target", "metric_target", "superclass_encoding", "key_outputs")
        return {field: getattr(self, field) for field in fields if getattr(self, field) is not None}

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Writes the concept file, or leaves what was there. Missing folders are made.

        ValueError when the concept does not fit `dtype`, OSError from the file system.
        """
        data = self.to_bytes(dtype)
        Concept.from_bytes(data, source=str(path))
        write_bytes(user_path(path), data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], revision: str | None = None) -> Concept:
        """Reads and checks a concept file; tensors come as float32 on the CPU.

        path may also be an id on the Hugging Face hub, "user/concept" or "user/concept@revision": its file is fetched, unless the
        cache has it. ConceptFileError when it is not a concept file, damaged, hostile, or of another format version; OSError when
        it cannot be opened; HubError (a ValueError) when the hub does not give it.
        """
        from perfusion import hub

        if hub.hub_id(path) is not None:
            path = hub.concept_file(str(path), revision)
        return cls.from_bytes(read_bytes(user_path(path)), source=str(path))

    def to_bytes(self, dtype: torch.dtype = torch.float16) -> bytes:
        """The concept file's bytes; equal concepts give equal bytes. ValueError when a tensor does not fit `dtype`."""
        return encode(self, dtype)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "concept file") -> Concept:
        """A concept from a file's bytes; `source` names them in errors. ConceptFileError as `load`."""

        def make(word_embeddings: tuple[np.ndarray, ...], **fields: Any) -> Concept:
            tensors = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}
            return cls(word_embeddings=tuple(map(torch.from_numpy, word_embeddings)), **tensors)

        return decode(data, make, source)

    def __repr__(self) -> str:
        lock = "" if self.key_outputs is None else ", keys not locked"
        return (
            f"Concept({self.name!r}, superclass={self.superclass!r}, base={self.base.family}, layers={len(self.base.layers)}, "
            f"outputs={self.base.outputs}, bias={self.bias:g}, temperature={self.temperature:g}{lock})"
        )


def _vector(field: str, value: Any, size: int) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != (size,):
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a concept's {field} must be a floating point tensor of shape ({size},), got {came}")
    if not torch.isfinite(value).all():
        raise ValueError(f"a concept's {field} must be finite, but it holds NaN or infinity")
    return value.detach().contiguous()
