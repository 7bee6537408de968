"""`UNetConcepts`: concepts in a UNet without a pipeline. Encodings and what their rows want go in; steps, or keys and values, come out.

    with UNetConcepts(unet) as concepts:
        concepts.load("teddy.safetensors")
        concepts.request(encodings, [None, RowRequest((Mention("teddy", strength=0.8),))])
        noise = unet(latents, timestep, encoder_hidden_states=encodings).sample    # a step; the UNet's own code runs it
        key, value = concepts.keys_values(encodings)                               # or what an exported UNet takes

Whoever makes the encodings puts `concept.word_embeddings` where the concept's word stands, as `perfusion.attach` does for a pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfusion.base import Base, cross_attention_layers, layer_width, text_input_width, text_projection
from perfusion.base.parts import plain_module
from perfusion.concept import Concept, check_name
from perfusion.edit import Tables, tables_of
from perfusion.engine import engine_of
from perfusion.errors import UnsupportedPipeline
from perfusion.families import family_by_encoding_dim
from perfusion.loaded_concept import LoadedConcept
from perfusion.prompts import Mention
from perfusion.requests import RowRequest, check_schedule
from perfusion.settings import SETTINGS
from perfusion_kernels import ConceptBank

__all__ = ["Mention", "RowRequest", "UNetConcepts"]


class UNetConcepts:
    """The concepts of one UNet, from creation to `detach`. A context manager: leaving it detaches.

    unet: a module that is called with `encoder_hidden_states` [R, T, D], whose cross-attention layers are diffusers' `Attention`
    or have its `is_cross_attention`, `to_q`, `to_k`, `to_v`, `to_out`, `heads` and `processor`. capacity, exact: as in
    `perfusion.attach`. UnsupportedPipeline when there is no such layer, or the layers read encodings of several widths.
    """

    def __init__(self, unet: torch.nn.Module, *, capacity: int = 64, exact: bool = False):
        self.unet, self.exact = plain_module(unet), exact
        self.base = _base(self.unet)
        self._width = text_input_width(self.unet) if text_projection(self.unet) else self.base.encoding_dim
        self._bank = ConceptBank(capacity, self.base.encoding_dim, self.base.outputs)
        self._loaded: dict[str, LoadedConcept] = {}
        self._requests: Any = WeakTensorKeyDictionary()  # encodings -> row -> RowRequest
        self._attached = True
        self._engine = engine_of(self.unet)
        self._engine.add(self)

    def __enter__(self) -> UNetConcepts:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._attached:
            self.detach()

    def detach(self) -> None:
        """Remove every hook and processor from the UNet."""
        self._require_attached()
        self._attached = False
        self._engine.remove(self)

    def load(self, concept: str | os.PathLike[str] | Concept, name: str | None = None) -> str:
        """Make a concept known under a name, by default its own; returns the name. ValueError as `Handle.load`."""
        self._require_attached()
        concept = concept if isinstance(concept, Concept) else Concept.load(concept)
        name = concept.name if name is None else name
        check_name(name)
        reason = concept.base.mismatch(self.base)
        if reason is not None:
            raise ValueError(f"concept {concept.name!r} cannot be used with this UNet: {reason}")
        if name in self._loaded:
            raise ValueError(f"a concept {name!r} is loaded already. Unload it, or load this one under another name=.")
        vectors = {"target": concept.target, "metric_target": concept.metric_target, "superclass": concept.superclass_encoding}
        self._bank.add(name, **vectors, value_output=concept.value_outputs)
        self._loaded[name] = LoadedConcept(
            concept.superclass, concept.word_embeddings, concept, bias=concept.bias, temperature=concept.temperature
        )
        self._engine.follow()
        return name

    def unload(self, name: str) -> None:
        """Forget a concept. Encodings whose requests name it are no longer edited."""
        self._require(name)
        self._bank.remove(name)
        del self._loaded[name]
        for encodings, rows in list(self._requests.items()):
            if any(mention.name == name for request in rows.values() for mention in request.mentions):
                del self._requests[encodings]
        self._engine.forget()
        self._engine.follow()

    def request(self, encodings: Tensor, rows: Sequence[RowRequest | Sequence[Mention] | None]) -> None:
        """Say what the rows of encodings [R, T, D] want, for as long as this tensor lives: a later call with it replaces the former.

        rows: one for each row: None for no concept, the concepts alone, or a RowRequest, which also has the places of their words,
        regions, the way of the gates, and for the global lock the encoding that gives the keys. What a Mention leaves open is as
        in the concept's file. ValueError says what does not fit.
        """
        self._require_attached()
        if encodings.dim() != 3 or encodings.shape[-1] != self._width or len(rows) != len(encodings):
            raise ValueError(
                f"request: encodings must be [R, T, {self._width}] with one request for each of R rows, got "
                f"{list(encodings.shape)} and {len(rows)} requests"
            )
        given = {row: each for row, each in enumerate(rows) if each is not None}
        wanted = {row: each if isinstance(each, RowRequest) else RowRequest(tuple(each)) for row, each in given.items()}
        wanted = {row: each for row, each in wanted.items() if each.mentions}
        for row, each in wanted.items():
            self._check(f"row {row}", each, encodings)
        self._requests[encodings] = wanted
        self._engine.forget()

    def _check(self, where: str, request: RowRequest, encodings: Tensor) -> None:
        for mention in request.mentions:
            self._require(mention.name)
            for key in SETTINGS:
                if getattr(mention, key) is not None:
                    check_schedule(f"{where}, {mention.name!r}", key, getattr(mention, key))
        if any(not 0 <= place < encodings.shape[1] for places in request.places for place in places):
            raise ValueError(f"{where}: places must lie within the {encodings.shape[1]} positions of an encoding, got {request.places}")
        if request.key_encoding is not None and request.key_encoding.shape != encodings.shape[1:]:
            raise ValueError(f"{where}: key_encoding must be {list(encodings.shape[1:])}, got {list(request.key_encoding.shape)}")
        try:
            self._bank.index([[mention.name for mention in request.mentions]])
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('ConceptBank: ')}") from None

    def keys_values(self, encodings: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Edited K and V [R, T, O] of all layers at a step, side by side, for a UNet that takes them as inputs."""
        self._require_attached()
        return self._engine.keys_values(encodings, step)

    def explain(self) -> list[str]:
        """What the UNet did in its last forward and why; a sentence each."""
        self._require_attached()
        return self._engine.explain()

    def memory(self) -> dict[str, int]:
        """Bytes that are held: slots of keys and values, stacked weights, edits."""
        self._require_attached()
        return self._engine.memory()

    def _require_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("these concepts are detached from their UNet; UNetConcepts(unet) makes new ones.")

    def _require(self, name: str) -> LoadedConcept:
        self._require_attached()
        if name not in self._loaded:
            raise ValueError(f"no concept named {name!r} is loaded; loaded are: {', '.join(sorted(self._loaded)) or 'none'}")
        return self._loaded[name]

    # what the engine asks

    def has_concepts(self) -> bool:
        return bool(self._loaded)

    def compiled(self) -> bool:
        return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in self.unet.modules())

    def concept(self, name: str) -> LoadedConcept:
        return self._loaded[name]

    def rows_of(self, encodings: Tensor) -> dict[int, RowRequest]:
        return self._requests.get(encodings, {})

    def doubt(self, encodings: Tensor, rows: Sequence[int]) -> None:
        """Nothing: who makes the encodings knows what is in them."""

    def tables(self, names: list[str], device: torch.device) -> Tables:
        return tables_of(self._bank, {name: self._loaded[name].concept for name in names}, names, device)


def _base(unet: torch.nn.Module) -> Base:
    """Of a UNet alone; it says nothing of text encoders."""
    layers = cross_attention_layers(unet)
    reads = {getattr(layer.to_v, "base_layer", layer.to_v).in_features for layer in layers.values()}
    if len(reads) != 1:
        came = f"layers that read encodings of the widths {sorted(reads)}" if reads else "no cross-attention layer"
        raise UnsupportedPipeline(f"a {type(unet).__name__} is not supported: it has {came}; all of one width are needed.")
    width = reads.pop()
    family = family_by_encoding_dim(width)
    return Base(
        family=family.id,
        encoding_dim=width,
        text_widths=family.text_widths or (width,),
        layers={name: layer_width(layer) for name, layer in layers.items()},
        text_encoder="",
    )
