"""Training checkpoints: safetensors with a digest, written whole, the oldest ones removed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from perfusion.sealed_tensors import SealError, load_tensors, save_tensors

__all__ = ["Checkpoint", "all_of", "latest", "load", "save"]

_FORMAT = "perfusion-training-1"
_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclasses.dataclass
class Checkpoint:
    """`tensors` after `step` steps, and `facts`: every setting and input that decided them, as JSON values."""

    path: Path
    step: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def check(self, facts: dict[str, Any]) -> None:
        """ValueError, naming the differences, unless a run of these facts would have come to this checkpoint."""
        now = _plain(facts)
        differences = [
            f"{key} {self.facts.get(key)!r} -> {now.get(key)!r}" for key in {**now, **self.facts} if self.facts.get(key) != now.get(key)
        ]
        if differences:
            raise ValueError(
                f"checkpoint {str(self.path)!r} was made with other settings ({'; '.join(differences)}): "
                "an exact continuation needs the same ones. Give them, or start anew in another folder."
            )


def save(folder: Path, step: int, facts: dict[str, Any], tensors: dict[str, Tensor], limit: int, others: Collection[Path] = ()) -> Path:
    """Write `folder/step-000123.safetensors` and keep only the last `limit` of them. facts: see `Checkpoint`.

    others: another run's checkpoints, which this one replaces.
    """
    path = folder / f"step-{step:06d}.safetensors"
    metadata = {"format": _FORMAT, "step": str(step), "facts": json.dumps(_plain(facts))}
    save_tensors(path, tensors, metadata)
    for old in set(others) - {path}:
        old.unlink(missing_ok=True)
    for old in all_of(folder)[:-limit]:
        old.unlink(missing_ok=True)
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    return next(reversed(all_of(folder)), None)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. ValueError when it is damaged, or something else; FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        tensors, metadata = load_tensors(path)
    except SealError as error:
        raise ValueError(f"checkpoint {error}") from error
    except OSError as error:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is not a training checkpoint of this program.")
    try:
        step, facts = int(metadata["step"]), dict(json.loads(metadata["facts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: {error!r}") from error
    if "digest" not in metadata:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: it has no digest.")
    return Checkpoint(path, step, facts, tensors)


def all_of(folder: Path) -> list[Path]:
    """Every checkpoint of a folder, the oldest first."""
    return sorted(
        (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=lambda path: int(_NAME.fullmatch(path.name)[1])
    )


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(facts))
