"""The judge: a small network that reads a toybox picture back into what it shows.

It is trained on the renderer's truth, so it can score a generated picture with no outside model: which things, colour,
pattern, scene, relation and style it shows, and, by the features under its account of the first thing, how alike two
pictures' instances are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .words import COLOURS, OBJECTS, PATTERNS, RELATIONS, SCENES, STYLES
from .world import Pictures

LABELS = {"colour": tuple(COLOURS), "pattern": PATTERNS, "scene": tuple(SCENES), "relation": RELATIONS, "style": STYLES}
INSTANCE_TARGETS = 19


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip


@dataclass
class Verdict:
    """What the judge sees in B pictures: `things` [B, 8] presence logits, `labels` name -> logits [B, n],
    `instance` [B, 19] the first thing's attributes, `features` [B, 128] what they are read from."""

    things: Tensor
    labels: dict[str, Tensor]
    instance: Tensor
    features: Tensor


class Looks(nn.Module):
    """Maps [B, C, H, W] -> [B, looks C]: weighted means, each look weighing the spots in its own way."""

    def __init__(self, channels: int, looks: int):
        super().__init__()
        self.weigh = nn.Conv2d(channels, looks, 1)

    def forward(self, maps: Tensor) -> Tensor:
        weights = self.weigh(maps).flatten(2).softmax(2)
        return (weights @ maps.flatten(2).mT).flatten(1)


class Judge(nn.Module):
    """Images [B, 3, 64, 64] in [0, 1] -> Verdict."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(Block(3, 32, 2), Block(32, 64, 2), Block(64, 96, 2))
        self.subject = nn.Sequential(Block(96, 128, 1), Looks(128, 6))
        self.subject_features = nn.Sequential(nn.Linear(6 * 128, 128), nn.ReLU())
        self.surroundings = nn.Sequential(Block(96, 96, 2), nn.Flatten(1), nn.Linear(96 * 16, 96), nn.ReLU())
        self.things = nn.Linear(128 + 96, len(OBJECTS))
        self.subject_heads = nn.ModuleDict({name: nn.Linear(128, len(LABELS[name])) for name in ("colour", "pattern")})
        self.scene_heads = nn.ModuleDict({name: nn.Linear(96, len(LABELS[name])) for name in ("scene", "relation", "style")})
        self.instance = nn.Linear(128, INSTANCE_TARGETS)
        self.register_buffer("feature_mean", torch.zeros(128))

    def forward(self, images: Tensor) -> Verdict:
        maps = self.trunk(images * 2 - 1)
        features = self.subject_features(self.subject(maps))
        around = self.surroundings(maps)
        labels = {name: head(features) for name, head in self.subject_heads.items()}
        labels |= {name: head(around) for name, head in self.scene_heads.items()}
        return Verdict(self.things(torch.cat([features, around], dim=1)), labels, self.instance(features), features)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit features of the instance [B, 128], centred on the world's mean: their products are similarities."""
        self.eval()
        chunks = [self(chunk).features - self.feature_mean for chunk in images.split(128)]
        return F.normalize(torch.cat(chunks), dim=1)

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Indices [B] of the best class for `object` and every label; `things` [B, 2] are the two likeliest objects."""
        self.eval()
        verdicts = [self(chunk) for chunk in images.split(128)]
        things = torch.cat([verdict.things for verdict in verdicts])
        seen = {name: torch.cat([verdict.labels[name] for verdict in verdicts]).argmax(1) for name in LABELS}
        return seen | {"object": things.argmax(1), "things": things.topk(2, dim=1).indices}


def instance_targets(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Regression targets [B, 19] of the first thing and their weights: a plain thing has no pattern to describe."""
    a = pictures.first.attributes
    hues = torch.cat([f(2 * torch.pi * a[:, [0, 3, 6]]) for f in (torch.cos, torch.sin)], dim=1)
    rest = a[:, [1, 2, 4, 5, 7, 8]] * 2 - 1
    pitch = (a[:, 9:10] - 0.45) / 0.15
    slant = torch.cos(2 * a[:, 10:11])
    targets = torch.cat([hues, rest, pitch, slant, a[:, 11:15] * 2 - 1, torch.zeros(len(a), 1)], dim=1)
    weights = torch.ones_like(targets)
    plain = pictures.first.pattern == 0
    weights[plain[:, None] & torch.isin(torch.arange(INSTANCE_TARGETS), torch.tensor([2, 5, 10, 11, 12, 13]))] = 0
    weights[(pictures.first.pattern != 1)[:, None] & (torch.arange(INSTANCE_TARGETS) == 13)] = 0  # dots have no slant
    weights[:, 18] = 0
    return targets, weights


def things_present(pictures: Pictures) -> Tensor:
    """[B, 8], 1 where a picture holds that class."""
    present = F.one_hot(pictures.first.object_class, len(OBJECTS)).float()
    second = F.one_hot(pictures.second.object_class, len(OBJECTS)).float()
    return torch.where((pictures.relation > 0)[:, None], torch.maximum(present, second), present)


def judge_loss(verdict: Verdict, pictures: Pictures) -> Tensor:
    """The sum of all heads' losses; colour is not asked of sketches, nor the instance of the first of two alike."""
    coloured = (pictures.style == 0).float()
    alone = (pictures.relation == 0).float()
    loss = F.binary_cross_entropy_with_logits(verdict.things, things_present(pictures)) * 4
    every = torch.ones_like(alone)
    truth = {
        "pattern": (pictures.first.pattern, 3 * alone),  # the hardest to see
        "colour": (pictures.first.colour, 2 * coloured * alone),
        "scene": (pictures.scene, every),
        "relation": (pictures.relation, every),
        "style": (pictures.style, every),
    }
    for name, (target, weight) in truth.items():
        loss = loss + (F.cross_entropy(verdict.labels[name], target, reduction="none") * weight).mean()
    targets, weights = instance_targets(pictures)
    return loss + 2 * (((verdict.instance - targets) ** 2 * weights).mean(1) * coloured * alone).mean()


def save_judge(judge: Judge, path: Path) -> None:
    tensors = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items() if "num_batches" not in name}
    save_file(tensors, path)


def load_judge(path: Path) -> Judge:
    """The judge at `path`, in float32 and ready to read."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=False)
    return judge.eval()
