"""What a training writes down: one JSON line a step, and the same to TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from perfusion.files import whole
from perfusion.training.session import Measures
from perfusion.training_config import TrainingConfig

__all__ = ["TrainingLog"]


class TrainingLog:
    """`log.jsonl` and `tensorboard/` in a folder. A continued run keeps the lines to `start` and writes the rest again."""

    def __init__(self, folder: Path, config: TrainingConfig, start: int, device: torch.device, *, keep: bool = True):
        self.config, self.device, self._failed = config, device, False
        path = folder / "log.jsonl"
        with whole(path) as draft:
            draft.write_text("".join(_lines_until(path, start) if keep else ()), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard", start) if config.tensorboard else None

    def write(self, step: int, measures: Measures, seconds: float) -> None:
        row: dict[str, Any] = {"step": step, **dataclasses.asdict(measures)}
        row |= {"learning_rate": self.config.learning_rate, "word_learning_rate": self.config.word_learning_rate}
        row |= {"images_per_second": self.config.batch_size / max(seconds, 1e-9), "memory_mb": _memory_mb(self.device)}
        with self._forgiving():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()  # a run that is killed keeps its lines
        with self._forgiving():
            for key, value in row.items() if self._board else ():
                if key != "step":
                    self._board.add_scalar(key, value, step)

    def image(self, step: int, image: Any) -> None:
        if self._board:
            import numpy

            with self._forgiving():
                self._board.add_image("validation", numpy.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        with self._forgiving():
            self._file.close()
        with self._forgiving():
            if self._board:
                self._board.close()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A log that cannot be written, on a full disk say, is warned about once and ends no training."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(f"the log cannot be written ({error.strerror}); training goes on.", stacklevel=4)


def _lines_until(path: Path, start: int) -> list[str]:
    """The lines of steps 1 to `start`; a killed run may have left half a line at the end."""
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
        try:
            inside = json.loads(line)["step"] <= start
        except ValueError:
            break
        if inside:
            kept.append(line)
    return kept


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "tensorboard is not installed, so curves are in log.jsonl only: pip install tensorboard, or say --no-tensorboard"
            " (tensorboard=False).",
            stacklevel=2,
        )
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _memory_mb(device: torch.device) -> float:
    """The most memory that was in use so far: on the GPU, or of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
