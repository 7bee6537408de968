"""Rows of measurements: one JSON object a line, each with what was measured, and where."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def append(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


@functools.cache
def provenance(device: str) -> dict[str, Any]:
    """A row's fields about machine, versions and commit."""
    versions = {name: _version(name) for name in ("torch", "triton", "diffusers", "transformers")}
    common = {"commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **versions}
    if torch.device(device).type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **_nvidia_smi(device), **common}
    return {"device": "cpu", "processor": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count(), **common}


def commit() -> str:
    """The commit of the working tree, followed by "+" if the tree has changes."""
    try:
        head = _run("git", "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _run("git", "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load() -> float | None:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _nvidia_smi(device: str) -> dict[str, str]:
    fields = {"driver": "driver_version", "clock": "clocks.sm", "memory_clock": "clocks.mem", "power_limit": "power.limit"}
    number = torch.device(device).index or 0
    try:
        found = _run("nvidia-smi", f"--id={number}", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, (value.strip() for value in found.split(","))))


def _run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
