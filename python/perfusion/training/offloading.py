"""Frozen models that are on the device only while they compute, and a VAE that works in tiles: what `low_memory` is made of."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["Offloaded", "tiled"]

TILE = 512  # pixels a side. SDXL's VAE has 1024 of its own, which cuts a picture of 1024 into one


class Offloaded:
    """Models that wait on the CPU. `with offloaded.here():` has them on the device; such blocks may be nested.

    Leaving the outer `with` brings them back for good. Models that were quantised stay where they are: they are small already, and
    libraries refuse to move them. Autograd keeps the weights of a graph alive: a backward through a model has to begin and end in
    one block.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device):
        self.models = [model for model in models if not _quantised(model)]
        self.device, self._depth = device, 0

    def __enter__(self) -> Offloaded:
        self._move("cpu")
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        try:
            self._move(self.device)
        except torch.OutOfMemoryError:
            if kind is None:
                raise
            # what ended the run says more, and its traceback may hold all the memory that is missing here
            warnings.warn("text encoders and VAE stay on the CPU, as their device is full: pipe.to(device) moves them back.", stacklevel=2)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        self._depth += 1
        if self._depth == 1:
            self._move(self.device)
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._move("cpu")

    def _move(self, device: Any) -> None:
        for model in self.models:
            model.to(device)


def _quantised(model: torch.nn.Module) -> bool:
    return any(getattr(model, name, False) for name in ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit"))


@contextlib.contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Encode and decode in tiles of at most TILE pixels a side. A VAE that knows no tiles is left alone."""
    before = {name: getattr(vae, name) for name in ("use_tiling", "tile_sample_min_size", "tile_latent_min_size") if hasattr(vae, name)}
    try:
        if "use_tiling" in before:
            vae.use_tiling = True
        if len(before) == 3 and vae.tile_sample_min_size > TILE:
            vae.tile_latent_min_size = vae.tile_latent_min_size * TILE // vae.tile_sample_min_size
            vae.tile_sample_min_size = TILE
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
