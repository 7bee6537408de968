"""Layer names and widths in few bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from perfusion.concept_file.format import clip

__all__ = ["decode_layers", "encode_layers"]

MAX_LAYERS = 1024

_PATTERNS = (
    (re.compile(r"down_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"), "d"),
    (re.compile(r"up_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"), "u"),
    (re.compile(r"mid_block\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"), "m"),
    (re.compile(r"transformer_blocks\.(\d+)\.attn2"), "t"),
)
_SHORT = re.compile(r"(?:([du])(0|[1-9]\d{0,2})\.|m)(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})|t(0|[1-9]\d{0,2})")
_FULL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")


def _short_name(name: str) -> str:
    for pattern, letter in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            return letter + ".".join(match.groups())
    return name


def _long_name(text: str) -> str | None:
    match = _SHORT.fullmatch(text)
    if match is None:
        return text if _FULL.fullmatch(text) and len(text) <= 128 and _short_name(text) == text else None
    letter, block, attention, transformer, alone = match.groups()
    if alone is not None:
        return f"transformer_blocks.{alone}.attn2"
    place = {"d": f"down_blocks.{block}", "u": f"up_blocks.{block}", None: "mid_block"}[letter]
    return f"{place}.attentions.{attention}.transformer_blocks.{transformer}.attn2"


def encode_layers(layers: Mapping[str, int]) -> str:
    """Layer names and widths as short text: "d0.0.0=320 d0.1.0 d1.0.0=640 ...".

    d0.1.2 is down_blocks.0.attentions.1.transformer_blocks.2.attn2, u the same in up_blocks, m0.0 in mid_block, and t5
    transformer_blocks.5.attn2 of a transformer; any other name stands in full. A width stands where it changes. ValueError for
    names that do not survive the way back.
    """
    words, last = [], None
    for name, width in layers.items():
        words.append(_short_name(name) + ("" if width == last else f"={width}"))
        last = width
    text = " ".join(words)
    try:
        faithful = list(decode_layers(text).items()) == list(layers.items())
    except ValueError:
        faithful = False
    if not faithful:
        raise ValueError(f"layer names must be dotted module names, at most {MAX_LAYERS} of them, got {clip(list(layers))}")
    return text


def decode_layers(text: str) -> dict[str, int]:
    """The layers that `encode_layers` wrote, in order. ValueError on anything else."""
    layers: dict[str, int] = {}
    width = 0
    words = text.split(" ")
    if len(words) > MAX_LAYERS:
        raise ValueError(f"at most {MAX_LAYERS} layers, got {len(words)}")
    for word in words:
        short, equals, digits = word.partition("=")
        if equals:
            if not re.fullmatch(r"[1-9]\d{0,5}", digits, re.ASCII):
                raise ValueError(f"layer width must be a number from 1 to 999999, got {clip(digits)}")
            width = int(digits)
        name = _long_name(short)
        if name is None or name in layers or not width:
            raise ValueError(f"not a layer name, or one too many, or one without a width: {clip(word)}")
        layers[name] = width
    return layers
