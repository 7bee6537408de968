"""`LoadedConcept`: a concept in a pipeline and how it is set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from perfusion.concept import Concept
from perfusion.settings import BIAS, STRENGTH, TEMPERATURE

__all__ = ["LoadedConcept", "Schedule", "value_at"]

# a number, one number a step (the last holds on), or a function of the step, which counts from 0
Schedule = Any  # float | Sequence[float] | Callable[[int], float]


@dataclasses.dataclass
class LoadedConcept:
    """What prompts need of a concept, and its settings.

    superclass     the word that is written in its place
    embeddings     one input embedding [width] per text encoder
    concept        its vectors; None while it is still being learned
    strength, bias, temperature   numbers or schedules over the steps
    key_lock       "local": keys from the edit; "global": from the same prompt with the superclass word (arXiv 2305.01644, section 4)
    gate           "similarity": as published; "word": by the places of the words (DESIGN.md, "Gates by word")
    """

    superclass: str
    embeddings: Sequence[Tensor]
    concept: Concept | None = None
    strength: Schedule = STRENGTH.default
    bias: Schedule = BIAS.default
    temperature: Schedule = TEMPERATURE.default
    key_lock: str = "local"
    gate: str = "similarity"

    @property
    def global_lock(self) -> bool:
        return self.key_lock == "global"


def value_at(schedule: Schedule, step: int) -> float:
    """The number that a schedule gives at a step."""
    if callable(schedule):
        return float(schedule(step))
    if isinstance(schedule, Sequence):
        return float(schedule[min(step, len(schedule) - 1)])
    return float(schedule)
