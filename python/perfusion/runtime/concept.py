"""A concept as numpy arrays."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from perfusion.base import Base
from perfusion.concept_fields import check_fields
from perfusion.concept_file import decode, read_bytes

__all__ = ["Concept"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Concept:
    """`perfusion.Concept` with float32 arrays in place of tensors; read the fields there. Treat the arrays as read-only.

    ValueError when an array is not finite, or the energy i* . m is not positive; shapes are the file's, which `load` has checked.
    """

    name: str
    superclass: str
    base: Base
    value_outputs: np.ndarray
    target: np.ndarray
    metric_target: np.ndarray
    superclass_encoding: np.ndarray
    word_embeddings: tuple[np.ndarray, ...]
    key_outputs: np.ndarray | None = None
    bias: float
    temperature: float
    covariance: str
    recipe: dict[str, Any]
    created: str
    license: str
    author: str

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("value_outputs", "target", "metric_target", "superclass_encoding", "key_outputs"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise ValueError(f"a concept's {name} must be finite, but it holds NaN or infinity")
        if not all(np.isfinite(word).all() for word in self.word_embeddings):
            raise ValueError("a concept's word_embeddings must be finite, but they hold NaN or infinity")
        energy = float(self.target.astype(np.float64) @ self.metric_target.astype(np.float64))
        if not energy > 0:
            raise ValueError(f"a concept's energy target . metric_target must be positive, got {energy:.3g}.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Concept:
        """Reads and checks a concept file. ConceptFileError and OSError as `perfusion.Concept.load`."""
        return decode(read_bytes(path), cls, source=str(path))

    @classmethod
    def of(cls, concept: Any) -> Concept:
        """From a `perfusion.Concept` that is in memory."""
        values = {field.name: getattr(concept, field.name) for field in dataclasses.fields(cls)}
        arrays = {name: value.float().cpu().numpy() for name, value in values.items() if hasattr(value, "numpy")}
        return cls(**{**values, **arrays, "word_embeddings": tuple(word.float().cpu().numpy() for word in concept.word_embeddings)})
