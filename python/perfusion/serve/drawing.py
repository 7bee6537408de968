"""`Drawing`: one picture that is wanted, as it goes to a worker, and what comes back. Plain values: it crosses processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy

__all__ = ["ConceptUse", "Drawing", "Failure", "Picture"]


@dataclasses.dataclass(frozen=True)
class ConceptUse:
    """A concept of a prompt. name: as the prompt writes it. digest: SHA-256 of its file, by which the store has it.

    strength, bias, temperature: numbers, tuples with one a step, or None: as the drawing says, else as the file does.
    region: uint8 [H, W], above 127 where the concept acts, or None for everywhere.
    """

    name: str
    digest: str
    strength: Any = None
    bias: Any = None
    temperature: Any = None
    region: numpy.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture. Checked before: a worker trusts what is in it, but not that its prompt can be encoded.

    id: unique in a server's life. model: the name of a base. width, height in pixels. image: what to start from, RGB uint8
    [height, width, 3]; image_strength: how much of it may change. mask: uint8 [height, width], above 127 where the picture is
    drawn anew. previews: how many pictures before the last. format, quality: of the answer's bytes.
    """

    id: str
    model: str
    prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float
    negative_prompt: str = ""
    concepts: tuple[ConceptUse, ...] = ()
    strength: Any = None
    bias: Any = None
    temperature: Any = None
    gate: str | None = None
    key_lock: str | None = None
    image: numpy.ndarray | None = None
    image_strength: float = 0.8
    mask: numpy.ndarray | None = None
    previews: int = 0
    format: str = "png"
    quality: int = 90


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a drawing as a file's bytes, at a step of `steps`; the last one where they are equal."""

    id: str
    data: bytes
    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no picture. kind: "invalid" (the request's own fault), "conflict" (a concept's file), "memory" or "internal"."""

    id: str
    kind: str
    message: str
