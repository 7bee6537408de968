"""`TrainingConfig`: every setting of a training, its default, its rule, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from perfusion.files import whole
from perfusion.settings import BIAS, TEMPERATURE, TRAINING_BIAS, TRAINING_TEMPERATURE, Setting

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


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must hold, and the sentence of a refusal."""

    holds: Callable[[Any], bool]
    words: str


def _between(setting: Setting) -> Rule:
    return Rule(setting.holds, f"lie between {setting.low:g} and {setting.high:g}")


ANYTHING = Rule(lambda value: True, "")
SHARE = Rule(lambda value: 0 <= value <= 1, "be a probability")
SIDE = Rule(lambda value: value is None or value >= 8, "be at least 8 pixels")
SEED = Rule(lambda value: 0 <= value < 2**63, "be a number of at most 63 bits, not negative")
DECAY = Rule(lambda value: 0 <= value < 1, "lie in [0, 1)")
AT_LEAST_ONE = Rule(lambda value: value is None or value >= 1, "be at least 1")
EVERY = Rule(lambda value: value >= 0, "be 0 (never) or a number of steps")
POSITIVE = Rule(lambda value: 0 < value < float("inf"), "be positive")
PROMPTS = Rule(lambda value: len(value) > 0, "not be empty")


def _setting(help: str, *names: str, default: Any = dataclasses.MISSING, said: str = "", rule: Rule = ANYTHING) -> Any:
    """A field: help for whoever sets it, its names on the command line where these are not its own, and how its default is said."""
    return dataclasses.field(default=default, metadata={"help": help, "names": names, "said": said, "rule": rule})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a concept is learned (arXiv 2305.01644). ValueError names the setting, its rule and what came.

    Every setting with its default, its rule and its help stands here once: `perfusion train` has the options that follow
    (cli/settings_options.py).
    """

    superclass: str = _setting("What it is, in a word or several: teddy, coffee mug.", "--superclass", "--initializer-token")
    name: str = _setting("What prompts will write as <name>.", "--name", "--modifier-token")
    steps: int = _setting("Optimiser steps.", default=400, rule=AT_LEAST_ONE)
    batch_size: int = _setting("Pictures a step.", default=16, rule=AT_LEAST_ONE)
    learning_rate: float = _setting("Of the value outputs.", default=0.03, rule=POSITIVE)
    word_learning_rate: float = _setting("Of the word's embedding.", default=0.006, rule=POSITIVE)
    bias: float = _setting("The gate's while training.", default=TRAINING_BIAS, rule=_between(BIAS))
    temperature: float = _setting("Likewise.", default=TRAINING_TEMPERATURE, rule=_between(TEMPERATURE))
    inference_bias: float = _setting("The default written into the concept.", default=BIAS.default, rule=_between(BIAS))
    inference_temperature: float = _setting("Likewise.", default=TEMPERATURE.default, rule=_between(TEMPERATURE))
    ema_decay: float = _setting("Of the target input's running mean.", default=0.9, rule=DECAY)
    flip: float = _setting("Share of mirrored pictures; 0 for writing, or one arm up.", default=0.5, rule=SHARE)
    key_lock: bool = _setting("Lock the keys to the superclass; without it they are learned too, in a larger file.", default=True)
    resolution: int | None = _setting("Side of the training square, in pixels.", default=None, said="the model's", rule=SIDE)
    buckets: bool = _setting("Train on rectangles of the pictures' own shapes.", default=False)
    instance_prompts: tuple[str, ...] = _setting(
        'Caption for pictures without a .txt: "a photo of a {}". May be repeated.', "--instance-prompt",
        default=TEMPLATES, said=f"{len(TEMPLATES)} short ones", rule=PROMPTS,
    )  # fmt: skip
    seed: int = _setting("Fixes everything that is random.", default=0, rule=SEED)
    gradient_checkpointing: bool = _setting("Less memory, more time.", default=False)
    micro_batch: int | None = _setting("Pictures in memory at once; gradients add up.", default=None, said="all", rule=AT_LEAST_ONE)
    low_memory: bool = _setting(
        "Gradient checkpointing, one picture at a time, text encoders and VAE off the device, VAE in tiles.", default=False
    )
    compile: bool = _setting("torch.compile the UNet: a slow start, then less time.", default=False)
    calibrate: bool = _setting("Search for strength and bias at the end.", default=False)
    validation_every: int = _setting("Steps between validation pictures; 0 never.", default=100, rule=EVERY)
    validation_prompts: tuple[str, ...] = _setting(
        'Drawn as it learns: "a {} on the beach". May be repeated.', "--validation-prompt",
        default=("a photo of a {}", "a {}"), said='"a photo of a {}" and "a {}"', rule=PROMPTS,
    )  # fmt: skip
    checkpoint_every: int = _setting(
        "Steps between checkpoints; 0 never.", "--checkpoint-every", "--checkpointing-steps", default=100, rule=EVERY
    )
    checkpoint_limit: int = _setting("How many to keep.", "--checkpoint-limit", "--checkpoints-total-limit", default=2, rule=AT_LEAST_ONE)
    tensorboard: bool = _setting("Curves beside log.jsonl.", default=True)
    license: str = _setting("Written into the file.", default="")
    author: str = _setting("Written into the file.", default="")

    def __post_init__(self) -> None:
        for field in ("instance_prompts", "validation_prompts"):
            value = getattr(self, field)
            object.__setattr__(self, field, tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value)
        for field in dataclasses.fields(self):
            value, kind, rule = getattr(self, field.name), str(field.type), field.metadata["rule"]
            right = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
            self._check(field.name, right, f"be of type {kind}")
            self._check(field.name, rule.holds(value), rule.words)
        ends = not unicodedata.category(self.superclass.rstrip()[-1:] or "a").startswith("P")
        self._check("superclass", ends, "end in a word, as the concept takes the place of its last token")
        for field in ("instance_prompts", "validation_prompts"):
            for prompt in getattr(self, field):
                self._check(field, isinstance(prompt, str) and prompt.count("{}") == 1, 'hold "{}" once, for the concept', prompt)

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
