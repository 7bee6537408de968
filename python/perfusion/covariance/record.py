"""`Covariance`: C, where it comes from, and its file."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perfusion.files import user_path
from perfusion.sealed_tensors import save_tensors
from perfusion_kernels.metric import MetricSolver

__all__ = ["FILE_NAME", "MAX_CONDITION", "Covariance", "CovarianceError"]

# Above this, rounding an encoding to half precision moves gates by more than a percent: docs/covariance.md, under
# "How large a condition number may be".
MAX_CONDITION = 1e6
FORMAT = "covariance-1"
FILE_NAME = "covariance.safetensors"
MAX_WIDTH = 16384  # a file that claims more is not believed: its matrix alone would take 2 GiB


class CovarianceError(ValueError):
    """A covariance file that cannot be trusted, or a text encoder whose covariance cannot be computed."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """C and where it comes from.

    matrix: [D, D] float64 on the CPU, symmetric, positive definite, shrinkage already applied.
    captions, tokens: how many were counted. source: the corpus, such as "everyday-20000-seed0" or "file-<sha256>".
    text_encoder: fingerprint of the encoder(s), from perfusion.base.
    condition_before, condition: condition number (largest over smallest eigenvalue) before and after shrinkage.
    shrinkage: w in (1 − w) C + w mean(diag C) I; 0 unless condition_before exceeded max_condition.
    path: the file this was loaded from or saved to, if any.
    """

    matrix: Tensor
    captions: int
    tokens: int
    source: str
    text_encoder: str
    condition_before: float
    condition: float
    shrinkage: float
    max_condition: float
    path: Path | None = field(default=None)

    @property
    def width(self) -> int:
        """D, the width of an encoding."""
        return self.matrix.shape[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits, from the sha256 of the matrix as float32 bytes: names this C in concept files."""
        return hashlib.sha256(self.matrix.to(torch.float32).contiguous().numpy().tobytes()).hexdigest()[:16]

    @functools.cached_property
    def _solver(self) -> MetricSolver:
        return MetricSolver(self.matrix)

    def metric_targets(self, targets: Tensor) -> Tensor:
        """targets @ C⁻¹ for targets [S, D] or [D], on their device, in their dtype but at least float32; float64 inside.

        Raises ValueError for another width than D.
        """
        return self._solver(targets.cpu()).to(targets.device)

    def save(self, path: str | Path) -> Covariance:
        """Write one safetensors file, in full or not at all. Returns this covariance with `path` set."""
        path = user_path(path)
        metadata = {name: str(getattr(self, name)) for name in _METADATA}
        metadata |= {"format": FORMAT, "fingerprint": self.fingerprint}
        save_tensors(path, {"covariance": self.matrix}, {f"perfusion.{key}": value for key, value in metadata.items()})
        return replace(self, path=path)

    @staticmethod
    def load(path: str | Path) -> Covariance:
        """Read a file that `save` wrote and check all of it: format, shape, symmetry, finiteness, definiteness, fingerprint.

        Raises FileNotFoundError, or CovarianceError naming the file and what is wrong with it.
        """
        path = user_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such covariance file: {path}")
        try:
            with safe_open(path, "pt") as file:
                metadata = {k.removeprefix("perfusion."): v for k, v in (file.metadata() or {}).items()}
                _require(metadata.get("format") == FORMAT, path, f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                _require(list(file.keys()) == ["covariance"], path, f"it holds {list(file.keys())}, not ['covariance']")
                shape = file.get_slice("covariance").get_shape()
                square = len(shape) == 2 and shape[0] == shape[1] and 0 < shape[0] <= MAX_WIDTH
                _require(square, path, f"its shape is {shape}, not [D, D] with D ≤ {MAX_WIDTH}")
                matrix = file.get_tensor("covariance")
        except SafetensorError as error:
            raise CovarianceError(f"{path} is damaged: {error}") from error
        try:
            known = {name: parse(metadata[name]) for name, parse in _METADATA.items()}
        except (KeyError, ValueError) as error:
            raise CovarianceError(f"{path} is not a usable covariance: bad metadata: {error}") from error
        covariance = Covariance(matrix=matrix, path=path, **known)
        _require(matrix.dtype == torch.float64, path, f"its dtype is {matrix.dtype}, not torch.float64")
        try:
            covariance._solver
        except ValueError as error:
            raise CovarianceError(f"{path} is not a usable covariance: {error}") from error
        stated = metadata.get("fingerprint")
        _require(stated == covariance.fingerprint, path, f"its values have fingerprint {covariance.fingerprint}, not {stated}")
        return covariance


# What a file says beside the matrix: attribute -> how to read it back from text.
_METADATA = {
    "captions": int,
    "tokens": int,
    "source": str,
    "text_encoder": str,
    "condition_before": float,
    "condition": float,
    "shrinkage": float,
    "max_condition": float,
}


def _require(condition: bool, path: Path, complaint: str) -> None:
    if not condition:
        raise CovarianceError(f"{path} is not a usable covariance: {complaint}")
