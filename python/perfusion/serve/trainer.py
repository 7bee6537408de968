"""The child process of a training job. It ends with a checkpoint when it is told to (SIGTERM), or when the server is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["ERROR", "run"]

ERROR = "error.txt"  # in the job's folder, with a sentence


def run(connection: Connection, folder: Path, model: str, device: str | None, settings: dict[str, Any]) -> None:
    """Learn from folder/pictures into folder/output, from the last checkpoint there is. Exits with 0 when the concept is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which `terminable` replaces while there is something to keep
    warnings.simplefilter("ignore")

    def follow() -> None:
        try:
            connection.recv()
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    error = folder / ERROR
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # a process that a killed server left may be writing its last checkpoint
        try:
            import torch

            from perfusion.models import load_pipeline
            from perfusion.training import train

            error.unlink(missing_ok=True)
            on_cuda = (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
            pipe = load_pipeline(model, device=device, dtype=torch.bfloat16 if on_cuda else None)
            output = folder / "output"
            resume = "latest" if any((output / "checkpoints").glob("*.safetensors")) else None
            options = dict(output=output, resume=resume, overwrite=resume is None, progress=False, tensorboard=False)
            train(pipe, folder / "pictures", **options, **settings)
        except Exception as problem:
            expected = isinstance(problem, (ValueError, OSError))
            error.write_text(str(problem) if expected else f"{type(problem).__name__}: {problem}", encoding="utf-8")
            sys.exit(2 if expected else 1)
        except KeyboardInterrupt:
            sys.exit(0x80 + signal.SIGTERM)
