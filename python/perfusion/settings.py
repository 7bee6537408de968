"""What can be set of a concept, with defaults and ranges: the one place where they stand.

Prompts, `handle.set`, concept files, training and the command line take them from here.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

__all__ = [
    *("BIAS", "GATES", "KEY_LOCKS", "SETTINGS", "STRENGTH", "TEMPERATURE", "TRAINING_BIAS", "TRAINING_TEMPERATURE"),
    *("WORD_GATE_FLOOR", "Setting", "one_of"),
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A number that can be set: its default, its range, and a sentence of help."""

    name: str
    default: float
    low: float
    high: float
    help: str

    def holds(self, value: Any) -> bool:
        """Whether a value is a finite number in the range."""
        number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        return number and self.low <= value <= self.high


STRENGTH = Setting("strength", 1.0, 0.0, 4.0, "How much of a concept: 0 is the plain superclass, 1 the concept as learned.")
BIAS = Setting("bias", 0.70, -2.0, 2.0, "Similarity that half opens the gate. Lower: more of the concept; higher: more of the prompt.")
TEMPERATURE = Setting("temperature", 0.15, 1e-3, 10.0, "Width of the gate: how sharply the concept is told from other words.")
SETTINGS = {setting.name: setting for setting in (STRENGTH, BIAS, TEMPERATURE)}

# while training (arXiv 2305.01644, section 5), in the ranges above
TRAINING_BIAS, TRAINING_TEMPERATURE = 0.75, 0.1

KEY_LOCKS = ("local", "global")  # keys of the edited encoding, or of the superclass prompt (arXiv 2305.01644, section 4)
GATES = ("similarity", "word")  # as published, or by the places of the words (DESIGN.md, "Gates by word")
# The least gate at a concept's own word under gate="word": what the published gate is there in first place, .47 to .89 with the default
# bias and temperature, from similarities of .68 to 1.01 on toybox (bench/recognition.py);
# no picture of two things there depends on it up to .7 (docs/fidelity.md)
WORD_GATE_FLOOR = 0.7


def one_of(allowed: tuple[str, ...]) -> str:
    """The values of a setting that has no number, for a message."""
    return " or ".join(f'"{each}"' for each in allowed)
