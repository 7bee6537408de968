"""Safetensors files with a digest of their tensors, written in full or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from perfusion.files import write_bytes

__all__ = ["SealError", "load_tensors", "save_tensors"]


class SealError(ValueError):
    """A file that is damaged, or not the one that was written."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, and with them the metadata "digest". OSError names `path`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors' own writing would name the draft in its errors, in words
    write_bytes(path, to_bytes(tensors, {**metadata, "digest": digest(tensors)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. SealError when it is damaged or its tensors are not those of its digest; OSError."""
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise SealError(f"{str(path)!r} is damaged: {error}") from error
    if "digest" in metadata and metadata["digest"] != digest(tensors):
        raise SealError(f"{str(path)!r} is damaged: its tensors are not the ones that were saved.")
    return tensors, metadata


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of every tensor's name, type, shape and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} ".encode())
        total.update(tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()
