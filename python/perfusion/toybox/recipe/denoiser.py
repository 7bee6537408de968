"""The UNet."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..model import build_scheduler, build_unet, token_ids
from .stage import EMA_DECAY, Stage

__all__ = ["train_denoiser"]


def train_denoiser(
    work: Path, device: str, steps: int, data: dict, tokenizer, encoder,
    *, annealing: int = 0, start: Path | None = None, batch: int = 32,
):  # fmt: skip
    """The UNet at a flat rate for `steps`; with `annealing`, a copy of it for so many steps at a falling one.

    The flat run's checkpoint is only read by the annealing, so that it can be continued afterwards. start: weights to begin from.
    """
    torch.manual_seed(2)
    unet = build_unet()
    if start is not None:
        unet.load_state_dict(type(unet).from_pretrained(start / "unet").float().state_dict())
    name = "denoiser"
    if annealing:
        name = f"denoiser-annealed-{annealing}"
        if not (work / f"{name}.pt").exists():
            shutil.copyfile(work / "denoiser.pt", work / f"{name}.pt")
            state = torch.load(work / f"{name}.pt", weights_only=True)
            torch.save(state | {"step": 0}, work / f"{name}.pt")
        steps = annealing
    stage = Stage(name, work, unet, steps, 1e-3, device, decay=0.998 if annealing else EMA_DECAY, anneal=1.0 if annealing else 0.0)
    if not stage.finished:
        scheduler, latents, masks = build_scheduler(), data["latents"], data["masks"]
        ids, nothing = token_ids(tokenizer, data["captions"]), token_ids(tokenizer, [""])
        stage.run(lambda generator: denoising_loss(unet, encoder, scheduler, ids, nothing, latents, masks, generator, device, batch))
    return stage.result()


def denoising_loss(
    unet, encoder, scheduler, ids: Tensor, nothing: Tensor, latents: Tensor, masks: Tensor, generator, device: str, batch: int
) -> Tensor:
    """Velocity error of a batch; what is wrong in a thing counts four times what is wrong behind it."""
    rows = torch.randint(len(latents), (batch,), generator=generator)
    clean, weights = latents[rows].float().to(device), 1 + 3 * masks[rows].float().sum(1, keepdim=True).clamp(max=1).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    timesteps = torch.randint(1000, (batch,), generator=generator).to(device)
    words = torch.where(torch.rand(batch, generator=generator)[:, None] < 0.1, nothing, ids[rows]).to(device)
    with torch.no_grad():
        encoded = encoder(words)[0]
    predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, encoded, return_dict=False)[0]
    errors = ((predicted - scheduler.get_velocity(clean, noise, timesteps)) ** 2).mean(1, keepdim=True)
    return (weights * errors).sum() / weights.sum()
