"""The judge: a small network that reads a toybox picture back into what it shows.

It is trained on the renderer's truth, so it can score a generated picture with no outside model: which things it shows and where
(a mask for each class), each thing's colour and pattern, the scene, relation, style and size, and features of each thing under its
mask by which two pictures' instances are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .words import COLOURS, OBJECTS, PATTERNS, RELATIONS, SCENES, SIZES, STYLES
from .world import Instances, Pictures

SIZE, CELLS = 64, 16  # pixels that the judge looks at, and cells of its masks, each way
PICTURE_LABELS = {"scene": tuple(SCENES), "relation": RELATIONS, "style": STYLES, "size": SIZES}
THING_LABELS = {"colour": tuple(COLOURS), "pattern": PATTERNS}
FEATURES, ATTRIBUTE_TARGETS = 128, 18


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip


@dataclass
class Verdict:
    """What the judge sees in B pictures: `things` [B, 8] presence logits, `masks` [B, 9, 16, 16] class logits of each cell with the
    background last, `labels` name -> logits [B, n], `maps` [B, 128, 16, 16] that things are read from, `surroundings` [B, 96]."""

    things: Tensor
    masks: Tensor
    labels: dict[str, Tensor]
    maps: Tensor
    surroundings: Tensor


@dataclass
class Thing:
    """One thing of each picture: `features` [B, 128], `labels` name -> logits [B, n], `attributes` [B, 18]."""

    features: Tensor
    labels: dict[str, Tensor]
    attributes: Tensor


class Looks(nn.Module):
    """Maps [B, C, H, W] and masks [B, H, W] -> [B, looks C]: means weighted inside the mask, each look in its own way."""

    def __init__(self, channels: int, looks: int):
        super().__init__()
        self.weigh = nn.Conv2d(channels, looks, 1)

    def forward(self, maps: Tensor, masks: Tensor) -> Tensor:
        inside = (masks + 1e-4).log().unsqueeze(1)
        weights = (self.weigh(maps).float() + inside).flatten(2).softmax(2).to(maps.dtype)
        return (weights @ maps.flatten(2).mT).flatten(1)


class Judge(nn.Module):
    """Images [B, 3, H, W] in [0, 1], of any size that 64 divides -> Verdict; `look_at` reads one thing under a mask."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(Block(3, 32, 2), Block(32, 64, 2), Block(64, 96, 1))
        self.segment = nn.Sequential(Block(96, 96, 2), nn.Upsample(scale_factor=2))
        self.masks = nn.Conv2d(2 * 96, len(OBJECTS) + 1, 1)
        self.maps = Block(96, FEATURES, 1)
        self.looks = Looks(FEATURES, 6)
        self.thing_features = nn.Sequential(nn.Linear(6 * FEATURES, FEATURES), nn.ReLU())
        self.thing_labels = nn.ModuleDict({name: nn.Linear(FEATURES, len(words)) for name, words in THING_LABELS.items()})
        self.attributes = nn.Linear(FEATURES, ATTRIBUTE_TARGETS)
        self.surroundings = nn.Sequential(Block(96, 96, 2), nn.AvgPool2d(2), nn.Flatten(1), nn.Linear(96 * 16, 96), nn.ReLU())
        self.things = nn.Linear(96 + len(OBJECTS), len(OBJECTS))
        self.picture_labels = nn.ModuleDict({name: nn.Linear(96, len(words)) for name, words in PICTURE_LABELS.items()})
        self.register_buffer("class_means", torch.zeros(len(OBJECTS), FEATURES))
        self.register_buffer("discriminants", torch.eye(FEATURES))

    def forward(self, images: Tensor) -> Verdict:
        images = F.avg_pool2d(images, images.shape[-1] // SIZE) if images.shape[-1] > SIZE else images
        maps = self.trunk(images * 2 - 1)
        masks = self.masks(torch.cat([maps, self.segment(maps)], dim=1))
        around = self.surroundings(maps)
        area = masks.float().softmax(1)[:, :-1].sum((2, 3)) / 16  # in units of 16 cells
        labels = {name: head(around) for name, head in self.picture_labels.items()}
        return Verdict(self.things(torch.cat([around, area.to(around.dtype)], dim=1)), masks, labels, self.maps(maps), around)

    def look_at(self, verdict: Verdict, masks: Tensor) -> Thing:
        """The thing under masks [B, 16, 16] in [0, 1]."""
        features = self.thing_features(self.looks(verdict.maps, masks))
        return Thing(features, {name: head(features) for name, head in self.thing_labels.items()}, self.attributes(features))

    @torch.no_grad()
    def see(self, images: Tensor, object_class: Tensor | int | None = None) -> tuple[dict[str, Tensor], Thing]:
        """Indices [B] of the best class of every label, and the thing of `object_class` in each picture; by default the likeliest.

        `object` is the likeliest class, `things` [B, 2] are the two likeliest, `present` [B, 8] is true for all that are seen.
        """
        self.eval()
        rows: list[dict[str, Tensor]] = []
        parts: list[Thing] = []
        classes = None if object_class is None else torch.as_tensor(object_class).expand(len(images))
        for start in range(0, len(images), 128):
            verdict = self(images[start : start + 128])
            seen = {name: logits.argmax(1) for name, logits in verdict.labels.items()}
            seen |= {"object": verdict.things.argmax(1), "things": verdict.things.topk(2, dim=1).indices, "present": verdict.things > 0}
            chosen = seen["object"] if classes is None else classes[start : start + 128]
            thing = self.look_at(verdict, verdict.masks.softmax(1)[torch.arange(len(chosen)), chosen])
            rows.append(seen | {name: logits.argmax(1) for name, logits in thing.labels.items()})
            parts.append(thing)
        seen = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        labels = {name: torch.cat([part.labels[name] for part in parts]) for name in THING_LABELS}
        return seen, Thing(torch.cat([p.features for p in parts]), labels, torch.cat([p.attributes for p in parts]))

    def read(self, images: Tensor, object_class: Tensor | int | None = None) -> dict[str, Tensor]:
        """The first half of `see`."""
        return self.see(images, object_class)[0]

    def features(self, images: Tensor, object_class: Tensor | int | None = None) -> Tensor:
        """Unit features [B, 128] of the thing, by which its class's instances differ: their products are similarities."""
        seen, thing = self.see(images, object_class)
        kind = seen["object"] if object_class is None else torch.as_tensor(object_class).expand(len(images))
        return F.normalize((thing.features - self.class_means[kind]) @ self.discriminants, dim=1)

    def set_discriminants(self, features: Tensor, object_class: Tensor) -> None:
        """From features [instances, pictures of each, 128] and the instances' classes [instances]: what tells instances of one class apart.

        Linear discriminants (Fisher, 1936): directions along which instances spread far wider than the pictures of one of them do,
        scaled so that the latter have deviation 1, and each weighed by the share of its variance that instances explain.
        """
        features, repeats = features.double(), features.shape[1]
        means = torch.stack([features[object_class == kind].mean((0, 1)) for kind in range(len(OBJECTS))])
        instances = features.mean(1)
        within = torch.cov((features - instances[:, None]).flatten(0, 1).T) * repeats / (repeats - 1)
        between = torch.cov((instances - means[object_class]).T) - within / repeats
        values, vectors = torch.linalg.eigh(within + 1e-3 * within.diagonal().mean() * torch.eye(FEATURES))
        whiten = vectors / values.sqrt()
        spread, directions = torch.linalg.eigh(whiten.T @ between @ whiten)
        spread = spread.clamp(min=0)
        self.class_means = means.float()
        self.discriminants = (whiten @ directions * (spread / (1 + spread))).float()

    @torch.no_grad()
    def summary(self, images: Tensor) -> Tensor:
        """[B, 224] features of thing and surroundings, for `frechet_distance`."""
        self.eval()
        found = []
        for chunk in images.split(128):
            verdict = self(chunk)
            masks = 1 - verdict.masks.softmax(1)[:, -1]
            found.append(torch.cat([self.look_at(verdict, masks).features, verdict.surroundings], dim=1))
        return torch.cat(found)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to features [n, d] and [m, d] (Heusel et al., 2017): |mean difference|² + tr(A + B - 2 √(AB))."""
    a, b = a.double(), b.double()
    first, second = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross)


def attribute_targets(things: Instances) -> tuple[Tensor, Tensor]:
    """Regression targets [B, 18] and their weights: a plain thing has no pattern to describe."""
    a = things.attributes
    hues = torch.cat([f(2 * torch.pi * a[:, [0, 3, 6]]) for f in (torch.cos, torch.sin)], dim=1)
    rest = a[:, [1, 2, 4, 5, 7]] * 2 - 1
    pitch, slant = (a[:, 9:10] - 0.48) / 0.06, (a[:, 10:11] - 0.60) / 0.12
    targets = torch.cat([hues, rest, pitch, slant, a[:, 11:15] * 2 - 1, a[:, 8:9] * 2 - 1], dim=1)
    weights = torch.ones_like(targets)
    weights[:, 2] = weights[:, 5] = (a[:, 7] > 0.08).float()  # a white ornament has no hue
    weights[things.pattern == 0] *= (~torch.isin(torch.arange(ATTRIBUTE_TARGETS), torch.tensor([2, 5, 10, 11, 12, 17]))).float()
    return targets, weights


def things_present(pictures: Pictures) -> Tensor:
    """[B, 8], 1 where a picture holds that class."""
    present = F.one_hot(pictures.first.object_class, len(OBJECTS)).float()
    second = F.one_hot(pictures.second.object_class, len(OBJECTS)).float()
    return torch.where((pictures.relation > 0)[:, None], torch.maximum(present, second), present)


def class_masks(masks: Tensor, pictures: Pictures) -> Tensor:
    """Shares [B, 9, 16, 16] of each cell that each class covers, the background last, from masks [B, 2, 16, 16] of first and second."""
    shares = torch.zeros(len(masks), len(OBJECTS) + 1, *masks.shape[2:])
    rows = torch.arange(len(masks))
    shares[rows, pictures.first.object_class] += masks[:, 0]
    shares[rows, pictures.second.object_class] += masks[:, 1]
    shares[:, -1] = (1 - masks.sum(1)).clamp(min=0)
    return shares / shares.sum(1, keepdim=True)


def judge_loss(judge: Judge, images: Tensor, pictures: Pictures, masks: Tensor, predicted: bool) -> Tensor:
    """The sum of all heads' losses. Colour and attributes are not asked of pencil sketches, nor either thing of two of one class.

    masks: [B, 2, 16, 16]. predicted: read the things under the judge's own masks, as is done later, instead of the true ones.
    """
    verdict = judge(images)
    shares = class_masks(masks, pictures)
    log_masks = verdict.masks.float().log_softmax(1)
    loss = F.binary_cross_entropy_with_logits(verdict.things.float(), things_present(pictures)) * 4
    loss = loss - 2 * (shares * log_masks).sum(1).mean()
    for name in PICTURE_LABELS:
        loss = loss + F.cross_entropy(verdict.labels[name].float(), getattr(pictures, name))
    paired = pictures.relation > 0
    distinct = ~paired | (pictures.first.object_class != pictures.second.object_class)
    rows = torch.arange(len(images))
    for things, there in ((pictures.first, distinct), (pictures.second, distinct & paired)):
        found = (log_masks.exp().detach() if predicted else shares)[rows, things.object_class]
        thing = judge.look_at(verdict, found)
        asked = (there & (shares[rows, things.object_class].sum((1, 2)) > 4)).float()  # at least four cells of it are seen
        coloured = asked * (pictures.style != 1)
        for name, weight in (("colour", coloured), ("pattern", 2 * asked)):
            loss = loss + (F.cross_entropy(thing.labels[name].float(), getattr(things, name), reduction="none") * weight).mean()
        targets, weights = attribute_targets(things)
        loss = loss + 2 * (((thing.attributes.float() - targets) ** 2 * weights).mean(1) * coloured).mean()
    return loss


KEPT_EXACT = ("class_means", "discriminants")


def save_judge(judge: Judge, path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in judge.state_dict().items() if "num_batches" not in name}
    tensors |= {name: getattr(judge, name) for name in KEPT_EXACT}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path)


def load_judge(path: Path) -> Judge:
    """The judge at `path`, in float32 and ready to read."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=False)
    return judge.eval()
