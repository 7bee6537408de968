"""Training checkpoints: safetensors, written atomically, the oldest ones removed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perfusion.training.config import TrainingConfig

__all__ = ["latest", "load", "save"]

_FORMAT = "perfusion-training-1"


def save(folder: Path, config: TrainingConfig, step: int, tensors: dict[str, Tensor]) -> Path:
    """Write `folder/step-000123.safetensors` and keep only the last `checkpoint_limit` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.safetensors"
    metadata = {"format": _FORMAT, "step": str(step), "config": json.dumps(dataclasses.asdict(config))}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)
    for old in _all(folder)[: -config.checkpoint_limit]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    return next(reversed(_all(folder)), None)


def load(path: Path, config: TrainingConfig) -> tuple[int, dict[str, Tensor]]:
    """Step and tensors of a checkpoint. ValueError when it is damaged or belongs to other settings, naming which."""
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"checkpoint {str(path)!r} is not a training checkpoint of this program.")
    differences = TrainingConfig(**json.loads(metadata["config"])).differences(config)
    if differences:
        raise ValueError(
            f"checkpoint {str(path)!r} was made with other settings ({'; '.join(differences)}): "
            "an exact continuation needs the same ones. Give them, or start anew in another folder."
        )
    return int(metadata["step"]), tensors


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))
