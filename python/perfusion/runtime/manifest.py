"""`manifest.json`: what an exported folder holds, and everything about the model that is not a weight.

A folder may come from a stranger, so each value has a type, a range and a size, and files have fixed names beside the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perfusion.base import Base
from perfusion.runtime.schedulers import KINDS, PREDICTIONS, SPACINGS, Schedule

__all__ = ["FORMATS", "MANIFEST", "WEIGHTS", "ExportedFolderError", "Manifest", "TokenizerFacts", "digest", "graph_file", "tokenizer_file"]

VERSION = 1
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
FORMATS = ("onnx", "pt2")
DTYPES = ("float32", "float16")
MAX_MANIFEST_BYTES = 2**20
MAX_TOKENIZER_BYTES = 64 * 2**20


class ExportedFolderError(ValueError):
    """A folder that is no export, a damaged one, or one that this version cannot run. Says what is wrong and what to do."""


def graph_file(graph: str, format: str) -> str:
    """unet, text_encoder, text_encoder_2 or image_decoder -> its file."""
    return f"{graph}.{format}"


def tokenizer_file(number: int) -> str:
    return "tokenizer.json" if number == 0 else f"tokenizer_{number + 1}.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    """Ids that frame a prompt and fill it up, and textual inversions of several tokens: word -> the words it stands for."""

    begin: int
    end: int
    pad: int
    expansions: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The facts of an export.

    format            "onnx" or "pt2"
    base              what concepts must be made for; its layers are the columns of K and V, in order
    dtype             of the UNet's inputs and weights: "float32" or "float16"
    token_length      T
    tokenizers        one per text encoder
    schedule          how the model is sampled
    latent_channels   C of the UNet's input and output
    latent_scale      pixels per latent, each way
    latent_multiple   height and width of the latents are multiples of it
    height, width     pixels of a picture by default
    pooled_width      P of the added conditioning `text_embeds`, or None for a model without added conditioning
    zero_negative     whether no negative prompt means encodings of zeros (SDXL) and not the empty prompt
    max_rows          most rows of a batch, or None
    files             file name -> SHA-256
    """

    format: str
    base: Base
    dtype: str
    token_length: int
    tokenizers: tuple[TokenizerFacts, ...]
    schedule: Schedule
    latent_channels: int
    latent_scale: int
    latent_multiple: int
    height: int
    width: int
    pooled_width: int | None
    zero_negative: bool
    max_rows: int | None
    files: Mapping[str, str]

    @property
    def text_graphs(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2")[: len(self.tokenizers)]

    @property
    def graphs(self) -> tuple[str, ...]:
        return ("unet", *self.text_graphs, "image_decoder")

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents, by default of the default size. ValueError names the rule for the pixels."""
        sizes = (self.height if height is None else height, self.width if width is None else width)
        step = self.latent_scale * self.latent_multiple
        for name, size in zip(("height", "width"), sizes):
            if size < step or size % step or size > 2**14:
                raise ValueError(f"{name} must be a multiple of {step} pixels for this model, from {step} to {2**14}, got {size}")
        return (self.latent_channels, *(size // self.latent_scale for size in sizes))

    def write(self, folder: Path) -> None:
        facts = dataclasses.asdict(self) | {"perfusion_export": VERSION}
        (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an exported folder; its files are not looked at. ExportedFolderError, or OSError where none can be read."""
        path = folder / MANIFEST
        if not path.is_file():
            command = shlex.join(["perfusion", "export", "MODEL", str(folder)])
            raise ExportedFolderError(
                f"{folder} has no {MANIFEST}: it is not an exported model. `{command}` writes one; "
                "a checkpoint in diffusers' folder format needs torch, and no --runtime onnx."
            )
        with open(path, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        try:
            if len(data) > MAX_MANIFEST_BYTES:
                raise ValueError(f"it is larger than {MAX_MANIFEST_BYTES:,} bytes")
            return _parse(json.loads(data, parse_constant=_refuse_constant))
        except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
            raise ExportedFolderError(f"{path}: {error}. The folder is damaged or was not written by `perfusion export`.") from None


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


class _Fields:
    """The values of a JSON object, each taken once with its rule."""

    def __init__(self, where: str, value: Any):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {_short(value)}")
        self.where, self.values = where, value

    def take(self, key: str, rule: str, fits: Callable[[Any], bool]) -> Any:
        if key not in self.values:
            raise ValueError(f"{self.where} must have {key!r}, and it is missing")
        if not fits(self.values[key]):
            raise ValueError(f"{self.where}: {key} must be {rule}, got {_short(self.values[key])}")
        return self.values[key]

    def integer(self, key: str, low: int, high: int, *, optional: bool = False) -> Any:
        def fits(value: Any) -> bool:
            return (optional and value is None) or (type(value) is int and low <= value <= high)

        return self.take(key, f"a whole number from {low} to {high}" + (" or null" if optional else ""), fits)

    def number(self, key: str, low: float, high: float, *, optional: bool = False) -> Any:
        def fits(value: Any) -> bool:
            return (optional and value is None) or (type(value) in (int, float) and math.isfinite(value) and low <= value <= high)

        return self.take(key, f"a number from {low:g} to {high:g}" + (" or null" if optional else ""), fits)

    def choice(self, key: str, choices: Any) -> Any:
        return self.take(key, "one of " + ", ".join(map(str, choices)), lambda value: isinstance(value, (str, bool)) and value in choices)

    def list_of(self, key: str, rule: str, most: int, fits: Callable[[Any], bool]) -> list[Any]:
        return self.take(key, rule, lambda value: isinstance(value, list) and 0 < len(value) <= most and all(map(fits, value)))

    def texts(self, key: str, rule: str, most: int) -> dict[str, str]:
        def fits(value: Any) -> bool:
            pairs = value.items() if isinstance(value, dict) and len(value) <= most else [("", None)]
            return all(isinstance(text, str) and len(name + text) <= 4096 for name, text in pairs)

        return self.take(key, rule, fits)


def _parse(data: Any) -> Manifest:
    fields = _Fields("the manifest", data)
    version = fields.take("perfusion_export", "a version", lambda value: type(value) is int)
    if version != VERSION:
        raise ValueError(f"its format version is {version}, this Perfusion reads {VERSION}; export the model again")
    base = _base(_Fields("base", fields.take("base", "an object", lambda value: isinstance(value, dict))))
    encoders = len(base.text_widths)
    tokenizers = fields.list_of("tokenizers", f"{encoders} objects, one per text encoder", encoders, lambda value: isinstance(value, dict))
    if len(tokenizers) != encoders or encoders > 2:
        raise ValueError(f"there must be a tokenizer for each of 1 or 2 text encoders, got {len(tokenizers)} for {encoders}")
    manifest = Manifest(
        format=fields.choice("format", FORMATS),
        base=base,
        dtype=fields.choice("dtype", DTYPES),
        token_length=fields.integer("token_length", 3, 4096),
        tokenizers=tuple(_tokenizer(_Fields("tokenizers", value)) for value in tokenizers),
        schedule=_schedule(_Fields("schedule", fields.take("schedule", "an object", lambda value: isinstance(value, dict)))),
        latent_channels=fields.integer("latent_channels", 1, 1024),
        latent_scale=fields.integer("latent_scale", 1, 256),
        latent_multiple=fields.integer("latent_multiple", 1, 256),
        height=fields.integer("height", 1, 2**14),
        width=fields.integer("width", 1, 2**14),
        pooled_width=fields.integer("pooled_width", 1, 2**16, optional=True),
        zero_negative=fields.choice("zero_negative", (True, False)),
        max_rows=fields.integer("max_rows", 1, 2**16, optional=True),
        files=fields.texts("files", "an object of file names and SHA-256 digests", 64),
    )
    manifest.latent_shape()
    return manifest


def _base(fields: _Fields) -> Base:
    def positive(value: Any) -> bool:
        return type(value) is int and 0 < value <= 2**16

    widths = fields.list_of("text_widths", "a list of widths", 2, positive)
    layers = fields.take(
        "layers",
        "an object of at most 1024 layer names and widths",
        lambda value: isinstance(value, dict) and 0 < len(value) <= 1024 and all(map(positive, value.values())),
    )

    def text(key: str) -> str:
        return fields.take(key, "text", lambda value: isinstance(value, str) and len(value) <= 1024)

    return Base(text("family"), sum(widths), tuple(widths), layers, text("text_encoder"))


def _tokenizer(fields: _Fields) -> TokenizerFacts:
    ids = {key: fields.integer(key, 0, 2**24) for key in ("begin", "end", "pad")}
    return TokenizerFacts(**ids, expansions=fields.texts("expansions", "an object of words", 1024))


def _schedule(fields: _Fields) -> Schedule:
    schedule = Schedule(
        kind=fields.choice("kind", KINDS),
        prediction_type=fields.choice("prediction_type", PREDICTIONS),
        timestep_spacing=fields.choice("timestep_spacing", SPACINGS),
        steps_offset=fields.integer("steps_offset", 0, 1000),
        final_alpha=fields.number("final_alpha", 0, 1),
        clip_sample_range=fields.number("clip_sample_range", 0, 1e6, optional=True),
    )
    if schedule.kind == "pndm" and schedule.prediction_type == "sample":
        raise ValueError("schedule: pndm takes no prediction_type 'sample'")
    return schedule


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
