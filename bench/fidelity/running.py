"""Rows that are not there yet, made one after the other; whatever stops it, the next call goes on."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import rows
from bench.fidelity import judging
from bench.fidelity.lab import Lab
from bench.fidelity.methods import Base, Learned, Method
from bench.fidelity.peers import Absent
from bench.fidelity.prompts import Prompt, pair_prompts, prompts, triple_prompts
from bench.fidelity.sections import Job
from bench.fidelity.subjects import targets

__all__ = ["cost", "make", "missing"]


def key_of(lab_digest: str, job: Job, name: str, scale: dict[str, int]) -> tuple:
    return (lab_digest, job.section, job.method.name, name, job.prompts, job.seeds, *scale.items())


def names_of(job: Job) -> list[str]:
    return [" + ".join(target.name for target in job.targets)] if job.pair else [target.name for target in job.targets]


def missing(lab: Lab, todo: Sequence[Job], file: Path) -> list[Job]:
    """Jobs of which a row is not in the file."""
    settings = lab.scale.identity()
    done = set()
    for row in rows.read(file) if file.exists() else []:
        done.add((row["toybox"], row["section"], row["variant"], row["subject"], row["prompts"], row["seeds"], *row["settings"].items()))
    return [job for job in todo if any(key_of(lab.digest, job, name, settings) not in done for name in names_of(job))]


def cost(lab: Lab, todo: Sequence[Job]) -> tuple[int, int, float]:
    """Pictures to draw, trainings to run at most, and processor seconds of all, at the speed that this machine has now."""
    drawn, trained = lab.rates()
    pictures = sum(job.pictures for job in todo) + 2 * lab.scale.subjects * lab.scale.prompts * lab.scale.seeds
    trainings = {(repr(getattr(job.method, "recipe", job.method.name)), target.name) for job in todo for target in job.targets}
    trainings = {each for each in trainings if Base.name not in each[0]}
    seconds = pictures * drawn + len(trainings) * lab.scale.steps * lab.scale.batch * trained
    return pictures, len(trainings), seconds


def make(lab: Lab, todo: Sequence[Job], file: Path, *, until: float | None = None, tell: Callable[[str], None] = print) -> int:
    """Make the rows; stops before a job when the clock has passed `until`. Returns how many jobs are left."""
    rows.provenance(str(lab.device))  # the commit is the one whose code was loaded
    for number, job in enumerate(todo):
        if until is not None and time.monotonic() > until:
            return len(todo) - number
        started = time.process_time()
        try:
            made = _pair(lab, job) if job.pair else _alone(lab, job)
        except Absent as error:
            made = [{"subject": name, "absent": str(error)} for name in names_of(job)]
        for row in made:
            rows.append(file, {
                "suite": "fidelity", "section": job.section, "variant": job.method.name, **row, "prompts": job.prompts, "seeds": job.seeds,
                "scale": lab.scale.name, "settings": lab.scale.identity(), "toybox": lab.digest, **rows.provenance(str(lab.device)),
            })  # fmt: skip
        said = ", ".join(f"{row['subject']} {_said(row)}" for row in made)
        tell(f"[{number + 1}/{len(todo)}] {job.section}: {job.method.name}: {said} ({time.process_time() - started:.0f} s)")
    return 0


def _said(row: dict[str, Any]) -> str:
    if "absent" in row:
        return f"absent: {row['absent']}"
    found = {name: judging.spread([values])[0] for name, values in row["scores"].items() if name.startswith(("identity", "text", "both"))}
    return " ".join(f"{name} {value:.2f}" for name, value in found.items())


def _seeds(text: str, count: int) -> list[int]:
    """Of one prompt, the same for every method: what differs between methods is never the noise."""
    return [zlib.crc32(f"{text} {number}".encode()) for number in range(count)]


def _grid(asked: Sequence[Prompt], seeds: int) -> tuple[list[Prompt], list[int]]:
    pairs = [(prompt, seed) for prompt in asked for seed in _seeds(prompt.text, seeds)]
    return [prompt for prompt, _ in pairs], [seed for _, seed in pairs]


def _draw(lab: Lab, method: Method, learned: Sequence[Learned], grids: Sequence[tuple[list[Prompt], list[int]]]) -> list[Tensor]:
    """Pictures of each thing's prompts; in one run of batches where the method can."""
    texts = [[(prompt.text, place) for prompt in asked] for place, (asked, _) in enumerate(grids)]
    if not method.joint:
        return [_each(lab, method, [one], [(text, 0) for text, _ in part], seeds) for one, part, (_, seeds) in zip(learned, texts, grids)]
    images = _each(lab, method, learned, sum(texts, []), sum((seeds for _, seeds in grids), []))
    return list(images.split([len(asked) for asked, _ in grids]))


def _each(lab: Lab, method: Method, learned: Sequence[Learned], texts: list[tuple[str, int]], seeds: list[int]) -> Tensor:
    with method.applied(lab, learned) as applied:
        return lab.draw([applied.prompt(text, place) for text, place in texts], seeds, applied.pipe)


def base_pictures(lab: Lab, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Pictures of the model as it is, each drawn once and kept."""
    folder = lab.work / "base" / f"{lab.scale.sampling_steps}-{lab.scale.guidance:g}-{lab.scale.drawn_in}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{zlib.crc32(text.encode()):08x}-{seed:08x}.pt" for text, seed in zip(texts, seeds)]
    needed = [number for number, path in enumerate(paths) if not path.exists()]
    if needed:
        for number, image in zip(needed, lab.draw([texts[n] for n in needed], [seeds[n] for n in needed])):
            torch.save((image * 255).round().byte().clone(), paths[number])
    return torch.stack([torch.load(path) for path in paths]).float() / 255


def _alone(lab: Lab, job: Job) -> list[dict[str, Any]]:
    grids = [_grid(prompts(target.subject, job.prompts), job.seeds) for target in job.targets]
    words = [target.subject.superclass for target in job.targets]
    bases = [base_pictures(lab, [p.text.format(word) for p in asked], seeds) for word, (asked, seeds) in zip(words, grids)]
    learned = [job.method.learn(lab, target) for target in job.targets]
    drawn = bases if isinstance(job.method, Base) else _draw(lab, job.method, learned, grids)
    found = []
    for one, images, base, (asked, _) in zip(learned, drawn, bases, grids):
        subject, twin = one.target.subject, next((each.subject for each in targets() if each.name == one.target.twin), None)
        own, low = (judging.similarities(lab.judge, subject, asked, pictures) for pictures in (images, base))
        scores = {"identity": judging.identities(lab.judge, subject, asked, own, low)}
        scores |= judging.check(lab.judge, [subject.superclass], asked, images) | judging.own_words(lab.judge, subject, asked, images)
        if twin is not None:
            scores["apart"] = judging.apart(lab.judge, subject, twin, asked, images)
        lab.sheet(f"{job.section}, {job.method.name}, {one.target.name}".replace("/", "-"), images, job.seeds * 4)
        found.append({"subject": one.target.name, "scores": judging.rounded(scores), **_facts(one.facts)})
    return found


def _pair(lab: Lab, job: Job) -> list[dict[str, Any]]:
    asked, seeds = _grid((pair_prompts if len(job.targets) == 2 else triple_prompts)(job.prompts), job.seeds)
    words = [target.subject.superclass for target in job.targets]
    base = base_pictures(lab, [prompt.text.format(*words) for prompt in asked], seeds)
    learned = [job.method.learn(lab, target) for target in job.targets]
    images = base
    if not isinstance(job.method, Base):
        with job.method.applied(lab, learned) as applied:
            images = lab.draw([applied.prompt(prompt.text, *range(len(learned))) for prompt in asked], seeds, applied.pipe)
    scores = {}
    for place, one in zip(("first", "second", "third"), learned):
        own, low = (judging.similarities(lab.judge, one.target.subject, asked, pictures) for pictures in (images, base))
        scores[f"identity of the {place}"] = judging.identities(lab.judge, one.target.subject, asked, own, low)
    scores |= judging.check(lab.judge, words, asked, images)
    scores["both"] = scores.pop("object")
    each = zip(scores["both"], *(values for name, values in scores.items() if name.startswith("identity of")))
    scores["both and like"] = [float(bool(seen) and min(like) >= 0.5) for seen, *like in each]
    lab.sheet(f"{job.section}, {job.method.name}, {names_of(job)[0]}".replace("/", "-"), images, job.seeds * 4)
    facts = {name: sum(one.facts[name] for one in learned) for name in ("seconds", "bytes")}
    return [{"subject": names_of(job)[0], "scores": judging.rounded(scores), **_facts(facts)}]


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    kept = ("seconds", "steps", "bytes", "trained", "memory", "calibration", "calibration_seconds", "note")
    return {name: round(facts[name], 1) if isinstance(facts[name], float) else facts[name] for name in kept if name in facts}
