"""The demo, from rendering the references to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from perfusion.concept import Concept
from perfusion.contact_sheet import sheet
from perfusion.covariance import get_covariance
from perfusion.demo.evaluate import PairScores, Scores, Yardstick, scene_prompts, score_pair, score_subject, yardstick
from perfusion.demo.instances import SUBJECTS, Subject, reference_files, reference_paths, write_references
from perfusion.demo.report import write_report
from perfusion.files import user_path
from perfusion.handle import attach
from perfusion.models import TOYBOX, load_pipeline
from perfusion.requests import Request
from perfusion.toybox.judge import load_judge
from perfusion.toybox.model import IMAGE_SIZE
from perfusion.toybox.score import draw
from perfusion.toybox.sheets import pil, save_sheet
from perfusion.toybox.words import SCENES
from perfusion.training import train
from perfusion.writable import check_writable

__all__ = ["Learned", "run_demo"]

SAMPLES = 24  # a multiple of the scenes
BIASES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
STYLED = ("a sketch of a {} in the city", "a sketch of a {} on the beach", "pixel art of a {} in the forest", "pixel art of a {} at night")
TOGETHER = {relation: f"a <{SUBJECTS[0].name}> {relation} a <{SUBJECTS[1].name}>" for relation in ("next to", "in")}


def _halves() -> dict[str, Tensor]:
    """The left half of the picture for the first subject, the right one for the second."""
    left = torch.zeros(IMAGE_SIZE, IMAGE_SIZE)
    left[:, : IMAGE_SIZE // 2] = 1
    return {SUBJECTS[0].name: left, SUBJECTS[1].name: 1 - left}


def _variants(relation: str) -> dict[str, Callable[[str], str]]:
    """Rows of the report: how the text of a prompt with both concepts is drawn."""
    rows: dict[str, Callable[[str], str]] = {"both concepts": str, "gates by word": lambda text: Request(text, gate="word")}
    if relation == "next to":
        rows["a region each"] = lambda text: Request(text, regions=_halves())
    return rows


@dataclasses.dataclass
class Learned:
    """One subject's results: the concept and file, seconds of training, and scores by the titles of the report's rows."""

    subject: Subject
    concept: Concept
    file: Path
    seconds: float
    scores: dict[str, Scores]


@dataclasses.dataclass
class Result:
    """Where the report is, and the figures that matter most, by name."""

    report: Path
    figures: dict[str, float]


def run_demo(
    output: str | Path, *, steps: int = 250, samples: int = SAMPLES, device: str | None = None, overwrite: bool = False
) -> Result:
    """Run the demo into a folder. steps, samples: of each training and each score.

    ValueError, before any work, when files are there that it would replace, unless `overwrite`; OSError for a folder that
    cannot be written.
    """
    output, started = user_path(output), time.monotonic()
    _check_free(output, overwrite)
    check_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("toybox", device=device)
    judge = load_judge(TOYBOX / "judge.safetensors")
    covariance = get_covariance(pipe)
    learned, pictures = [], {}
    for subject in SUBJECTS:
        references = write_references(subject, output / "references" / subject.name)
        pictures[f"references {subject.name}"] = pil(references)
        concept, seconds = _learn(pipe, subject, output, covariance, steps, key_lock=True)
        file = output / f"{subject.name}.safetensors"
        concept.save(file)
        unlocked, _ = _learn(pipe, subject, output, covariance, steps, key_lock=False)
        with _bar(f"score <{subject.name}>", 3 * samples) as bar:
            measure = yardstick(pipe, subject, references, samples, bar)
            scores = _score(pipe, judge, subject, measure, Concept.load(file), unlocked, samples, bar)
        learned.append(Learned(subject, concept, file, seconds, scores))
    pairs = _score_together(pipe, judge, learned, samples)
    pictures |= _draw_pictures(pipe, learned)
    save_sheet(_overview(pictures), output / "overview.png")
    scenes = list(SCENES.values())[:4]
    titles = {"scenes": scenes, "styles": [text.format("…") for text in STYLED], "biases": [f"β = {bias:g}" for bias in BIASES]}
    report = write_report(
        output, learned, pairs, pictures, **titles, samples=samples, steps=steps, seconds=time.monotonic() - started
    )
    return Result(report, _figures(learned, pairs))


def _figures(learned: list[Learned], pairs: dict[str, dict[str, PairScores]]) -> dict[str, float]:
    alone = [each.scores[_title(each.subject, "keys locked")].identity for each in learned]
    together = next(iter(pairs.values()))["both concepts"]
    return {
        "identity of each concept alone (0 is the superclass, 1 the true thing), mean": sum(alone) / len(alone),
        "both concepts seen in one picture": together.things,
    }


def _check_free(output: Path, overwrite: bool) -> None:
    if overwrite:
        return
    names = ["report.html", "scores.json", "overview.png"]
    for subject in SUBJECTS:
        names.append(f"{subject.name}.safetensors")
        folder = output / "references" / subject.name
        names += [str(file.relative_to(output)) for path in reference_paths(subject, folder) for file in reference_files(path)]
    taken = [name for name in names if (output / name).exists()]
    if taken:
        more = f" and {len(taken) - 4} more" if len(taken) > 4 else ""
        raise ValueError(
            f"output: {str(output)!r} holds files that the demo would replace: {', '.join(taken[:4])}{more}. "
            "Give another output folder, or say --overwrite (overwrite=True)."
        )


def _title(subject: Subject, keys: str) -> str:
    return f"<{subject.name}>, {keys}"


def _learn(pipe: Any, subject: Subject, output: Path, covariance: Any, steps: int, key_lock: bool) -> tuple[Concept, float]:
    started = time.monotonic()
    tqdm.write(f"Learning <{subject.name}> from its pictures, keys {'locked' if key_lock else 'trained, to compare'}:")
    pictures = reference_paths(subject, output / "references" / subject.name)  # and no others that may lie beside them
    settings = {"covariance": covariance, "key_lock": key_lock, "flip": 0.0}  # spouts point one way
    concept = train(pipe, pictures, subject.superclass, subject.name, steps, **settings)
    return concept, time.monotonic() - started


def _score(
    pipe: Any, judge: Any, subject: Subject, measure: Yardstick, locked: Concept, unlocked: Concept, samples: int, bar: Any
) -> dict[str, Scores]:
    scores = {f"superclass words, “a {subject.superclass} …”": score_subject(judge, subject, measure, measure.superclass)}
    for keys, concept in (("keys locked", locked), ("keys trained", unlocked)):
        with attach(pipe) as handle:
            handle.load(concept)
            images = draw(pipe, scene_prompts(f"<{subject.name}>", samples), progress=bar)
        scores[_title(subject, keys)] = score_subject(judge, subject, measure, images)
    return scores | {"other true pictures": score_subject(judge, subject, measure, measure.true)}


def _score_together(pipe: Any, judge: Any, learned: list[Learned], samples: int) -> dict[str, dict[str, PairScores]]:
    """By prompt, from the saved files alone."""
    total = samples * sum(1 + len(_variants(relation)) for relation in TOGETHER)
    with attach(pipe) as handle, _bar("score both in one picture", total) as bar:
        for each in learned:
            handle.load(each.file)
        return {
            prompt: score_pair(pipe, judge, SUBJECTS, relation, _variants(relation), samples, bar) for relation, prompt in TOGETHER.items()
        }


def _draw_pictures(pipe: Any, learned: list[Learned]) -> dict[str, list[Image.Image]]:
    """The report's pictures, from the saved files alone, by the place where it shows them."""
    scenes, pictures = list(SCENES.values())[:4], {}
    count = (len(scenes) + len(STYLED) + len(BIASES)) * len(learned) + len(scenes) * (len(TOGETHER) + 1)
    with attach(pipe) as handle, _bar("pictures", count) as bar:
        for each in learned:
            handle.load(each.file)
        for each in learned:
            name = each.subject.name
            pictures[f"scenes {name}"] = pil(draw(pipe, [f"a <{name}> {scene}" for scene in scenes], seed=70, progress=bar))
            pictures[f"styles {name}"] = pil(draw(pipe, [text.format(f"<{name}>") for text in STYLED], seed=75, progress=bar))
            # the same noise in every column: what changes is the gate's bias alone
            strip = [f"a <{name}|bias={bias}> {scenes[0]}" for bias in BIASES]
            pictures[f"bias {name}"] = pil(draw(pipe, strip, seed=[80] * len(strip), progress=bar))
        for number, prompt in enumerate(TOGETHER.values(), start=1):
            images = draw(pipe, [f"{prompt} {scene}" for scene in scenes], seed=90, progress=bar)
            pictures[f"together {number}"] = pil(images)
        prompts = [Request(f"{TOGETHER['next to']} {scene}", regions=_halves()) for scene in scenes]
        pictures["regions"] = pil(draw(pipe, prompts, seed=95, progress=bar))
    return pictures


def _overview(pictures: dict[str, list[Image.Image]]) -> Image.Image:
    """References beside results, on one sheet: each concept's row, then both in one picture."""
    rows = [[*pictures[f"references {each.name}"][:4], *pictures[f"scenes {each.name}"]] for each in SUBJECTS]
    rows.append([*pictures["together 1"], *pictures["together 2"]])
    titles = ["learned from", "", "", "", "drawn", "", "", ""] * len(SUBJECTS) + ["next to", "", "", "", "in", "", "", ""]
    return sheet([picture for row in rows for picture in row], columns=8, titles=titles)


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    with tqdm(total=total, desc=title, unit="picture") as bar:
        yield bar
