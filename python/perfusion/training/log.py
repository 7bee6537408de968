"""What a training writes down: one JSON line a step, and the same to TensorBoard where it is installed."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from perfusion.training.config import TrainingConfig
from perfusion.training.session import Measures

__all__ = ["TrainingLog"]


class TrainingLog:
    """`log.jsonl` and `tensorboard/` in a folder. A continued run cuts the lines that it is about to write again."""

    def __init__(self, folder: Path, config: TrainingConfig, start: int):
        self.config, self.path = config, folder / "log.jsonl"
        kept = self.path.read_text().splitlines() if start and self.path.is_file() else []
        kept = [line for line in kept if json.loads(line)["step"] <= start]
        self.path.write_text("".join(line + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = _board(folder / "tensorboard", start) if config.tensorboard else None
        self._last = time.monotonic()

    def write(self, step: int, measures: Measures) -> None:
        now = time.monotonic()
        row: dict[str, Any] = {"step": step, **dataclasses.asdict(measures)}
        row |= {"learning_rate": self.config.learning_rate, "word_learning_rate": self.config.word_learning_rate}
        row |= {"images_per_second": self.config.batch_size / max(now - self._last, 1e-9), "memory_mb": _memory_mb()}
        self._last = now
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in row.items() if self._board else ():
            if key != "step":
                self._board.add_scalar(key, value, step)

    def image(self, step: int, image: Any) -> None:
        if self._board:
            import numpy

            self._board.add_image("validation", numpy.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an optional extra; log.jsonl holds the same figures
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
