"""A method learns a thing into files, and makes a pipeline draw it by a word. Ours, in every variant, and the plain superclass word."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import perfusion.edit
import perfusion.fast_path
from bench.fidelity.lab import Lab
from bench.fidelity.learning import Recipe, concept_of
from bench.fidelity.subjects import Target
from perfusion.concept import Concept
from perfusion.handle import attach
from perfusion.requests import Request

__all__ = ["Applied", "Base", "Learned", "Method", "Ours"]


@dataclasses.dataclass
class Learned:
    """What one training gave: where its files lie, and facts (seconds, steps, bytes, trained, memory)."""

    target: Target
    path: Path
    facts: dict[str, Any]


@dataclasses.dataclass
class Applied:
    """A pipeline that draws learned things, and how prompts call them: {} -> `words`; `make` turns a text into what is drawn."""

    pipe: Any
    words: list[str]
    make: Any = str

    def prompt(self, text: str, *places: int) -> str:
        return self.make(text.format(*(self.words[place] for place in places)))


class Method:
    """name: the row's. joint: whether many things can be drawn in one batch. combines: whether two can stand in one prompt."""

    name: str
    joint = False
    combines = False

    def learn(self, lab: Lab, target: Target) -> Learned:
        raise NotImplementedError

    def applied(self, lab: Lab, learned: Sequence[Learned]) -> contextlib.AbstractContextManager[Applied]:
        raise NotImplementedError


class Base(Method):
    """The superclass words, of the model as it is."""

    name, joint, combines = "superclass words", True, True

    def learn(self, lab: Lab, target: Target) -> Learned:
        return Learned(target, lab.work, {"seconds": 0.0, "steps": 0, "bytes": 0, "trained": 0, "memory": 0})

    @contextlib.contextmanager
    def applied(self, lab: Lab, learned: Sequence[Learned]) -> Iterator[Applied]:
        yield Applied(lab.pipe, [each.target.subject.superclass for each in learned])


@dataclasses.dataclass
class Ours(Method):
    """This project. settings: of every prompt (`Request`). halves: a region each, left and right. approximate: a_j = c_j in place of the
    Gram solve. scales: factors of o*_V − W_V s by the resolution of a layer, "coarse" and "fine": a strength, and so a bias, per layer.
    floor: of gates by word."""

    name: str
    recipe: Recipe = Recipe()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    halves: bool = False
    approximate: bool = False
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    floor: float | None = None
    joint = True
    combines = True

    def learn(self, lab: Lab, target: Target) -> Learned:
        return Learned(target, *concept_of(lab, target, self.recipe))

    @contextlib.contextmanager
    def applied(self, lab: Lab, learned: Sequence[Learned]) -> Iterator[Applied]:
        names = [each.target.name for each in learned]
        with attach(lab.pipe) as handle, contextlib.ExitStack() as undo:
            if self.approximate:
                undo.enter_context(overlaps_ignored())
            if self.floor is not None:
                undo.enter_context(mock.patch("perfusion.batch_plan.WORD_GATE_FLOOR", self.floor))
            for each in learned:
                concept = Concept.load(each.path)
                handle.load(scaled(concept, lab.pipe, self.scales) if self.scales else concept)
            yield Applied(
                lab.pipe, [f"<{name}>" for name in names], lambda text: Request(text, **self.settings, **self._regions(lab, text, names))
            )

    def _regions(self, lab: Lab, text: str, names: list[str]) -> dict[str, Any]:
        used = [name for name in names if f"<{name}>" in text] if self.halves and " next to " in text else []
        if len(used) != 2:
            return {}
        used.sort(key=lambda name: text.index(f"<{name}>"))
        size = lab.pipe.unet.config.sample_size * lab.pipe.vae_scale_factor
        left = torch.zeros(size, size)
        left[:, : size // 2] = 1
        return {"regions": {used[0]: left, used[1]: 1 - left}}


@contextlib.contextmanager
def overlaps_ignored() -> Iterator[None]:
    """Compose as the paper's approximation does: each concept's component as if it were the prompt's only one (a_j = c_j)."""
    users, exact = (perfusion.edit, perfusion.fast_path), perfusion.edit.gates_of

    def approximate(encodings: torch.Tensor, tables: Any, rows: Any) -> Any:
        parts = []
        for place in range(rows.index.shape[1]):
            one = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
            one = {name: None if value is None else value[:, place : place + 1] for name, value in one.items()}
            parts.append(exact(encodings, tables, dataclasses.replace(rows, **one)))
        return tuple(torch.cat(each, dim=-1) for each in zip(*parts))

    try:
        for module in users:
            module.gates_of = approximate
        yield
    finally:
        for module in users:
            module.gates_of = exact


def scaled(concept: Concept, pipe: Any, scales: dict[str, float]) -> Concept:
    """The concept with o*_V − W_V s multiplied, layer by layer: "coarse" layers lie in the middle of the UNet, "fine" ones at its ends."""
    from perfusion.base import cross_attention_layers

    layers, parts = cross_attention_layers(pipe.unet), []
    widest = max(layer.to_v.out_features for layer in layers.values())
    for name, layer in layers.items():
        start = (layer.to_v.weight.detach().float() @ concept.superclass_encoding.float()).cpu()
        factor = scales["coarse" if layer.to_v.out_features == widest else "fine"]
        parts.append(torch.lerp(start, concept.value_output(name).float(), factor))
    return dataclasses.replace(concept, value_outputs=torch.cat(parts))
