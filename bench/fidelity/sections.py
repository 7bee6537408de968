"""Every row that the lab makes, by section: the method, on which things, with which prompts and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench.fidelity.learning import Recipe
from bench.fidelity.methods import Base, Method, Ours
from bench.fidelity.peers import peers
from bench.fidelity.scale import Scale
from bench.fidelity.subjects import Target, targets

__all__ = ["SECTIONS", "Job", "jobs"]

BIASES = (0.7, 0.9, 0.3, 0.5, 0.8, 0.6, 0.4, 1.0, 0.2)  # in the order in which a smaller scale takes them
SECTIONS = ("concepts", "bias", "pairs", "peers", "peer pairs", "training", "lag", "layers", "pictures")


@dataclasses.dataclass(frozen=True)
class Job:
    """One method on things, each alone, or on one pair of them. Makes one row a thing, or one of the pair."""

    section: str
    method: Method
    targets: tuple[Target, ...]
    prompts: int
    seeds: int
    pair: bool = False

    @property
    def pictures(self) -> int:
        return self.prompts * self.seeds * (1 if self.pair else len(self.targets))


def variants(scale: Scale) -> dict[str, list[Method]]:
    """Variants of ours, by section; every sweep has the published setting in it."""

    def train(name: str, **changes: Any) -> Ours:
        return Ours(name, Recipe.of(**changes))

    ladder = scale.ladder
    few = ladder < 5
    return {
        "bias": [Ours(f"β = {bias:g}", settings={"bias": bias}) for bias in BIASES[:ladder]],
        "lag": [
            train("i* a moving mean, 0.99 a step, as published", ema_decay=0.99),
            train("i* of the step's captions", ema_decay=0.0),
            train("i* a moving mean, 0.9 a step", ema_decay=0.9),
        ],
        "training": [
            train("keys trained", key_lock=False),
            Ours("global key lock", settings={"key_lock": "global"}),
            train("no masks", masks=False),
            train("C the identity", covariance="identity"),
            train("calibrated", calibrated=True),
            train("the word at 0.02 instead of 0.006", word_learning_rate=0.02),
            *([] if few else [train(f"trained at β = {bias:g}", bias=bias) for bias in (0.5, 0.6, 0.9)]),
            *([] if few else [train(f"trained at τ = {value:g}", temperature=value) for value in (0.05, 0.15, 0.3)]),
            *([] if few else [train(f"timesteps: {noise} two thirds", noise=noise) for noise in ("late", "early")]),
            *([] if few else [Ours("by hand: strength 0.85, β 0.8, τ 0.2", settings={"strength": 0.85, "bias": 0.8, "temperature": 0.2})]),
        ],
        "pictures": [train(f"{count} picture{'s' * (count > 1)}", pictures=count) for count in (1, 5, 3, 7, 2, 4, 6)[:ladder]],
        "layers": [
            Ours("coarse layers × 0.8", scales={"coarse": 0.8, "fine": 1.0}),
            Ours("fine layers × 0.8", scales={"coarse": 1.0, "fine": 0.8}),
            Ours("coarse layers × 1.2", scales={"coarse": 1.2, "fine": 1.0}),
            Ours("fine layers × 1.2", scales={"coarse": 1.0, "fine": 1.2}),
        ][: max(2, ladder)],
        "pairs": [
            Ours("local lock, published gates"),
            Ours("gates by word", settings={"gate": "word"}),
            Ours("global lock", settings={"key_lock": "global"}),
            Ours("global lock, gates by word", settings={"key_lock": "global", "gate": "word"}),
            Ours("a region each", halves=True),
            Ours("approximate composition", approximate=True),
            *([] if few else [train("calibrated", calibrated=True)]),
            *([] if few else [train("C the identity", covariance="identity")]),
        ],
    }


def pairs(scale: Scale) -> list[tuple[Target, Target]]:
    """Pairs of things of different classes, for the judge tells things apart by their class: neighbours, then further ones."""
    every = targets()[: scale.subjects]
    found = [(a, b) for step in (1, 2, 3) for a, b in zip(every, every[step:]) if a.subject.superclass != b.subject.superclass]
    return found[: scale.pairs]


def jobs(scale: Scale, sections: tuple[str, ...] = SECTIONS) -> Iterator[Job]:
    """In the order in which they are worth most."""
    everything, subset = targets()[: scale.subjects], targets()[: scale.subset_subjects]
    many, some = (scale.prompts, scale.seeds), (scale.subset_prompts, scale.subset_seeds)
    ours = variants(scale)
    for section in sections:
        if section == "concepts":
            yield Job(section, Base(), everything, *many)
            yield Job(section, Ours("perfusion"), everything, *many)
        elif section in ("pairs", "peer pairs"):
            rivals = [method for method in peers() if method.combines] if section == "peer pairs" else [Base(), *ours["pairs"]]
            for method in rivals:
                for pair in pairs(scale):
                    yield Job(section, method, pair, scale.pair_prompts, scale.subset_seeds, pair=True)
        elif section == "peers":
            for method in peers():
                yield Job(section, method, subset, *some)
        else:
            for method in ours[section]:
                yield Job(section, method, subset, *some)
