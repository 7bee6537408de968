"""`TrainingConfig`: every setting of a training, its default, its rule, and the file that keeps it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from perfusion.files import whole
from perfusion.settings import BIAS, TEMPERATURE, TRAINING_BIAS, TRAINING_TEMPERATURE

__all__ = ["TrainingConfig", "read_settings"]

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
# what a run and its continuation need not share: how far it goes, what it reports, and what only the finished file says
_FREE = {
    "steps", "validation_every", "validation_prompts", "checkpoint_every", "checkpoint_limit", "tensorboard",
    "inference_bias", "inference_temperature", "calibrate", "license", "author",
}  # fmt: skip
_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "int | None": (int, type(None)), "tuple[str, ...]": tuple}
_NOTES = {"images", "base"}  # what `save` writes beside the settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a concept is learned (arXiv 2305.01644). ValueError names the setting, its rule and what came.

    superclass: what the thing is, in a word or several. name: what prompts will write as <name>.
    steps, batch_size: optimiser steps and pictures per step. learning_rate: of the value outputs o*_V.
    word_learning_rate: of the word embedding. bias, temperature: of the gate while training. inference_bias,
    inference_temperature: the defaults written into the concept. ema_decay: of the target input i*. flip: probability of a
    mirrored picture; 0 for things with writing or one arm up. key_lock: False also trains the keys (a larger file and a
    weaker prompt; there to compare). resolution: side of the training square in pixels; None is the model's own.
    buckets: train on rectangles of the pictures' own shapes, of about as many pixels; a step draws pictures of one shape.
    instance_prompts: captions for pictures without a .txt file beside them, "{}" standing for the concept.
    seed: fixes everything. gradient_checkpointing: less memory, more time.
    micro_batch: pictures that are in memory at once; their gradients are added up to those of `batch_size`. low_memory: gradient
    checkpointing, one picture at a time, text encoders and VAE off the device while idle, the VAE in tiles. compile: torch.compile the
    UNet for the steps: a slow start, then less time. calibrate: search for strength and bias after the last step
    (`perfusion.training.calibrate`), instead of `inference_bias`. validation_every, checkpoint_every: steps
    between grids and checkpoints, 0 for none. checkpoint_limit: how many checkpoints to keep. tensorboard: write curves.
    """

    superclass: str
    name: str
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 0.03
    word_learning_rate: float = 0.006
    bias: float = TRAINING_BIAS
    temperature: float = TRAINING_TEMPERATURE
    inference_bias: float = BIAS.default
    inference_temperature: float = TEMPERATURE.default
    ema_decay: float = 0.9
    flip: float = 0.5
    key_lock: bool = True
    resolution: int | None = None
    buckets: bool = False
    instance_prompts: tuple[str, ...] = TEMPLATES
    seed: int = 0
    gradient_checkpointing: bool = False
    micro_batch: int | None = None
    low_memory: bool = False
    compile: bool = False
    calibrate: bool = False
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
            object.__setattr__(self, field, tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value)
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            right = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
            self._check(field.name, right, f"be of type {kind}")
        for field in ("instance_prompts", "validation_prompts"):
            self._check(field, len(getattr(self, field)) > 0, "not be empty")
            for prompt in getattr(self, field):
                self._check(field, isinstance(prompt, str) and prompt.count("{}") == 1, 'hold "{}" once, for the concept', prompt)
        for field in ("steps", "batch_size", "checkpoint_limit"):
            self._check(field, getattr(self, field) >= 1, "be at least 1")
        for field in ("validation_every", "checkpoint_every"):
            self._check(field, getattr(self, field) >= 0, "be 0 (never) or a number of steps")
        for field in ("learning_rate", "word_learning_rate"):
            self._check(field, 0 < getattr(self, field) < float("inf"), "be positive")
        for field in ("bias", "inference_bias"):
            self._check(field, BIAS.holds(getattr(self, field)), f"lie between {BIAS.low:g} and {BIAS.high:g}")
        for field in ("temperature", "inference_temperature"):
            self._check(field, TEMPERATURE.holds(getattr(self, field)), f"lie between {TEMPERATURE.low:g} and {TEMPERATURE.high:g}")
        self._check("micro_batch", self.micro_batch is None or self.micro_batch >= 1, "be at least 1")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "lie in [0, 1)")
        self._check("flip", 0 <= self.flip <= 1, "be a probability")
        self._check("resolution", self.resolution is None or self.resolution >= 8, "be at least 8 pixels")
        self._check("seed", 0 <= self.seed < 2**63, "be a number of at most 63 bits, not negative")

    def _check(self, field: str, right: bool, rule: str, came: Any = None) -> None:
        if not right:
            raise ValueError(f"training: {field} must {rule}, got {getattr(self, field) if came is None else came!r}")

    @property
    def rows(self) -> int:
        """Pictures that are in memory at once."""
        return min(self.micro_batch or (1 if self.low_memory else self.batch_size), self.batch_size)

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward instead of kept."""
        return self.gradient_checkpointing or self.low_memory

    def lasting(self) -> dict[str, Any]:
        """The settings that a run and its exact continuation share."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _FREE}

    def save(self, path: Path, *, images: list[str], base: str) -> None:
        """Write the settings as YAML, in full or not at all; for the reader, the pictures and the base model beside them."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}
        text = yaml.safe_dump({**plain, "images": images, "base": base}, sort_keys=False, allow_unicode=True)
        with whole(path) as draft:
            draft.write_text(text, encoding="utf-8")


def read_settings(path: Path) -> dict[str, Any]:
    """Settings from a YAML file, such as the config.yaml that a training wrote. ValueError for anything else, OSError for no file."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    if not isinstance(found, dict):
        raise ValueError(f"{path} must map settings to values, such as 'steps: 400'; it holds {found!r:.80}")
    if unknown := {str(key) for key in found} - fields.keys() - _NOTES:
        raise ValueError(f"{path} sets {', '.join(sorted(unknown))}; known settings are {', '.join(fields)}")
    settings = {key: value for key, value in found.items() if key in fields}
    for key, value in settings.items():
        if fields[key].type == "float" and isinstance(value, str):  # YAML reads 3e-2 as text
            try:
                settings[key] = float(value)
            except ValueError:
                pass  # TrainingConfig says what is wrong with it
    return settings
