"""Scores of single pictures by toybox's judge: what a prompt asked for, and the identity of each learned thing under its mask.

Identity is linear in the similarity of features: 0 is the mean of the base model's pictures of the superclass word, with the same prompts
and seeds; 1 is the mean of true pictures of the thing, by the renderer. Things alone and things beside another are measured apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.fidelity.prompts import Prompt
from perfusion.demo.instances import Subject, true_pictures
from perfusion.toybox.judge import Judge
from perfusion.toybox.render import render
from perfusion.toybox.words import COLOURS, CONTAINERS, OBJECTS, PATTERNS
from perfusion.toybox.world import plainly, repeat_instance, sample_instances, sample_pictures

__all__ = ["CHECKS", "Yardstick", "check", "similarities", "yardstick"]

TRUE = 36  # pictures of each set of true ones: a multiple of scenes and of relations
CHECKS = ("object", "scene", "style", "colour", "pattern", "relation", "other", "count")  # what a prompt can ask for


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """Of one thing and one group ("alone" or "paired"): the mean feature of true pictures [128], and of others the mean similarity."""

    anchor: Tensor
    high: float


@functools.cache
def true_set(subject: Subject, group: str, seed: int) -> Tensor:
    """Images [n, 3, 128, 128] by the renderer."""
    if group == "alone":
        return true_pictures(subject, TRUE, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    relation = 1 + torch.arange(TRUE) % 3
    others = [word for word in OBJECTS if word != subject.superclass]
    containers = [word for word in CONTAINERS if word != subject.superclass]
    kinds = [containers[n % len(containers)] if relation[n] == 1 else others[n % len(others)] for n in range(TRUE)]
    own, second = repeat_instance(subject.instance(), 0, TRUE), sample_instances(TRUE, generator)
    second.object_class = torch.tensor([OBJECTS.index(kind) for kind in kinds])
    swapped = (torch.arange(TRUE) % 2 == 1) & (relation != 1)  # half of the time it stands in the second place
    first = dataclasses.replace(own, **{f: _where(swapped, getattr(second, f), getattr(own, f)) for f in _FIELDS})
    second = dataclasses.replace(second, **{f: _where(swapped, getattr(own, f), getattr(second, f)) for f in _FIELDS})
    pictures = sample_pictures(TRUE, generator, first=first, second=second, relation=relation, scene=torch.arange(TRUE) % 6)
    return render(plainly(pictures))[0]


_FIELDS = ("object_class", "colour", "pattern", "attributes")


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (yes.dim() - 1)), yes, no)


@functools.cache
def yardstick(judge: Judge, subject: Subject, group: str) -> Yardstick:
    kind = OBJECTS.index(subject.superclass)
    anchor = judge.features(true_set(subject, group, 21), kind).mean(0)
    high = (judge.features(true_set(subject, group, 22), kind) @ anchor).mean().item()
    return Yardstick(anchor, high)


def similarities(judge: Judge, subject: Subject, prompts: Sequence[Prompt], images: Tensor) -> list[float | None]:
    """How like the thing each picture's thing of its class is; None where the prompt changes the thing."""
    kind = OBJECTS.index(subject.superclass)
    features = judge.features(images, kind)
    return [
        float(feature @ yardstick(judge, subject, prompt.group).anchor) if prompt.group else None
        for feature, prompt in zip(features, prompts)
    ]


def identities(
    judge: Judge, subject: Subject, prompts: Sequence[Prompt], found: list[float | None], base: list[float | None]
) -> list[float | None]:
    """(s − low) / (high − low), where `low` is the mean of the base model's similarities of the same group."""
    lows = {}
    for group in ("alone", "paired"):
        own = [value for value, prompt in zip(base, prompts) if prompt.group == group]
        lows[group] = sum(own) / len(own) if own else 0.0
    return [
        None if value is None else (value - lows[prompt.group]) / (yardstick(judge, subject, prompt.group).high - lows[prompt.group])
        for value, prompt in zip(found, prompts)
    ]


def check(judge: Judge, superclasses: Sequence[str], prompts: Sequence[Prompt], images: Tensor) -> dict[str, list[float | None]]:
    """By what was asked for, 1 or 0 for each picture, None where it was not asked; `text` is the share of what was asked.

    superclasses: of the one or two learned things; colour and pattern are read of the first.
    """
    kinds = [OBJECTS.index(word) for word in superclasses]
    seen = judge.read(images, kinds[0])
    seen["count"] = seen["present"].sum(1)
    found: dict[str, list[float | None]] = {name: [] for name in CHECKS}
    for row, prompt in enumerate(prompts):
        asked = {"object": kinds[0], **prompt.asked}
        for name in CHECKS:
            if name not in asked:
                right = None
            elif name == "object":
                right = float(all(seen["present"][row, kind] for kind in kinds))
            elif name == "other":
                right = float(seen["present"][row, asked["other"]])
            else:
                right = float(int(seen[name][row]) == asked[name])
            found[name].append(right)
    rows = list(zip(*(found[name] for name in CHECKS)))
    found["text"] = [_mean([value for value in row if value is not None]) for row in rows]
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def own_words(judge: Judge, subject: Subject, prompts: Sequence[Prompt], images: Tensor) -> dict[str, list[float | None]]:
    """Whether the thing has its own colour and pattern, where the prompt does not change them."""
    seen = judge.read(images, OBJECTS.index(subject.superclass))
    truth = {"own colour": ("colour", list(COLOURS).index(subject.colour)), "own pattern": ("pattern", PATTERNS.index(subject.pattern))}
    return {
        name: [float(int(seen[label][row]) == index) if prompt.group else None for row, prompt in enumerate(prompts)]
        for name, (label, index) in truth.items()
    }


def apart(judge: Judge, subject: Subject, twin: Subject, prompts: Sequence[Prompt], images: Tensor) -> list[float | None]:
    """Whether a picture is nearer to its own thing than to another of the same words."""
    own, other = (similarities(judge, each, prompts, images) for each in (subject, twin))
    return [None if a is None or b is None else float(a > b) for a, b in zip(own, other)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(groups: Sequence[Sequence[float | None]], draws: int = 2000) -> tuple[float, float, float]:
    """Mean with the 95 % interval of its percentile bootstrap; NaN of nothing.

    groups: the pictures of each thing. Of four things or more, things are drawn and then their pictures (pictures of one thing are not
    independent of each other); of fewer, their pictures alone, so that the interval is of these things and not of any.
    """
    kept = [torch.tensor([value for value in group if value is not None], dtype=torch.float64) for group in groups]
    kept = [group for group in kept if len(group)]
    if not kept:
        return float("nan"), float("nan"), float("nan")
    generator = torch.Generator().manual_seed(0)
    means = torch.stack([group[torch.randint(len(group), (draws, len(group)), generator=generator)].mean(1) for group in kept])
    if len(kept) >= 4:
        means = means.gather(0, torch.randint(len(kept), (len(kept), draws), generator=generator))
    low, high = torch.quantile(means.mean(0), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return torch.stack([group.mean() for group in kept]).mean().item(), low, high


def rounded(scores: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [None if value is None else round(value, 4) for value in values] for name, values in scores.items()}
