"""Scores of learned concepts, alone and together, all by the judge: identity, and how well the prompt is still followed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from perfusion.demo.instances import Subject, true_pairs, true_pictures
from perfusion.toybox.judge import Judge
from perfusion.toybox.score import accuracy, draw, identity
from perfusion.toybox.words import COLOURS, OBJECTS, PATTERNS, RELATIONS, SCENES

__all__ = ["PairScores", "Scores", "Yardstick", "score_pair", "score_subject", "yardstick"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Shares in [0, 1], but identity: 0 as the superclass prompt's pictures, 1 as other true pictures of the instance."""

    identity: float
    object: float
    scene: float
    colour: float
    pattern: float


@dataclasses.dataclass(frozen=True)
class PairScores:
    """Shares in [0, 1] of pictures with both things, in the prompt's relation, in its scene; each thing's identity as in Scores,
    read under the judge's mask of its class."""

    things: float
    relation: float
    scene: float
    first_identity: float
    second_identity: float


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What a subject's pictures are held against: references, other true pictures, and the superclass prompt's."""

    references: Tensor
    true: Tensor
    superclass: Tensor


def scene_prompts(noun: str, count: int) -> list[str]:
    """`count` prompts with the noun, in every scene in turn."""
    return [f"a {noun} {list(SCENES.values())[row % len(SCENES)]}" for row in range(count)]


def yardstick(pipe: Any, subject: Subject, references: Tensor, count: int, progress: Any) -> Yardstick:
    superclass = draw(pipe, scene_prompts(subject.superclass, count), progress=progress)
    return Yardstick(references, true_pictures(subject, count, seed=12)[0], superclass)


def score_subject(judge: Judge, subject: Subject, measure: Yardstick, images: Tensor) -> Scores:
    """Scores of pictures drawn from `scene_prompts`."""
    count, kind = len(images), OBJECTS.index(subject.superclass)
    truth = {
        "object": torch.full((count,), kind),
        "scene": torch.arange(count) % len(SCENES),
        "colour": torch.full((count,), list(COLOURS).index(subject.colour)),
        "pattern": torch.full((count,), PATTERNS.index(subject.pattern)),
    }
    return Scores(
        identity=identity(judge, measure.references, images, measure.superclass, measure.true, kind),
        **accuracy(judge.read(images), truth),
    )


def score_pair(
    pipe: Any,
    judge: Judge,
    subjects: tuple[Subject, Subject],
    relation: str,
    prompts: Mapping[str, Callable[[str], str]],
    count: int,
    progress: Any,
) -> dict[str, PairScores]:
    """Scores of the superclass words, of the concepts, and of true pictures of both subjects, by the titles of the report's rows.

    prompts: title -> what makes a prompt or a `Request` of the text "a <first> RELATION a <second> SCENE".
    """
    words = f"{subjects[0].superclass} {relation} a {subjects[1].superclass}"
    references, true = (true_pairs(*subjects, relation, count, seed) for seed in (13, 14))
    superclass = draw(pipe, scene_prompts(words, count), progress=progress)
    texts = scene_prompts(f"<{subjects[0].name}> {relation} a <{subjects[1].name}>", count)
    concepts = {title: draw(pipe, [make(text) for text in texts], progress=progress) for title, make in prompts.items()}
    kinds = [OBJECTS.index(each.superclass) for each in subjects]
    truth = {
        "things": torch.tensor([kinds]).expand(count, 2),
        "relation": torch.full((count,), RELATIONS.index(relation)),
        "scene": torch.arange(count) % len(SCENES),
    }
    rows = {f"superclass words, “a {words} …”": superclass, **concepts, "other true pictures": true}
    return {
        title: PairScores(
            **accuracy(judge.read(images), truth),
            first_identity=identity(judge, references, images, superclass, true, kinds[0]),
            second_identity=identity(judge, references, images, superclass, true, kinds[1]),
        )
        for title, images in rows.items()
    }
