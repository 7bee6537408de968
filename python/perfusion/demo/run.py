"""The demo, from rendering the references to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
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
from perfusion.files import whole
from perfusion.handle import attach
from perfusion.models import TOYBOX, load_pipeline
from perfusion.toybox.judge import load_judge
from perfusion.toybox.score import draw
from perfusion.toybox.words import SCENES
from perfusion.training import train
from perfusion.writable import check_writable

__all__ = ["Learned", "run_demo"]

SAMPLES = 66  # a multiple of the scenes
BIASES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Each was learned alone and would fill the picture, so both are turned down. And toybox's text encoder puts something of the first word
# into the second: the teddy's gate opens later, to leave the teapot alone, and the teapot's earlier, to know it all the same.
_TURNED_DOWN = ("<teddy|strength=0.85,bias=0.8,temperature=0.2>", "<teapot|strength=0.6,bias=0.3,temperature=0.05>")
TOGETHER = {relation: f"a {_TURNED_DOWN[0]} {relation} a {_TURNED_DOWN[1]}" for relation in ("in", "next to")}


@dataclasses.dataclass
class Learned:
    """One subject's results: the concept and file, seconds of training, and scores of the rows of the report's table."""

    subject: Subject
    concept: Concept
    file: Path
    seconds: float
    unlocked_seconds: float
    scores: dict[str, Scores]


def run_demo(
    output: str | Path, *, steps: int = 400, samples: int = SAMPLES, device: str | None = None, overwrite: bool = False
) -> Path:
    """Run the demo into a folder; returns the path of its report.md. steps, samples: of each training and each score.

    ValueError, before any work, when files are there that it would replace, unless `overwrite`; OSError for a folder that
    cannot be written.
    """
    output, started = Path(output), time.monotonic()
    _check_free(output, overwrite)
    check_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("toybox", device=device)
    judge = load_judge(TOYBOX / "judge.safetensors")
    covariance = get_covariance(pipe)
    learned, measures = [], {}
    for subject in SUBJECTS:
        references = write_references(subject, output / "references" / subject.name)
        _save(sheet(_pil(references)), output / f"references-{subject.name}.png")
        concept, seconds = _learn(pipe, subject, output, covariance, steps, key_lock=True)
        file = output / f"{subject.name}.safetensors"
        concept.save(file)
        unlocked, unlocked_seconds = _learn(pipe, subject, output, covariance, steps, key_lock=False)
        with _bar(f"score <{subject.name}>", 3 * samples) as bar:
            measures[subject.name] = yardstick(pipe, subject, references, samples, bar)
            scores = _score(pipe, judge, subject, measures[subject.name], Concept.load(file), unlocked, samples, bar)
        learned.append(Learned(subject, concept, file, seconds, unlocked_seconds, scores))
    pairs = _score_together(pipe, judge, learned, samples)
    _draw_pictures(pipe, learned, output)
    return write_report(output, learned, pairs, samples=samples, steps=steps, seconds=time.monotonic() - started)


def _check_free(output: Path, overwrite: bool) -> None:
    if overwrite:
        return
    names = ["report.md", "report.html", *(f"together-{number}.png" for number, _ in enumerate(TOGETHER, start=1))]
    for subject in SUBJECTS:
        names += [f"{subject.name}.safetensors", *(f"{kind}-{subject.name}.png" for kind in ("references", "scenes", "bias"))]
        folder = output / "references" / subject.name
        names += [str(file.relative_to(output)) for path in reference_paths(subject, folder) for file in reference_files(path)]
    taken = [name for name in names if (output / name).exists()]
    if taken:
        more = f" and {len(taken) - 4} more" if len(taken) > 4 else ""
        raise ValueError(
            f"output: {str(output)!r} holds files that the demo would replace: {', '.join(taken[:4])}{more}. "
            "Give another output folder, or say --overwrite (overwrite=True)."
        )


def _learn(pipe: Any, subject: Subject, output: Path, covariance: Any, steps: int, key_lock: bool) -> tuple[Concept, float]:
    started = time.monotonic()
    tqdm.write(f"Learning <{subject.name}> from its pictures, keys {'locked' if key_lock else 'trained, to compare'}:")
    pictures = reference_paths(subject, output / "references" / subject.name)  # and no others that may lie beside them
    concept = train(pipe, pictures, subject.superclass, subject.name, steps, covariance=covariance, key_lock=key_lock)
    return concept, time.monotonic() - started


def _score(
    pipe: Any, judge: Any, subject: Subject, measure: Yardstick, locked: Concept, unlocked: Concept, samples: int, bar: Any
) -> dict[str, Scores]:
    scores = {f"superclass prompt, “a {subject.superclass} …”": score_subject(judge, subject, measure, measure.superclass)}
    for title, concept in (("keys locked", locked), ("keys trained", unlocked)):
        with attach(pipe) as handle:
            handle.load(concept)
            images = draw(pipe, scene_prompts(f"<{subject.name}>", samples), progress=bar)
        scores[f"`<{subject.name}>`, {title}"] = score_subject(judge, subject, measure, images)
    return scores | {"other true pictures": score_subject(judge, subject, measure, measure.true)}


def _score_together(pipe: Any, judge: Any, learned: list[Learned], samples: int) -> dict[str, dict[str, PairScores]]:
    """By prompt, from the saved files alone."""
    with attach(pipe) as handle, _bar("score both in one image", 2 * samples * len(TOGETHER)) as bar:
        for each in learned:
            handle.load(each.file)
        return {prompt: score_pair(pipe, judge, SUBJECTS, relation, prompt, samples, bar) for relation, prompt in TOGETHER.items()}


def _draw_pictures(pipe: Any, learned: list[Learned], output: Path) -> None:
    """Every picture of the report, from the saved files alone."""
    scenes = list(SCENES.values())[:4]
    with attach(pipe) as handle, _bar("pictures", (4 + 2 * len(BIASES)) * len(learned) + 8 * len(TOGETHER)) as bar:
        for each in learned:
            handle.load(each.file)
        for each in learned:
            name = each.subject.name
            prompts = [f"a <{name}> {scene}" for scene in scenes]
            _save(sheet(_pil(draw(pipe, prompts, seed=70, progress=bar)), titles=scenes), output / f"scenes-{name}.png")
            images: list[Tensor] = []
            for prompt, seed in ((f"a <{name}|bias={{}}> {scenes[0]}", 80), (f"a <{name}|bias={{}}> {scenes[3]}", 81)):
                # the same noise in every column: what changes is the gate's bias alone
                images += [draw(pipe, [prompt.format(bias)], seed=seed, progress=bar) for bias in BIASES]
            titles = [f"bias {bias:g}" for bias in BIASES] * 2  # PIL's own font has no β
            _save(sheet(_pil(torch.cat(images)), columns=len(BIASES), titles=titles), output / f"bias-{name}.png")
        for number, prompt in enumerate(TOGETHER.values(), start=1):
            images = draw(pipe, [f"{prompt} {scene}" for scene in [*scenes, *scenes]], seed=90, progress=bar)
            _save(sheet(_pil(images), columns=4), output / f"together-{number}.png")


def _pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def _save(image: Image.Image, path: Path) -> None:
    with whole(path) as draft:
        image.save(draft, optimize=True)


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    with tqdm(total=total, desc=title, unit="picture") as bar:
        yield bar
