"""A concept as numpy arrays."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

__all__ = ["Concept"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Concept:
    """The fields of `perfusion.Concept` that drawing needs, with float32 arrays in place of tensors."""

    name: str
    superclass: str
    base: Any
    value_outputs: np.ndarray
    target: np.ndarray
    metric_target: np.ndarray
    superclass_encoding: np.ndarray
    word_embeddings: tuple[np.ndarray, ...]
    key_outputs: np.ndarray | None
    bias: float
    temperature: float
    covariance: str

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Concept:
        from perfusion.concept_file import read

        return cls.of(read(path))

    @classmethod
    def of(cls, concept: Any) -> Concept:
        """From a `perfusion.Concept`."""
        values = {field.name: getattr(concept, field.name) for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if hasattr(value, "numpy"):
                values[name] = value.float().cpu().numpy()
        return cls(**values | {"word_embeddings": tuple(word.float().cpu().numpy() for word in concept.word_embeddings)})
