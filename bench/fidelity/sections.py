"""Every row that the lab makes, by section: the method, on which things, with which prompts and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench.fidelity.extensions import Extended, Extension
from bench.fidelity.learning import Recipe
from bench.fidelity.methods import Base, Method, Ours
from bench.fidelity.peers import peers
from bench.fidelity.scale import Scale
from bench.fidelity.subjects import Target, targets

__all__ = ["SECTIONS", "Job", "jobs"]

NOISE = {"late": "the upper two thirds", "early": "the lower two thirds", "snr": "min-SNR's weights, γ = 5"}
BIASES = (0.7, 0.9, 0.3, 0.5, 0.8, 0.6, 0.4, 1.0, 0.2)  # in the order in which a smaller scale takes them
FLOORS = (0.7, 0.5, 0.9, 0.0, 1.0)
SECTIONS = (  # in the order in which they are worth most
    "concepts", "peers", "pairs", "peer pairs", "bias", "layers", "training", "pictures", "lag", "extensions", "triples", "floor pairs",
)  # fmt: skip



@dataclasses.dataclass(frozen=True)
class Job:
    """One method on things, each alone, or on two or three of them in one picture (`pair`). Makes one row a thing, or one of all."""

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
            Ours("global key lock", settings={"key_lock": "global"}),
            Ours("gates by word", settings={"gate": "word"}),
            *([] if few else [Ours("by hand: strength 0.85, β 0.8, τ 0.2", settings={"strength": 0.85, "bias": 0.8, "temperature": 0.2})]),
            train("keys trained", key_lock=False),
            train("no masks", masks=False),
            train("C the identity", covariance="identity"),
            train("calibrated", calibrated=True),
            *([] if few else [train("400 steps of 16, the default of `perfusion train`", steps=400, batch_size=16)]),
            *([] if few else [train(f"trained at β = {bias:g}", bias=bias) for bias in (0.5, 0.6, 0.9)]),
            *([] if few else [train(f"trained at τ = {value:g}", temperature=value) for value in (0.05, 0.15, 0.3)]),
            train("the word at 0.02 instead of 0.006", word_learning_rate=0.02),
            *([] if few else [train(f"timesteps: {NOISE[noise]}", noise=noise) for noise in NOISE]),
        ],
        "extensions": [
            Extended("values of rank 2", Extension(rank=2)),
            Extended("values of rank 4", Extension(rank=4)),
            Extended("two vectors a word", Extension(words=2)),
            Extended("four vectors a word", Extension(words=4)),
            Extended("values learn from late timesteps only", Extension(value_noise="late")),
            Extended("values learn from early timesteps only", Extension(value_noise="early")),
            Extended("β of coarse layers 0.5, of fine ones 0.7", Extension(biases=(0.5, 0.7))),
            Extended("β of coarse layers 0.7, of fine ones 0.5", Extension(biases=(0.7, 0.5))),
        ],
        "triples": [
            Ours("local lock, published gates"),
            Ours("gates by word", settings={"gate": "word"}),
            Ours("global lock", settings={"key_lock": "global"}),
            Ours("approximate composition", approximate=True),
        ],
        "pictures": [train(f"{count} picture{'s' * (count > 1)}", pictures=count) for count in (1, 5, 3, 7, 2, 4, 6)[:ladder]],
        "layers": [
            Ours("coarse layers × 0.8", scales={"coarse": 0.8, "fine": 1.0}),
            Ours("fine layers × 0.8", scales={"coarse": 1.0, "fine": 0.8}),
            Ours("coarse layers × 1.2", scales={"coarse": 1.2, "fine": 1.0}),
            Ours("fine layers × 1.2", scales={"coarse": 1.0, "fine": 1.2}),
        ][: max(2, ladder)],
        "floor pairs": [
            Ours("published gates"),
            *(Ours(f"gates by word, g₀ = {floor:g}", settings={"gate": "word"}, floor=floor) for floor in FLOORS[:ladder]),
        ],
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


def triples(scale: Scale) -> list[tuple[Target, ...]]:
    """Threes of things of different classes, for each of `pairs` that has a third within reach."""
    every = targets()[: max(scale.subjects, 3)]
    found = [each for each in zip(every, every[1:], every[2:]) if len({one.subject.superclass for one in each}) == 3]
    return found[: max(1, scale.pairs // 2)]


def jobs(scale: Scale, sections: tuple[str, ...] = SECTIONS) -> Iterator[Job]:
    """One row each, in the order of SECTIONS: whatever stops the lab, what is worth most is there."""
    everything, subset = targets()[: scale.subjects], targets()[: scale.subset_subjects]
    ours = variants(scale)
    for section in sorted(sections, key=SECTIONS.index):
        if section in ("pairs", "peer pairs", "floor pairs", "triples"):
            rivals = [method for method in peers() if method.combines] if section == "peer pairs" else ours[section]
            rivals = rivals if section in ("peer pairs", "floor pairs") else [Base(), *rivals]
            for method in rivals:
                for several in triples(scale) if section == "triples" else pairs(scale):
                    yield Job(section, method, several, scale.pair_prompts, scale.subset_seeds, pair=True)
            continue
        rivals = [Base(), Ours("perfusion")] if section == "concepts" else peers() if section == "peers" else ours[section]
        full = section == "concepts" or (section == "peers" and scale.widely)
        amount = (scale.prompts, scale.seeds) if full else (scale.subset_prompts, scale.subset_seeds)
        for method in rivals:
            for target in everything if full else subset:
                yield Job(section, method, (target,), *amount)
