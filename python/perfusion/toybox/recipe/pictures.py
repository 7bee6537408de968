"""The pictures that everything is learned from, and their latents, each made once in the work folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..render import render
from ..vae import PatchAutoencoder
from ..world import Pictures, caption, sample_pictures
from .stage import mixed_precision

__all__ = ["PICTURES_SEED", "as_bytes", "make_latents", "make_pictures", "scenes"]

PICTURES_SEED = 2
PER_FILE = 256  # pictures


def scenes(count: int, seed: int) -> Iterator[Pictures]:
    """What `count` pictures show, in blocks of `PER_FILE`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (sample_pictures(PER_FILE, generator) for _ in range(math.ceil(count / PER_FILE)))


def _rendered(count: int, seed: int) -> Iterator[tuple[Pictures, Tensor, Tensor]]:
    """The same with images [PER_FILE, 3, 128, 128] and masks [PER_FILE, 2, 128, 128] of first and second things."""
    for pictures in tqdm(scenes(count, seed), total=math.ceil(count / PER_FILE), desc="render", mininterval=10):
        yield pictures, *render(pictures)


def make_pictures(work: Path, count: int, seed: int) -> list[Path]:
    """Render pictures into files of `PER_FILE` each: images in bytes, masks [PER_FILE, 2, 16, 16] in half precision, and captions."""
    folder = work / f"pictures-{seed}"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:04d}.pt" for number in range(math.ceil(count / PER_FILE))]
    if not all(path.exists() for path in paths):
        words = torch.Generator().manual_seed(20 + seed)
        for path, (pictures, images, masks) in zip(paths, _rendered(count, seed)):
            block = {"images": as_bytes(images), "masks": F.avg_pool2d(masks, 8).half(), "captions": caption(pictures, words)}
            torch.save(block, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
    return paths


def as_bytes(values: Tensor) -> Tensor:
    return (values * 255).round().byte()


@torch.no_grad()
def make_latents(work: Path, device: str, vae: PatchAutoencoder, paths: list[Path]) -> dict:
    """Of rendered pictures: `latents` [n, 8, 16, 16] and `masks` [n, 2, 16, 16] in half precision, and `captions`."""
    path = work / f"latents-{paths[0].parent.name}-{len(paths)}.pt"
    if not path.exists():
        latents, masks, captions = [], [], []
        for block in (torch.load(path, weights_only=True) for path in tqdm(paths, desc="latents", mininterval=10)):
            with mixed_precision(device):
                for images in block["images"].split(32):
                    x = images.to(device, memory_format=torch.channels_last).float() / 127.5 - 1
                    latents.append(vae.encode(x).latents.half().cpu())
            masks.append(block["masks"])
            captions += block["captions"]
        torch.save({"latents": torch.cat(latents), "masks": torch.cat(masks), "captions": captions}, path)
    return torch.load(path, weights_only=True)
