"""Reads a checkpoint from a stranger: the file, and the values in it.

Checkpoints are read with `torch.load(weights_only=True)` only; classes in them are replaced by inert stand-ins.
"""

from __future__ import annotations

import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from perfusion.concept import Concept
from perfusion.concept_file import ConceptFileError

__all__ = ["ConversionError", "load", "parameters", "tensor", "texts"]

MAX_BYTES = 512 * 2**20


class ConversionError(ValueError):
    """A checkpoint that cannot become a concept, or a concept that has no such form. Says why, and what would help."""


class _StandIn:
    """Takes the place of a class named in a checkpoint: keeps the object's attributes and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


def _has_stand_in(name: str) -> bool:
    """Classes that the ports' files name: the configuration object one of them keeps, and torch's ParameterDict."""
    known = {"typing.Any", "collections.defaultdict", "torch.nn.modules.container.ParameterDict"}
    known |= {f"builtins.{kind}" for kind in ("list", "dict", "int", "float", "str", "bool")}
    return name in known or name.startswith("omegaconf.")


def load(path: Path) -> Any:
    """The content of a checkpoint file. ConversionError when it is not one, or is not safe to read; OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConversionError(f"{path} is not a regular file. Give the checkpoint file.")
    if path.stat().st_size > MAX_BYTES:
        raise ConversionError(f"{path} has {path.stat().st_size:,} bytes; a checkpoint of these ports has at most {MAX_BYTES:,}.")
    with open(path, "rb") as file:  # opened here: torch decides by a path's ending how to read it, and endings lie
        return _load_opened(path, file)


def _load_opened(path: Path, file: BinaryIO) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        if _is_concept(path):
            raise ConversionError(f"{path} is a concept already, and needs no conversion: use it as it is.") from None
        raise ConversionError(
            f"{path} is not a torch checkpoint (a zip archive written by torch.save, torch 1.6 or later). "
            "If it is older, load and save it once with the torch that wrote it."
        ) from None
    if unpacked > MAX_BYTES:
        raise ConversionError(f"{path} unpacks to {unpacked:,} bytes; a checkpoint of these ports has at most {MAX_BYTES:,}.")
    try:
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in names if not _has_stand_in(name))
        if refused:
            asked = ascii(refused[0])[1:-1][:120]
            raise ConversionError(f"{path} asks to load {asked}, which checkpoints of these ports do not hold. Refused.")
        with torch.serialization.safe_globals([(_StandIn, name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storage classes of older torch
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except ConversionError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, KeyError, EOFError and others on bad files
        said = ascii(str(error).partition("\n")[0])[:200]
        raise ConversionError(f"{path} cannot be read safely by torch ({type(error).__name__}: {said}).") from None


def _is_concept(path: Path) -> bool:
    try:
        Concept.load(path)
    except ConceptFileError:
        return False
    return True


def parameters(value: Any) -> dict[str, Any]:
    """The entries of a saved ParameterDict, of old and new torch, or of a plain dict."""
    if isinstance(value, _StandIn):
        value = value.__dict__.get("_parameters")
    return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else {}


def texts(value: Any) -> list[str]:
    """A list of words, plain or inside a saved configuration object."""
    if isinstance(value, _StandIn):
        value = value.__dict__.get("_content")
    items = value if isinstance(value, (list, tuple)) else []
    items = [item.__dict__.get("_val") if isinstance(item, _StandIn) else item for item in items]
    return [item for item in items if isinstance(item, str)]


def tensor(value: Any, what: str, shape: tuple[int | None, ...]) -> Tensor:
    """The tensor as float64 on the CPU, after checking it, since a hostile one may claim any size."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    fits = plain and value.is_floating_point() and value.dim() == len(shape)
    fits = fits and all(want in (None, have) for want, have in zip(shape, value.shape))
    if not fits or value.numel() > MAX_BYTES // 8:
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ConversionError(f"{what} must be a floating point tensor of shape ({wanted}) for this pipeline, got {came}.")
    value = value.detach().double()
    if not torch.isfinite(value).all():
        raise ConversionError(f"{what} holds NaN or infinity: training diverged.")
    return value
