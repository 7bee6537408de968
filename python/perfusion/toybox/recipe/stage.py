"""A resumable training, as every part has one."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["EMA_DECAY", "SAVE_EVERY", "Stage", "mixed_precision"]

EMA_DECAY = 0.9995
SAVE_EVERY = 500


class Stage:
    """One resumable training: model, optimiser, step count and average weights in one checkpoint file.

    The rate is flat, and falls linearly to a hundredth over the last share `anneal` of the steps.
    """

    def __init__(
        self, name: str, work: Path, model: torch.nn.Module, steps: int, rate: float, device: str,
        *, decay: float = EMA_DECAY, anneal: float = 0.0,
    ):  # fmt: skip
        self.name, self.work, self.model, self.steps, self.rate, self.decay = name, work, model.to(device), steps, rate, decay
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {key: value.clone() for key, value in model.state_dict().items()}
        self.step, self.anneal = 0, anneal
        self.path = work / f"{name}.pt"
        if self.path.exists():
            saved = torch.load(self.path, map_location=device, weights_only=True)
            model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step = saved["average"], saved["step"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average, "step": self.step}
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def generator(self) -> torch.Generator:
        """Every step has its own stream, so a resumed run draws what an uninterrupted one would have drawn."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name} {self.step}".encode()))

    def run(self, loss_of: Callable[[torch.Generator], Tensor]) -> torch.nn.Module:
        """Train to the end, then return the model holding its averaged weights."""
        started, bar = time.monotonic(), tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10)
        while self.step < self.steps:
            warm = min(1.0, (self.step + 1) / 200)
            for group in self.optimizer.param_groups:
                left = (self.steps - self.step) / (self.anneal * self.steps) if self.anneal else 1.0
                group["lr"] = self.rate * warm * max(0.01, min(1.0, left))
            loss = loss_of(self.generator())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self._average()
            bar.update()
            if self.step % 50 == 0 or self.step == self.steps:
                bar.set_postfix(loss=f"{loss.item():.4f}")
                self._log(step=self.step, loss=loss.item(), seconds=time.monotonic() - started)
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.save()
        bar.close()
        return self.result()

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def result(self) -> torch.nn.Module:
        """The model holding its averaged weights."""
        self.model.load_state_dict(self.average)
        return self.model.eval()

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        for key, value in self.model.state_dict().items():
            self.average[key].lerp_(value, 1 - keep) if value.is_floating_point() else self.average[key].copy_(value)

    def _log(self, **row) -> None:
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": self.name, **row}) + "\n")


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 products, which make the autoencoder's convolutions twice as fast, on a CPU too."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)
