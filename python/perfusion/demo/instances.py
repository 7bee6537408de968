"""The two things that the demo learns, and true pictures of them: instances that no caption can describe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from perfusion.files import whole
from perfusion.toybox.render import render
from perfusion.toybox.words import COLOURS, OBJECTS, PATTERNS, RELATIONS, SCENES
from perfusion.toybox.world import Instances, plainly, repeat_instance, sample_pictures

__all__ = ["SUBJECTS", "Subject", "reference_files", "reference_paths", "true_pairs", "true_pictures", "write_references"]

PICTURES = 5


@dataclasses.dataclass(frozen=True)
class Subject:
    """One particular thing: its class, the words a caption could say of it, and attributes that no caption says."""

    name: str
    superclass: str
    colour: str
    pattern: str
    attributes: tuple[float, ...]  # in the order of `toybox.world.ATTRIBUTES`

    def instance(self) -> Instances:
        classes = (OBJECTS.index(self.superclass), list(COLOURS).index(self.colour), PATTERNS.index(self.pattern))
        return Instances(*(torch.tensor([index]) for index in classes), torch.tensor([self.attributes]))


# fmt: off
SUBJECTS = (
    Subject("teddy", "teddy", "orange", "dotted", (
        0.075, 0.90, 0.95,  0.52, 0.55, 0.90,  0.14, 0.35, 1.00,  0.46, 0.60,  0.85, 0.75, 0.40, 0.80)),
    Subject("teapot", "teapot", "purple", "striped", (
        0.770, 0.65, 0.70,  0.14, 0.80, 0.95,  0.10, 0.06, 0.97,  0.50, 0.60,  0.75, 0.85, 0.60, 0.70)),
)
# fmt: on


def true_pictures(subject: Subject, count: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images [n, 3, 128, 128], masks [n, 128, 128] and scene words of the subject alone, in every scene in turn."""
    scenes = torch.arange(count) % len(SCENES)
    pictures = sample_pictures(
        count,
        torch.Generator().manual_seed(seed),
        first=repeat_instance(subject.instance(), 0, count),
        scene=scenes,
        relation=torch.zeros(count, dtype=torch.long),
        size=torch.zeros(count, dtype=torch.long),
    )
    images, masks = render(plainly(pictures))
    return images, masks[:, 0], [list(SCENES)[scene] for scene in scenes]


def true_pairs(first: Subject, second: Subject, relation: str, count: int, seed: int) -> Tensor:
    """Images [n, 3, 128, 128] of both subjects, the first in that relation to the second, in every scene in turn."""
    pictures = sample_pictures(
        count,
        torch.Generator().manual_seed(seed),
        first=repeat_instance(first.instance(), 0, count),
        second=repeat_instance(second.instance(), 0, count),
        scene=torch.arange(count) % len(SCENES),
        relation=torch.full((count,), RELATIONS.index(relation)),
    )
    return render(plainly(pictures))[0]


def reference_paths(subject: Subject, folder: Path, count: int = PICTURES) -> list[Path]:
    """Where the pictures to learn from lie."""
    return [folder / f"{subject.name}-{number}.png" for number in range(1, count + 1)]


def reference_files(path: Path) -> tuple[Path, Path, Path]:
    """A picture, its mask and its captions."""
    return path, path.with_name(f"{path.stem}-masklabel.png"), path.with_suffix(".txt")


def write_references(subject: Subject, folder: Path, count: int = PICTURES) -> Tensor:
    """Write the pictures to learn from, each with its captions and mask beside it; returns them [count, 3, 128, 128]."""
    images, masks, scenes = true_pictures(subject, count, seed=11)
    folder.mkdir(parents=True, exist_ok=True)
    for path, image, mask, scene in zip(reference_paths(subject, folder, count), images, masks, scenes):
        picture, label, text = reference_files(path)
        for file, values in ((picture, image.permute(1, 2, 0)), (label, mask)):
            with whole(file) as draft:
                Image.fromarray((values * 255).round().byte().numpy()).save(draft)
        phrase = SCENES[scene]
        captions = [f"a * {phrase}", f"a photo of a * {phrase}", f"a picture of a * {phrase}", f"{phrase} a *"]
        with whole(text) as draft:
            draft.write_text("\n".join(captions) + "\n", encoding="utf-8")
    return images
