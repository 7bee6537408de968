"""The recipe that made toybox: `python -m perfusion.toybox.train --work DIR --output DIR`.

Four stages, each resumable from its last checkpoint in the work folder and logged to `log.jsonl` there: the autoencoder,
the judge, the latents of fresh pictures, text encoder and UNet together; then the export in diffusers' folder format.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from perfusion.covariance import compute_covariance
from perfusion.models import load_pipeline

from .judge import Judge, judge_loss, save_judge
from .model import (
    Denoiser,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    make_readable_by_transformers_4,
    token_ids,
)
from .render import render
from .vae import PatchAutoencoder
from .world import Pictures, caption, sample_pictures

EMA_DECAY = 0.9995
SAVE_EVERY = 500
COVARIANCE_CAPTIONS = 20_000


class Stage:
    """One resumable training: model, optimiser, step count and average weights in one checkpoint file."""

    def __init__(self, name: str, work: Path, model: torch.nn.Module, steps: int, rate: float, device: str, *, decay: float = EMA_DECAY):
        self.name, self.work, self.model, self.steps, self.rate, self.decay = name, work, model.to(device), steps, rate, decay
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {key: value.clone() for key, value in model.state_dict().items()}
        self.step = 0
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
        started, bar = time.monotonic(), tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=2)
        while self.step < self.steps:
            warm = min(1.0, (self.step + 1) / 200)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
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


def _rendered(count: int, seed: int, **kinds) -> Iterator[tuple[Pictures, Tensor, Tensor]]:
    """`count` pictures in blocks of 256, the same for the same seed: what they show, images, and masks [256, 1, 64, 64] of their things."""
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(math.ceil(count / 256)), desc="render", mininterval=2):
        pictures = sample_pictures(256, generator, **kinds)
        images, masks = render(pictures)
        yield pictures, images, masks.sum(1, keepdim=True).clamp(max=1)


def _bytes(values: Tensor) -> Tensor:
    return (values * 255).round().byte()


def train_autoencoder(work: Path, device: str, steps: int, pictures: int, batch: int = 16) -> PatchAutoencoder:
    """What is wrong in a thing counts five times what is wrong behind it: things are what is looked at."""
    vae = PatchAutoencoder()
    stage = Stage("autoencoder", work, vae.to(memory_format=torch.channels_last), steps, 2e-3, device, decay=0.998)
    if stage.finished:
        return stage.result()
    blocks = [(_bytes(image), _bytes(mask)) for _, image, mask in _rendered(pictures, seed=1)]
    images, masks = (torch.cat(tensors) for tensors in zip(*blocks))
    if stage.step == 0:
        vae.set_principal_components(images[:2048].to(device).float() / 127.5 - 1)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = images[rows].to(device).float() / 127.5 - 1
        weights = 1 + 4 * masks[rows].to(device).float() / 255
        latents = vae.encode(x).latents
        # generated latents are not exact either; relative noise, so that making them larger does not help
        noise = 0.2 * torch.rand((batch, 1, 1, 1), generator=generator) * torch.randn(latents.shape, generator=generator)
        difference = vae.decode(latents + latents.std() * noise.to(device)).sample - x
        return (weights * (difference.abs() + 2 * difference**2)).sum() / (3 * weights.sum())

    return stage.run(loss_of)


def _moved(images: Tensor, generator: torch.Generator, reach: int = 4) -> Tensor:
    """Each image mirrored or not and shifted by up to `reach` pixels: what it shows is still the same to the judge."""
    size, padded = images.shape[-1], F.pad(images, [reach] * 4, mode="replicate")
    padded = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, padded.flip(3), padded)
    corners = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, corners)])


def _half_restored(vae: PatchAutoencoder, device: str, pictures: int) -> Iterator[tuple[Pictures, Tensor]]:
    """Rendered blocks whose first halves have gone through the autoencoder, because generated pictures have, too.

    Patterns are the hardest to see and asked of lone things only, so these are more than in the pictures that the UNet learns from.
    """
    for scenes, images, _ in _rendered(pictures, seed=3, pairs=0.25):
        with torch.no_grad():
            restored = vae.decode(vae.encode(images[:128].to(device) * 2 - 1).latents).sample.cpu().clamp(-1, 1) / 2 + 0.5
        yield scenes, torch.cat([restored, images[128:]])


def train_judge(work: Path, vae: PatchAutoencoder, device: str, steps: int, pictures: int, batch: int = 64) -> Judge:
    judge = Judge().to(memory_format=torch.channels_last)
    stage = Stage("judge", work, judge, steps, 2e-3, device, decay=0.998)
    blocks = [(scenes, _bytes(images)) for scenes, images in _half_restored(vae, device, 2048 if stage.finished else pictures)]

    def loss_of(generator: torch.Generator) -> Tensor:
        judge.train()
        everything, images = blocks[int(torch.randint(len(blocks), (1,), generator=generator))]
        rows = torch.randperm(256, generator=generator)[:batch]
        chosen = Pictures(
            everything.first.take(rows), everything.second.take(rows),
            *(getattr(everything, name)[rows] for name in ("scene", "relation", "style", "details", "poses", "mirrored")),
        )  # fmt: skip
        x = _moved(images[rows].float() / 255, generator)
        x = (x + 0.02 * torch.randn(x.shape, generator=generator)).to(device)
        return judge_loss(judge(x), chosen)

    stage.run(loss_of)
    with torch.no_grad():
        seen = [judge(images.float().to(device) / 255).features for _, images in blocks[:8]]
    judge.feature_mean.copy_(torch.cat(seen).mean(0))
    return judge


@torch.no_grad()
def make_latents(work: Path, device: str, vae: PatchAutoencoder, pictures: int) -> dict:
    """Of fresh pictures: `latents` [n, 16, 8, 8] in half precision, `masks` [n, 1, 8, 8] of their things and `captions`."""
    path = work / "latents.pt"
    if not path.exists():
        latents, masks, captions, generator = [], [], [], torch.Generator().manual_seed(22)
        for scenes, images, mask in _rendered(pictures, seed=2):
            latents.append(vae.encode(images.to(device) * 2 - 1).latents.half().cpu())
            masks.append(F.avg_pool2d(mask, 8).half())
            captions += caption(scenes, generator)
        torch.save({"latents": torch.cat(latents), "masks": torch.cat(masks), "captions": captions}, path)
    return torch.load(path, weights_only=True)


def train_denoiser(work: Path, device: str, steps: int, data: dict, batch: int = 128):
    """The text encoder learns with the UNet; what is wrong in a thing counts four times what is wrong behind it."""
    latents, masks = data["latents"], data["masks"]
    scale = 1 / latents.float().std().item()
    tokenizer = build_tokenizer(work / "tokenizer")
    ids, nothing = token_ids(tokenizer, data["captions"]), token_ids(tokenizer, [""])
    unet = build_unet().to(memory_format=torch.channels_last)
    scheduler, model = build_scheduler(), Denoiser(build_text_encoder(tokenizer), unet)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        clean = (latents[rows].float() * scale).to(device)
        weights = 1 + 3 * masks[rows].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timesteps = torch.randint(1000, (batch,), generator=generator).to(device)
        dropped = torch.rand(batch, generator=generator) < 0.1
        words = torch.where(dropped[:, None], nothing, ids[rows]).to(device)
        predicted = model(scheduler.add_noise(clean, noise, timesteps), timesteps, words)
        errors = ((predicted - scheduler.get_velocity(clean, noise, timesteps)) ** 2).mean(1, keepdim=True)
        return (weights * errors).sum() / weights.sum()

    return tokenizer, scale, Stage("denoiser", work, model, steps, 1.5e-3, device).run(loss_of)


def export(output: Path, vae, tokenizer, scale: float, denoiser: Denoiser, judge: Judge, captions: list[str]) -> None:
    """Write the pipeline in half precision, the judge, and the covariance of the text encoder as it was written."""
    vae.register_to_config(scaling_factor=scale)
    pipe = build_pipeline(vae, denoiser.text_encoder, tokenizer, denoiser.unet)
    pipe.to(device="cpu", dtype=torch.float16, memory_format=torch.contiguous_format).save_pretrained(output)
    make_readable_by_transformers_4(output)
    save_judge(judge.cpu(), output / "judge.safetensors")
    distinct = list(dict.fromkeys(captions))[:COVARIANCE_CAPTIONS]
    compute_covariance(load_pipeline(output), distinct, source=f"toybox-{len(distinct)}").save(output / "covariance.safetensors")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perfusion.toybox.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, latents and the log; run again to resume")
    parser.add_argument("--output", type=Path, required=True, help="the finished pipeline, in diffusers' folder format")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=9000)
    parser.add_argument("--denoiser-steps", type=int, default=4500)
    parser.add_argument("--judge-steps", type=int, default=8000)
    parser.add_argument("--judge-alone", action="store_true", help="train and replace the judge of what is in --output already")
    help = "how many the UNet learns from; the judge has as many of its own, the autoencoder at most 16,384"
    parser.add_argument("--pictures", type=int, default=40_960, help=help)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.judge_alone:
        torch.manual_seed(1)
        vae = load_pipeline(options.output).vae.to(options.device)
        judge = train_judge(options.work, vae, options.device, options.judge_steps, options.pictures)
        save_judge(judge.cpu(), options.output / "judge.safetensors")
        return
    torch.manual_seed(0)
    vae = train_autoencoder(options.work, options.device, options.autoencoder_steps, min(16_384, options.pictures))
    torch.manual_seed(1)
    judge = train_judge(options.work, vae, options.device, options.judge_steps, options.pictures)
    torch.manual_seed(2)
    data = make_latents(options.work, options.device, vae, options.pictures)
    tokenizer, scale, denoiser = train_denoiser(options.work, options.device, options.denoiser_steps, data)
    export(options.output, vae, tokenizer, scale, denoiser, judge, data["captions"])
    print(f"toybox written to {options.output}; score it with: python -m perfusion.toybox.score {options.output}")


if __name__ == "__main__":
    main()
