"""How much of a concept a LoRA keeps, by toybox's judge: gated, and as `perfusion convert --to lora` writes it. A table of docs/toybox.md.

    perfusion demo                                                              # makes the two concepts, in perfusion-demo
    PYTHONPATH=.:python python -m bench.lora_identity perfusion-demo            # 24 pictures a row
    PYTHONPATH=.:python python -m bench.lora_identity perfusion-demo --scale 0.8 --scale 1.2

Each LoRA is loaded by diffusers, with its textual inversion, into a pipeline that knows nothing of concepts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tqdm import tqdm

from perfusion import Concept, attach, load_pipeline
from perfusion.demo.evaluate import Scores, scene_prompts, score_subject, yardstick
from perfusion.demo.instances import PICTURES, SUBJECTS, true_pictures
from perfusion.models import TOYBOX, add_embedding, add_lora
from perfusion.other_formats import export, fit_scale
from perfusion.toybox.judge import load_judge
from perfusion.toybox.score import draw


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lora_identity", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="what `perfusion demo` wrote")
    parser.add_argument("--samples", type=int, default=24, help="pictures a row")
    parser.add_argument("--scale", type=float, action="append", default=[], help="another κ than the fitted one; may be repeated")
    options = parser.parse_args()
    pipe, judge = load_pipeline("toybox", device="cpu"), load_judge(TOYBOX / "judge.safetensors")
    rows: dict[str, list[Scores]] = {}
    with tqdm(total=options.samples * len(SUBJECTS) * (3 + len(options.scale)), unit="picture") as bar:
        for subject in SUBJECTS:
            concept = Concept.load(options.folder / f"{subject.name}.safetensors")
            prompts = scene_prompts(f"<{subject.name}>", options.samples)
            measure = yardstick(pipe, subject, true_pictures(subject, PICTURES, seed=11)[0], options.samples, bar)
            with attach(pipe) as handle:
                handle.load(concept)
                rows.setdefault("gated", []).append(score_subject(judge, subject, measure, draw(pipe, prompts, progress=bar)))
            fit = fit_scale(concept, pipe)
            tqdm.write(f"<{subject.name}>: {fit}")
            for title, scale in {"LoRA, κ fitted": fit.scale, **{f"LoRA, κ = {scale:g}": scale for scale in options.scale}}.items():
                rows.setdefault(title, []).append(_as_lora(concept, scale, judge, subject, measure, prompts, bar))
    names = [subject.name for subject in SUBJECTS]
    print(f"| | {' | '.join(f'identity of the {name}' for name in names)} | object | scene |\n|---|{'---|' * (len(names) + 2)}")
    for title, scores in rows.items():
        shares = [sum(getattr(each, key) for each in scores) / len(scores) for key in ("object", "scene")]
        print(f"| {title} | {' | '.join(f'{value:.2f}' for value in [*(each.identity for each in scores), *shares])} |")


def _as_lora(concept: Concept, scale: float, judge, subject, measure, prompts, bar) -> Scores:
    other = load_pipeline("toybox", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        embedding, lora = export(concept, other, "lora", Path(folder), scale=scale)[0]
        add_lora(other, str(lora))
        add_embedding(other, str(embedding), token=f"<{concept.name}>")
    return score_subject(judge, subject, measure, draw(other, prompts, progress=bar))


if __name__ == "__main__":
    main()
