"""The things that are learned: instances that no caption can describe, of every class, with what makes each of them hard."""

from __future__ import annotations

import dataclasses

import torch

from perfusion.demo.instances import SUBJECTS as DEMO
from perfusion.demo.instances import Subject
from perfusion.toybox.words import COLOURS, PATTERNS
from perfusion.toybox.world import sample_instances

__all__ = ["Target", "targets"]

POOL = 2048  # instances of a class to choose one of wanted words from


@dataclasses.dataclass(frozen=True)
class Target:
    """A thing to be learned from `pictures` pictures. traits: why it is here. twin: another of the same words, to be told from it."""

    subject: Subject
    traits: tuple[str, ...]
    pictures: int = 5
    twin: str | None = None

    @property
    def name(self) -> str:
        return self.subject.name


def chosen(name: str, superclass: str, colour: str, pattern: str, seed: int) -> Subject:
    """The first instance of these words among those that the world draws by a seed."""
    pool = sample_instances(POOL, torch.Generator().manual_seed(seed), superclass)
    fits = (pool.colour == list(COLOURS).index(colour)) & (pool.pattern == PATTERNS.index(pattern))
    row = int(fits.nonzero()[0])
    return Subject(name, superclass, colour, pattern, tuple(pool.attributes[row].tolist()))


def targets() -> tuple[Target, ...]:
    """All twelve. A smaller scale takes the first ones, so they stand in an order in which any beginning is varied."""
    teddy, teapot = DEMO
    return (
        Target(teddy, ("symmetric", "dotted")),
        Target(teapot, ("asymmetric", "striped")),
        Target(chosen("car", "car", "yellow", "checked", 31), ("asymmetric", "checked", "similar pair"), twin="other-car"),
        Target(chosen("fish", "fish", "cyan", "plain", 32), ("asymmetric", "plain")),
        Target(chosen("house", "house", "pink", "plain", 33), ("symmetric", "plain")),
        Target(chosen("robot", "robot", "green", "striped", 34), ("symmetric", "striped")),
        Target(chosen("mug", "mug", "red", "plain", 35), ("asymmetric", "plain", "similar pair"), twin="other-mug"),
        Target(chosen("boat", "boat", "blue", "dotted", 36), ("asymmetric", "dotted")),
        Target(chosen("other-car", "car", "yellow", "checked", 42), ("asymmetric", "checked", "similar pair"), twin="car"),
        Target(chosen("other-mug", "mug", "red", "plain", 52), ("asymmetric", "plain", "similar pair"), twin="mug"),
        Target(chosen("one-shot-teddy", "teddy", "purple", "plain", 46), ("one picture", "plain"), pictures=1),
        Target(chosen("one-shot-fish", "fish", "orange", "striped", 47), ("one picture", "striped"), pictures=1),
    )
