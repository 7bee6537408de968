"""`TrainingConfig`: every setting of a training, its default, and the file that keeps it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

__all__ = ["TrainingConfig"]

TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a photo of the {}",
    "a picture of the {}",
    "a photo of my {}",
    "a photo of one {}",
    "a photo of a nice {}",
)
# what may differ between a run and its continuation: where it writes, how often, and how far it goes on
_FREE = ("validation_every", "validation_prompts", "checkpoint_every", "checkpoint_limit", "tensorboard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a concept is learned. ValueError names the setting, its rule and what came.

    superclass: one word for what the thing is, one token of the tokenizer. name: what prompts will write as <name>.
    steps, batch_size: optimiser steps and pictures per step. learning_rate: of the value outputs o*_V.
    word_learning_rate: of the word embedding. bias, temperature: of the gate while training. inference_bias,
    inference_temperature: the defaults written into the concept. ema_decay: of the target input i*. flip: probability of a
    mirrored picture; 0 for things with writing or one arm up. key_lock: False also trains the keys (a larger file and a
    weaker prompt; there to compare). resolution: side of the training square in pixels; None is the model's own.
    instance_prompts: captions for pictures without a .txt file beside them, "{}" standing for the concept.
    seed: fixes everything. gradient_checkpointing: less memory, more time. validation_every, checkpoint_every: steps
    between grids and checkpoints, 0 for none. checkpoint_limit: how many checkpoints to keep.
    """

    superclass: str
    name: str
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 0.03
    word_learning_rate: float = 0.006
    bias: float = 0.75
    temperature: float = 0.1
    inference_bias: float = 0.70
    inference_temperature: float = 0.15
    ema_decay: float = 0.99
    flip: float = 0.5
    key_lock: bool = True
    resolution: int | None = None
    instance_prompts: tuple[str, ...] = TEMPLATES
    seed: int = 0
    gradient_checkpointing: bool = False
    validation_every: int = 100
    validation_prompts: tuple[str, ...] = ("a photo of a {}", "a {}")
    checkpoint_every: int = 100
    checkpoint_limit: int = 2
    tensorboard: bool = True
    license: str = ""
    author: str = ""

    def __post_init__(self) -> None:
        for field in ("instance_prompts", "validation_prompts"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
            for prompt in getattr(self, field):
                self._check(field, prompt.count("{}") == 1, 'hold "{}" once, for the concept', prompt)
        for field in ("steps", "batch_size"):
            self._check(field, getattr(self, field) >= 1, "be at least 1")
        for field in ("validation_every", "checkpoint_every"):
            self._check(field, getattr(self, field) >= 0, "be 0 (never) or a number of steps")
        self._check("checkpoint_limit", self.checkpoint_limit >= 1, "be at least 1")
        for field in ("learning_rate", "word_learning_rate", "temperature", "inference_temperature"):
            self._check(field, getattr(self, field) > 0, "be positive")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "lie in [0, 1)")
        self._check("flip", 0 <= self.flip <= 1, "be a probability")
        self._check("resolution", self.resolution is None or self.resolution >= 8, "be at least 8 pixels")

    def _check(self, field: str, right: bool, rule: str, came: Any = None) -> None:
        if not right:
            raise ValueError(f"training: {field} must {rule}, got {getattr(self, field) if came is None else came!r}")

    def differences(self, other: TrainingConfig) -> list[str]:
        """The settings that would make a continuation another training, as "steps 300 -> 400"."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{key} {mine[key]} -> {theirs[key]}" for key in mine if key not in _FREE and mine[key] != theirs[key]]

    def save(self, path: Path, **more: Any) -> None:
        """Write the resolved settings as YAML, `more` beside them."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}
        path.write_text(yaml.safe_dump(plain | more, sort_keys=False, allow_unicode=True), encoding="utf-8")
