"""The user's cache folder and the files of measurements in it, one per kind of device."""

import json
import os
import tempfile
from functools import cache
from pathlib import Path

import torch


def cache_folder() -> Path:
    """$PERFUSION_CACHE, or the system's folder for a user's caches (platformdirs); not created here."""
    named = os.environ.get("PERFUSION_CACHE")
    if not named:
        import platformdirs  # here, so that the operators need torch alone

        named = platformdirs.user_cache_dir("perfusion", appauthor=False)
    return Path(os.path.expanduser(named))


@cache
def kind(device: torch.device) -> str:
    """What devices of equal speed have in common: the name of a GPU, or the type of another device."""
    return getattr(torch, device.type).get_device_name(device) if device.type in ("cuda", "xpu") else device.type


def path(what: str, device_kind: str) -> Path:
    """The file of measurements of `what`, "triton-3.7.1" for instance, on this kind of device."""
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in f"{what}-{device_kind}")
    return cache_folder() / f"{name}.json"


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
    os.replace(name, file)  # readers see the old file or the new one
