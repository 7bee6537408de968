"""The recipe that made toybox: `python -m perfusion.toybox.train --work DIR --output DIR`.

Stages, each resumable from its last checkpoint in the work folder and logged to `log.jsonl` there: rendered pictures, the autoencoder,
the text encoder, latents, the judge and the UNet; then the export in diffusers' folder format.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from perfusion.covariance import compute_covariance
from perfusion.models import load_pipeline

from .judge import Judge, load_judge, save_judge
from .model import build_pipeline, make_readable_by_transformers_4
from .recipe.autoencoder import train_autoencoder
from .recipe.denoiser import train_denoiser
from .recipe.judge import train_judge
from .recipe.pictures import PICTURES_SEED, make_latents, make_pictures, scenes
from .recipe.text_encoder import train_text_encoder
from .vae import PatchAutoencoder
from .world import caption

COVARIANCE_CAPTIONS = 20_000
SOME_FILES = 96  # of 256 pictures each: enough for the autoencoder and the judge


def export(output: Path, vae: PatchAutoencoder, tokenizer, encoder, unet, judge: Judge, covariance: Path | None = None) -> None:
    """Write the pipeline in half precision, the judge, and the covariance of the text encoder as written, or a copy of `covariance`."""
    pipe = build_pipeline(vae, encoder, tokenizer, unet)
    pipe.to(device="cpu", dtype=torch.float16, memory_format=torch.contiguous_format).save_pretrained(output)
    make_readable_by_transformers_4(output)
    save_judge(judge.cpu(), output / "judge.safetensors")
    if covariance is not None and covariance.exists():
        if covariance != output / covariance.name:
            shutil.copyfile(covariance, output / covariance.name)
        return
    words = torch.Generator().manual_seed(30)
    captions = (text for block in scenes(4 * COVARIANCE_CAPTIONS, seed=3) for text in caption(block, words))
    distinct = list(dict.fromkeys(captions))[:COVARIANCE_CAPTIONS]
    compute_covariance(load_pipeline(output), distinct, source=f"toybox-{len(distinct)}").save(output / "covariance.safetensors")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perfusion.toybox.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, pictures and the log; run again to resume")
    parser.add_argument("--output", type=Path, required=True, help="the finished pipeline, in diffusers' folder format")
    parser.add_argument("--from", dest="start", type=Path, help="finished weights whose parts are kept, and whose UNet is trained further")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=int, default=61_440, help="how many are rendered; the first 24,576 teach autoencoder and judge")
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--text-steps", type=int, default=900)
    help = "at a flat rate; the default made the weights that are shipped, and more continue from its checkpoint"
    parser.add_argument("--denoiser-steps", type=int, default=12_000, help=help)
    parser.add_argument("--annealing-steps", type=int, default=1600, help="the falling rate's, after the flat one's")
    parser.add_argument("--judge-steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step of the UNet")
    options = parser.parse_args(arguments)
    work, device = options.work, options.device
    work.mkdir(parents=True, exist_ok=True)
    paths = make_pictures(work, options.pictures, PICTURES_SEED)
    some = paths[:SOME_FILES]
    if options.start is not None:
        pipe = load_pipeline(options.start, device="cpu", dtype=torch.float32)
        vae, tokenizer, encoder = pipe.vae.to(device), pipe.tokenizer, pipe.text_encoder.to(device).requires_grad_(False)
    else:
        vae = train_autoencoder(work, device, options.autoencoder_steps, some)
        tokenizer, encoder = train_text_encoder(work, device, options.text_steps)
    data = make_latents(work, device, vae, paths)
    if options.start is not None and (options.start / "judge.safetensors").exists():
        judge = load_judge(options.start / "judge.safetensors")
    else:
        judge = train_judge(work, vae, device, options.judge_steps, some, data)
    kinds = {"start": options.start, "batch": options.batch}
    unet = train_denoiser(work, device, options.denoiser_steps, data, tokenizer, encoder, **kinds)
    if options.annealing_steps:
        kinds["annealing"] = options.annealing_steps
        unet = train_denoiser(work, device, options.annealing_steps, data, tokenizer, encoder, **kinds)
    export(options.output, vae, tokenizer, encoder, unet, judge, options.start and options.start / "covariance.safetensors")
    print(f"toybox written to {options.output}; score it with: python -m perfusion.toybox.score {options.output}")


if __name__ == "__main__":
    main()
