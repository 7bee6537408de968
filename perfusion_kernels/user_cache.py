"""Files of measurements in the user's cache, one per kind of device: $PERFUSION_CACHE, or a folder of the system's cache."""

import json
import os
import tempfile
from functools import cache
from pathlib import Path

import torch


@cache
def kind(device: torch.device) -> str:
    """What devices of equal speed have in common: the name of a GPU, or the type of another device."""
    return getattr(torch, device.type).get_device_name(device) if device.type in ("cuda", "xpu") else device.type


def path(what: str, device_kind: str) -> Path:
    """The file's name says for what and with what it was measured."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("PERFUSION_CACHE") or Path(cache_home) / "perfusion")
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in f"{what}-{device_kind}")
    return folder / f"{name}.json"


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
    os.replace(name, file)  # readers see the old file or the new one
