"""The judge, from rendered and decoded pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..judge import Judge, judge_loss
from ..render import render
from ..score import through
from ..vae import PatchAutoencoder
from ..words import OBJECTS
from ..world import repeat_instance, sample_instances, sample_pictures
from . import pictures
from .pictures import PICTURES_SEED, as_bytes, scenes
from .stage import Stage, mixed_precision

__all__ = ["train_judge"]

INSTANCES, REPEATS = 512, 8  # things, and pictures of each, that the discriminants are learned from


def train_judge(work: Path, vae: PatchAutoencoder, device: str, steps: int, paths: list[Path], data: dict, batch: int = 48) -> Judge:
    """Half of what it learns from has gone through the autoencoder, because generated pictures have, too."""
    torch.manual_seed(1)
    judge = Judge().to(memory_format=torch.channels_last)
    stage = Stage("judge", work, judge, steps, 2e-3, device, decay=0.995, anneal=0.5)
    images = _judged_pictures(work, device, vae, paths, data)
    size = pictures.PER_FILE
    shown = list(scenes(size * len(paths), seed=PICTURES_SEED))

    def loss_of(generator: torch.Generator) -> Tensor:
        judge.train()
        block, restored = int(torch.randint(len(shown), (1,), generator=generator)), int(torch.randint(2, (1,), generator=generator))
        rows = torch.randperm(size, generator=generator)[:batch]
        x = images[restored, size * block + rows].float() / 255
        x = (x + 0.03 * torch.rand((batch, 1, 1, 1), generator=generator) * torch.randn(x.shape, generator=generator)).to(device)
        predicted = bool(torch.rand((), generator=generator) < 0.5)
        with mixed_precision(device):
            return judge_loss(judge, x, shown[block].take(rows), data["masks"][size * block + rows].float(), predicted)

    if not stage.finished:
        stage.run(loss_of)
    stage.result()
    judge.set_discriminants(*_features_of_instances(judge, vae, device))
    return judge


@torch.no_grad()
def _judged_pictures(work: Path, device: str, vae: PatchAutoencoder, paths: list[Path], data: dict) -> Tensor:
    """The pictures as the judge looks at them, [2, n, 3, 64, 64] bytes: as rendered, and as decoded from their latents.

    A tenth of the decoded latents' spread is noise, because generated pictures are not exact either.
    """
    file = work / f"judged-{paths[0].parent.name}-{len(paths)}.pt"
    if not file.exists():
        generator, seen = torch.Generator().manual_seed(5), ([], [])
        latents = data["latents"][: pictures.PER_FILE * len(paths)].float().split(32)
        rendered = (part for path in paths for part in torch.load(path, weights_only=True)["images"].split(32))
        for images, part in tqdm(zip(rendered, latents), total=len(latents), desc="decode", mininterval=10):
            noise = 0.2 * torch.rand((len(part), 1, 1, 1), generator=generator) * torch.randn(part.shape, generator=generator)
            with mixed_precision(device):
                x = (part + noise).to(device, memory_format=torch.channels_last)
                decoded = vae.decode(x).sample.float().cpu().clamp(-1, 1) / 2 + 0.5
            for found, values in zip(seen, (images.float() / 255, decoded)):
                found.append(as_bytes(F.avg_pool2d(values, 2)))
        torch.save(torch.stack([torch.cat(found) for found in seen]), file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def _features_of_instances(judge: Judge, vae: PatchAutoencoder, device: str) -> tuple[Tensor, Tensor]:
    """The judge's features [INSTANCES, REPEATS, 128] of decoded pictures of things, alone or beside others, and the classes."""
    generator = torch.Generator().manual_seed(6)
    instances = sample_instances(INSTANCES, generator)
    features = []
    for row, kind in enumerate(tqdm(instances.object_class.tolist(), desc="instances", mininterval=10)):
        other = OBJECTS[(kind + 1 + row % (len(OBJECTS) - 1)) % len(OBJECTS)]
        things = {"first": repeat_instance(instances, row, REPEATS), "second": sample_instances(REPEATS, generator, other)}
        images = render(sample_pictures(REPEATS, generator, pairs=0.25, styled=0.0, **things))[0]
        features.append(judge.see(through(vae, images.to(device)).to(device), kind)[1].features.cpu())
    return torch.stack(features), instances.object_class
