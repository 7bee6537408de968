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
from perfusion.client_concepts import ClientConcepts, HeldConcepts
from perfusion.concept import Concept
from perfusion.concept_store import ConceptStore
from perfusion.engine import engine_of
from perfusion.errors import UnsupportedPipeline
from perfusion.families import family_by_encoding_dim
from perfusion.prompts import Mention
from perfusion.requests import RowRequest, check_schedule
from perfusion.settings import SETTINGS

__all__ = ["Mention", "RowRequest", "UNetConcepts"]


class UNetConcepts:
    """The concepts of one UNet, from creation to `detach`. A context manager: leaving it detaches.

    unet: a module that is called with `encoder_hidden_states` [R, T, D], whose cross-attention layers are diffusers' `Attention`
    or have its `is_cross_attention`, `to_q`, `to_k`, `to_v`, `to_out`, `heads` and `processor`. capacity, exact, store: as in
    `perfusion.attach`; a Mention names a concept of the store by its id. UnsupportedPipeline when there is no such layer, or the
    layers read encodings of several widths.
    """

    def __init__(self, unet: torch.nn.Module, *, capacity: int = 64, exact: bool = False, store: ConceptStore | None = None):
        self.unet, self.exact = plain_module(unet), exact
        self.base = _base(self.unet)
        self._width = text_input_width(self.unet) if text_projection(self.unet) else self.base.encoding_dim
        self._concepts = ClientConcepts(self.base, capacity, store)
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
        name = self._concepts.load(concept, name, "UNet", self._check_name)
        self._engine.follow()
        return name

    def _check_name(self, name: str, concept: Concept) -> None:
        if self._concepts.is_loaded(name):
            raise ValueError(f"a concept {name!r} is loaded already. Unload it, or load this one under another name=.")

    def unload(self, name: str) -> None:
        """Forget a concept. Encodings whose requests name it are no longer edited."""
        self._require_attached()
        with self._engine.between_forwards:
            self._concepts.unload(name)
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
        with self._engine.between_forwards:
            self._requests[encodings] = wanted
            self._engine.forget()

    def _check(self, where: str, request: RowRequest, encodings: Tensor) -> None:
        for mention in request.mentions:
            if mention.name not in self._concepts:
                self._concepts.loaded(mention.name)  # says that it is not, and what is
            for key in SETTINGS:
                if getattr(mention, key) is not None:
                    check_schedule(f"{where}, {mention.name!r}", key, getattr(mention, key))
        if any(not 0 <= place < encodings.shape[1] for places in request.places for place in places):
            raise ValueError(f"{where}: places must lie within the {encodings.shape[1]} positions of an encoding, got {request.places}")
        if request.key_encoding is not None and request.key_encoding.shape != encodings.shape[1:]:
            raise ValueError(f"{where}: key_encoding must be {list(encodings.shape[1:])}, got {list(request.key_encoding.shape)}")
        names = [mention.name for mention in request.mentions]
        try:
            self.hold(names).require_independent([names])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

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

    # what the engine asks

    def has_concepts(self) -> bool:
        return bool(self._concepts)

    def compiled(self) -> bool:
        return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in self.unet.modules())

    def hold(self, names: Sequence[str]) -> HeldConcepts:
        return self._concepts.hold(names)

    def rows_of(self, encodings: Tensor) -> dict[int, RowRequest]:
        return self._requests.get(encodings, {})

    def doubt(self, encodings: Tensor, rows: Sequence[int]) -> None:
        """Nothing: who makes the encodings knows what is in them."""


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
