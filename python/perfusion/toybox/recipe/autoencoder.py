"""The autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import LATENT_CHANNELS, build_autoencoder
from ..vae import PatchAutoencoder
from .stage import Stage, mixed_precision

__all__ = ["train_autoencoder"]


def train_autoencoder(
    work: Path, device: str, steps: int, paths: list[Path], *, batch: int = 16, channels: int = LATENT_CHANNELS
) -> PatchAutoencoder:
    """What is wrong in a thing counts five times what is wrong behind it: things are what is looked at.

    Latents are held to mean 0 and deviation 1, and noise is added to them, because generated latents are not exact either.
    """
    torch.manual_seed(0)
    vae = build_autoencoder(channels).to(memory_format=torch.channels_last)
    stage = Stage("autoencoder", work, vae, steps, 2e-3, device, decay=0.995, anneal=0.6)
    if not stage.finished:
        blocks = [torch.load(path, weights_only=True) for path in paths]
        images, masks = (torch.cat([block[name] for block in blocks]) for name in ("images", "masks"))
        if stage.step == 0:
            vae.set_principal_components(images[:1024].to(device).float() / 127.5 - 1, whitening=1.0)
        stage.run(lambda generator: _restoration_loss(vae, images, masks, generator, device, batch))
    return stage.result()


def _restoration_loss(vae, images: Tensor, masks: Tensor, generator: torch.Generator, device: str, batch: int) -> Tensor:
    rows = torch.randint(len(images), (batch,), generator=generator)
    x = (images[rows].to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    inside = masks[rows].to(device).float().sum(1, keepdim=True).clamp(max=1)
    with mixed_precision(device):
        latents = vae.encode(x).latents
        noise = 0.2 * torch.rand((batch, 1, 1, 1), generator=generator) * torch.randn(latents.shape, generator=generator)
        restored = vae.decode(latents + noise.to(device)).sample.float()
    latents = latents.float()
    held = (latents.mean((0, 2, 3)) ** 2 + (latents.std((0, 2, 3)) - 1) ** 2).mean()
    return _difference(restored, x, F.interpolate(1 + 4 * inside, scale_factor=8)) + 0.05 * held


def _difference(restored: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """L1 + 2 L2, weighted, and half as much L1 of the differences between neighbours, which keeps lines sharp."""
    difference = restored - x
    edges = sum((difference.diff(dim=dim).abs() * weights.narrow(dim, 1, x.shape[-1] - 1)).mean() for dim in (2, 3))
    return (weights * (difference.abs() + 2 * difference**2)).sum() / (3 * weights.sum()) + 0.5 * edges / weights.mean()
