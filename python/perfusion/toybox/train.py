"""The recipe that made toybox: `python -m perfusion.toybox.train --work DIR --output DIR`.

Stages, each resumable from its last checkpoint in the work folder and logged to `log.jsonl` there: rendered pictures, the autoencoder,
the text encoder, latents, the judge and the UNet; then the export in diffusers' folder format.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion.covariance import compute_covariance
from perfusion.models import load_pipeline

from .judge import Judge, judge_loss, load_judge, save_judge
from .model import (
    ENCODING_DIM,
    EXTRA_WORDS,
    LATENT_CHANNELS,
    MAX_TOKENS,
    build_autoencoder,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    make_readable_by_transformers_4,
    token_ids,
    vocabulary,
)
from .render import render
from .score import through
from .text import EMBEDDING_SCALE, codes, noisy_nouns, targets_of
from .vae import PatchAutoencoder
from .words import OBJECTS
from .world import Pictures, caption, repeat_instance, sample_instances, sample_pictures

EMA_DECAY = 0.9995
SAVE_EVERY = 500
COVARIANCE_CAPTIONS = 20_000
PICTURES_SEED = 2
SOME_FILES = 96  # of 256 pictures each: enough for the autoencoder and the judge


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


def _scenes(count: int, seed: int) -> Iterator[Pictures]:
    """What `count` pictures show, in blocks of 256, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (sample_pictures(256, generator) for _ in range(math.ceil(count / 256)))


def _rendered(count: int, seed: int) -> Iterator[tuple[Pictures, Tensor, Tensor]]:
    """The same with images [256, 3, 128, 128] and masks [256, 2, 128, 128] of first and second things."""
    for pictures in tqdm(_scenes(count, seed), total=math.ceil(count / 256), desc="render", mininterval=10):
        yield pictures, *render(pictures)


def make_pictures(work: Path, count: int, seed: int) -> list[Path]:
    """Render pictures into files of 256 each: images in bytes, masks [256, 2, 16, 16] in half precision, and captions."""
    folder = work / f"pictures-{seed}"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:04d}.pt" for number in range(math.ceil(count / 256))]
    if not all(path.exists() for path in paths):
        words = torch.Generator().manual_seed(20 + seed)
        for path, (pictures, images, masks) in zip(paths, _rendered(count, seed)):
            block = {"images": _bytes(images), "masks": F.avg_pool2d(masks, 8).half(), "captions": caption(pictures, words)}
            torch.save(block, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
    return paths


def _bytes(values: Tensor) -> Tensor:
    return (values * 255).round().byte()


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


def train_text_encoder(work: Path, device: str, steps: int, batch: int = 64) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Learned from captions alone; see `text`. Token embeddings are the codes themselves and stay."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    table = codes(len(tokenizer), ENCODING_DIM)
    embedding = encoder.get_input_embeddings().weight
    embedding.data.copy_(EMBEDDING_SCALE * table[: len(tokenizer)])
    embedding.requires_grad_(False)
    stage = Stage("text", work, encoder, steps, 3e-3, device, decay=0.995, anneal=0.7)
    ids = {word: tokenizer(word, add_special_tokens=False).input_ids[0] for word in vocabulary()}
    nouns = torch.tensor([ids[word] for word in OBJECTS])
    spare = [word for word in EXTRA_WORDS if word not in ("in", "on")]

    def loss_of(generator: torch.Generator) -> Tensor:
        pictures = sample_pictures(batch, generator, pairs=0.6)
        texts = [_reworded(text.split(), spare, generator) for text in caption(pictures, generator, named=0.6)]
        tokens = token_ids(tokenizer, [" ".join(words) for words in texts])
        targets = targets_of(texts, ids, len(tokenizer), MAX_TOKENS, table)
        embeddings, targets = noisy_nouns(embedding.cpu()[tokens], targets, torch.isin(tokens, nouns), generator)
        encoded = encode_embeddings(encoder, embeddings.to(device))
        errors = (encoded - targets.to(device)) ** 2
        return errors.mean() + errors[torch.isin(tokens, nouns)].mean()

    if not stage.finished:
        stage.run(loss_of)
    return tokenizer, stage.result().requires_grad_(False)


def encode_embeddings(encoder: CLIPTextModel, embeddings: Tensor) -> Tensor:
    """The encoder's output [B, T, D] of token embeddings [B, T, D] instead of ids."""
    hook = encoder.get_input_embeddings().register_forward_hook(lambda module, inputs, output: embeddings)
    try:
        return encoder(torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device))[0]
    finally:
        hook.remove()


def _reworded(words: list[str], spare: list[str], generator: torch.Generator) -> list[str]:
    """Some captions with another article, and some with further words in front, so that places vary."""
    other, front, which = torch.rand(3, generator=generator).tolist()
    if other < 0.2:
        words = [spare[int(which * len(spare))] if word in ("a", "an") else word for word in words]
    if front < 0.2:
        words = [spare[int(torch.randint(len(spare), (1,), generator=generator))] for _ in range(1 + int(front * 20))] + words
    return words


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 products, which make the autoencoder's convolutions twice as fast, on a CPU too."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


@torch.no_grad()
def make_latents(work: Path, device: str, vae: PatchAutoencoder, paths: list[Path]) -> dict:
    """Of rendered pictures: `latents` [n, 4, 16, 16] and `masks` [n, 2, 16, 16] in half precision, and `captions`."""
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


@torch.no_grad()
def _judged_pictures(work: Path, device: str, vae: PatchAutoencoder, paths: list[Path], data: dict) -> Tensor:
    """The pictures as the judge looks at them, [2, n, 3, 64, 64] bytes: as rendered, and as decoded from their latents.

    A tenth of the decoded latents' spread is noise, because generated pictures are not exact either.
    """
    file = work / f"judged-{paths[0].parent.name}-{len(paths)}.pt"
    if not file.exists():
        generator, seen = torch.Generator().manual_seed(5), ([], [])
        latents = data["latents"][: 256 * len(paths)].float().split(32)
        rendered = (part for path in paths for part in torch.load(path, weights_only=True)["images"].split(32))
        for images, part in tqdm(zip(rendered, latents), total=len(latents), desc="decode", mininterval=10):
            noise = 0.2 * torch.rand((len(part), 1, 1, 1), generator=generator) * torch.randn(part.shape, generator=generator)
            with mixed_precision(device):
                x = (part + noise).to(device, memory_format=torch.channels_last)
                decoded = vae.decode(x).sample.float().cpu().clamp(-1, 1) / 2 + 0.5
            for found, values in zip(seen, (images.float() / 255, decoded)):
                found.append(_bytes(F.avg_pool2d(values, 2)))
        torch.save(torch.stack([torch.cat(found) for found in seen]), file)
    return torch.load(file, weights_only=True)


def train_judge(work: Path, vae: PatchAutoencoder, device: str, steps: int, paths: list[Path], data: dict, batch: int = 48) -> Judge:
    """Half of what it learns from has gone through the autoencoder, because generated pictures have, too."""
    torch.manual_seed(1)
    judge = Judge().to(memory_format=torch.channels_last)
    stage = Stage("judge", work, judge, steps, 2e-3, device, decay=0.995, anneal=0.5)
    images = _judged_pictures(work, device, vae, paths, data)
    scenes = list(_scenes(256 * len(paths), seed=PICTURES_SEED))

    def loss_of(generator: torch.Generator) -> Tensor:
        judge.train()
        block, restored = int(torch.randint(len(scenes), (1,), generator=generator)), int(torch.randint(2, (1,), generator=generator))
        rows = torch.randperm(256, generator=generator)[:batch]
        x = images[restored, 256 * block + rows].float() / 255
        x = (x + 0.03 * torch.rand((batch, 1, 1, 1), generator=generator) * torch.randn(x.shape, generator=generator)).to(device)
        predicted = bool(torch.rand((), generator=generator) < 0.5)
        with mixed_precision(device):
            return judge_loss(judge, x, scenes[block].take(rows), data["masks"][256 * block + rows].float(), predicted)

    if not stage.finished:
        stage.run(loss_of)
    stage.result()
    judge.set_discriminants(*_features_of_instances(judge, vae, device))
    return judge


@torch.no_grad()
def _features_of_instances(judge: Judge, vae: PatchAutoencoder, device: str, count: int = 512, repeats: int = 8) -> tuple[Tensor, Tensor]:
    """The judge's features [count, repeats, 128] of decoded pictures of things, alone or beside others, and the classes."""
    generator = torch.Generator().manual_seed(6)
    instances = sample_instances(count, generator)
    features = []
    for row, kind in enumerate(tqdm(instances.object_class.tolist(), desc="instances", mininterval=10)):
        other = OBJECTS[(kind + 1 + row % (len(OBJECTS) - 1)) % len(OBJECTS)]
        things = {"first": repeat_instance(instances, row, repeats), "second": sample_instances(repeats, generator, other)}
        images = render(sample_pictures(repeats, generator, pairs=0.25, styled=0.0, **things))[0]
        features.append(judge.see(through(vae, images.to(device)).to(device), kind)[1].features.cpu())
    return torch.stack(features), instances.object_class


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
    captions = (text for block in _scenes(4 * COVARIANCE_CAPTIONS, seed=3) for text in caption(block, words))
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
    help = "at a flat rate; an interrupted run keeps its last checkpoint, so that fewer can be made of many"
    parser.add_argument("--denoiser-steps", type=int, default=35_000, help=help)
    parser.add_argument("--annealing-steps", type=int, default=3000, help="the falling rate's, after the flat one's")
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
