"""What the choices of the recipe are worth: `python -m perfusion.toybox.ablate --work DIR --output ROWS.jsonl`.

Short trainings with one choice undone, scored by the finished model's judge; autoencoder and text encoder are the finished model's too. The
recipe's pictures are in `--work`, or rendered into it; each training has a folder of its own there and is resumed when run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perfusion.models import load_pipeline

from .judge import load_judge
from .model import LATENT_CHANNELS, build_pipeline
from .recipe.autoencoder import train_autoencoder
from .recipe.denoiser import train_denoiser
from .recipe.pictures import PER_FILE, PICTURES_SEED, make_latents, make_pictures
from .score import GUIDANCE, WEIGHTS, score_base
from .words import PATTERNS

CHANNELS = (4, LATENT_CHANNELS)


def as_shipped(data: dict, vae: Any, paths: list[Path]) -> dict:
    """The recipe's own pictures and captions."""
    return data


@torch.no_grad()
def mirrored(data: dict, vae: Any, paths: list[Path]) -> dict:
    """Every second picture from right to left, so that spouts and handles point either way."""
    latents, masks = data["latents"].clone(), data["masks"].clone()
    for number, path in enumerate(paths):
        images = torch.load(path, weights_only=True)["images"][::2].flip(3)
        rows = slice(PER_FILE * number, PER_FILE * (number + 1), 2)
        latents[rows] = torch.cat([vae.encode(part.float() / 127.5 - 1).latents.half() for part in images.split(32)])
        masks[rows] = masks[rows].flip(3)
    return data | {"latents": latents, "masks": masks}


def patterns_unsaid(data: dict, vae: Any, paths: list[Path]) -> dict:
    """Three captions in ten leave the pattern out."""
    unsaid = (torch.rand(len(data["captions"]), generator=torch.Generator().manual_seed(40)) < 0.3).tolist()
    captions = [" ".join(word for word in text.split() if not (drop and word in PATTERNS)) for text, drop in zip(data["captions"], unsaid)]
    return data | {"captions": captions}


VARIANTS: dict[str, Callable[..., dict]] = {"as shipped": as_shipped, "mirrored": mirrored, "patterns unsaid in 30 %": patterns_unsaid}


@torch.no_grad()
def restoration(vae: Any, images: Tensor, masks: Tensor) -> dict[str, float]:
    """PSNR in dB of images [n, 3, 128, 128] in bytes through the autoencoder, everywhere and inside the things."""
    x = images.float() / 255
    restored = torch.cat([vae.decode(vae.encode(part * 2 - 1).latents).sample for part in x.split(32)]).clamp(-1, 1) / 2 + 0.5
    errors = (restored - x).square().mean(1, keepdim=True)
    inside = F.interpolate(masks.float().sum(1, keepdim=True).clamp(max=1), scale_factor=8)
    means = {"psnr": errors.mean(), "psnr of things": (errors * inside).sum() / inside.sum()}
    return {name: -10 * mean.log10().item() for name, mean in means.items()}


def _seconds(started: float) -> float:
    return round(time.monotonic() - started, 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perfusion.toybox.ablate", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the recipe's pictures, and what is trained; run again to resume")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the finished model, a pipeline's folder with its judge")
    parser.add_argument("--output", type=Path, required=True, help="rows are added here, one JSON object a line")
    parser.add_argument("--pictures", type=int, default=61_440, help="as many as the recipe had")
    parser.add_argument("--steps", type=int, default=1000, help="of the UNet, 32 pictures each")
    parser.add_argument("--autoencoder-steps", type=int, default=900, help="16 pictures each")
    parser.add_argument("--samples", type=int, default=64, help="pictures of each kind in a score")
    options = parser.parse_args(arguments)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    paths = make_pictures(work, options.pictures, PICTURES_SEED)

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row))
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    held_out = torch.load(paths[-1], weights_only=True)  # no autoencoder has seen it
    for channels in CHANNELS:
        folder, started = work / f"ablation-{channels}-channels", time.monotonic()
        folder.mkdir(exist_ok=True)
        vae = train_autoencoder(folder, "cpu", options.autoencoder_steps, paths[:40], channels=channels)
        row = {"choice": "latents", "variant": f"16×16×{channels}", "steps": options.autoencoder_steps, "seconds": _seconds(started)}
        keep(row | restoration(vae, held_out["images"], held_out["masks"]))
    pipe, judge = load_pipeline(options.weights, device="cpu", dtype=torch.float32), load_judge(options.weights / "judge.safetensors")
    vae, tokenizer, encoder = pipe.vae, pipe.tokenizer, pipe.text_encoder
    data = make_latents(work, "cpu", vae, paths)
    for name, change in VARIANTS.items():
        folder, started = work / f"ablation-{name.split()[0]}", time.monotonic()
        folder.mkdir(exist_ok=True)
        changed = change(data, vae, paths)
        for steps in _stages(options.steps) if change is as_shipped else (options.steps,):
            unet = train_denoiser(folder, "cpu", steps, changed, tokenizer, encoder)
            row = {"choice": "captions and pictures" if steps == options.steps else "steps", "variant": name, "steps": steps}
            row |= {"seconds": _seconds(started), "samples": options.samples, "guidance": GUIDANCE}
            keep(row | score_base(build_pipeline(vae, encoder, tokenizer, unet), judge, options.samples))


def _stages(steps: int) -> tuple[int, ...]:
    """Where the recipe's own training is looked at on its way: a quarter, a half and all of its steps."""
    return steps // 4, steps // 2, steps


if __name__ == "__main__":
    main()
