"""Scores by the judge: the base model's, `python -m perfusion.toybox.score`, and a concept's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .judge import Judge, load_judge
from .render import render
from .words import COLOURS, OBJECTS, PATTERNS, RELATIONS, SCENES
from .world import sample_pictures, with_article

WEIGHTS = Path(__file__).parent / "weights"
STEPS, GUIDANCE = 25, 4.0  # what toybox pictures are drawn with


def draw(pipe: Any, prompts: list[str], *, seed: int = 0, batch: int = 64, progress: Any = None) -> Tensor:
    """Pictures [n, 3, 64, 64] in [0, 1] of prompts; picture i depends on prompt i and seed + i alone."""
    images = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed + row) for row in range(start, min(start + batch, len(prompts)))]
        chunk = prompts[start : start + batch]
        drawn = pipe(chunk, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt").images
        images.append(drawn.float().cpu())
        if progress is not None:
            progress.update(len(chunk))
    return torch.cat(images)


def base_prompts(count: int, seed: int) -> tuple[list[str], dict[str, Tensor]]:
    """Prompts of one thing with its colour, pattern and scene named, evenly drawn, and the truth about each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"object": OBJECTS, "colour": COLOURS, "pattern": PATTERNS, "scene": SCENES}
    truth = {name: torch.randint(len(words), (count,), generator=generator) for name, words in sizes.items()}
    prompts = []
    for row in range(count):
        thing, colour, pattern, scene = (list(words)[truth[name][row]] for name, words in sizes.items())
        noun = " ".join(word for word in (colour, "" if pattern == "plain" else pattern, thing) if word)
        prompts.append(with_article("a {}", noun) + f" {SCENES[scene]}")
    return prompts, truth


def pair_prompts(count: int, seed: int) -> tuple[list[str], dict[str, Tensor]]:
    """Prompts of two different things in a relation, and the truth: `things` [n, 2] and `relation` [n]."""
    pictures = sample_pictures(8 * count, torch.Generator().manual_seed(seed), pairs=1.0, sketches=0.0)
    rows = (pictures.first.object_class != pictures.second.object_class).nonzero().flatten()[:count]
    things = torch.stack([pictures.first.object_class[rows], pictures.second.object_class[rows]], dim=1)
    scenes = list(SCENES.values())
    prompts = [
        f"a {OBJECTS[a]} {RELATIONS[pictures.relation[row]]} a {OBJECTS[b]} {scenes[pictures.scene[row]]}"
        for row, (a, b) in zip(rows.tolist(), things.tolist())
    ]
    return prompts, {"things": things, "relation": pictures.relation[rows]}


def accuracy(seen: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Share of pictures in which the judge sees what is true, by label; two things count in either order."""
    return {
        name: (seen[name].sort(-1).values == value.sort(-1).values).all(-1).float().mean().item()
        if name == "things"
        else (seen[name] == value).float().mean().item()
        for name, value in truth.items()
    }


def judge_accuracy(judge: Judge, count: int, seed: int) -> dict[str, float]:
    """The judge on renderings that it was not trained on; colour and pattern where one coloured thing stands alone."""
    generator, seen, truth = torch.Generator().manual_seed(seed), [], []
    for _ in range(-(-count // 256)):
        pictures = sample_pictures(256, generator)
        seen.append(judge.read(render(pictures)[0]))
        truth.append(
            {"object": pictures.first.object_class, "colour": pictures.first.colour, "pattern": pictures.first.pattern}
            | {name: getattr(pictures, name) for name in ("scene", "relation", "style")}
        )
    seen, truth = ({name: torch.cat([block[name] for block in blocks]) for name in truth[0]} for blocks in (seen, truth))
    alone = (truth["relation"] == 0) & (truth["style"] == 0)
    kept = {"object": truth["relation"] == 0, "colour": alone, "pattern": alone}
    return {name: (seen[name] == value)[kept.get(name, slice(None))].float().mean().item() for name, value in truth.items()}


def score_base(pipe: Any, judge: Judge, count: int, seed: int = 1000) -> Iterator[tuple[str, dict[str, float]]]:
    """("one thing", accuracies), the same by pattern, then ("two things", accuracies), each over `count` samples."""
    for title, make in (("one thing", base_prompts), ("two things", pair_prompts)):
        prompts, truth = make(count, seed)
        with tqdm(total=len(prompts), desc=title) as bar:
            seen = judge.read(draw(pipe, prompts, seed=seed, progress=bar))
        yield title, accuracy(seen, truth)
        if "pattern" in truth:
            right = (seen["pattern"] == truth["pattern"]).float()
            yield f"{title}, pattern", {word: right[truth["pattern"] == index].mean().item() for index, word in enumerate(PATTERNS)}


def main(arguments: list[str] | None = None) -> None:
    from perfusion.models import load_pipeline

    parser = argparse.ArgumentParser(prog="python -m perfusion.toybox.score", description="Score toybox with its judge.")
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--samples", type=int, default=512, help="pictures of each kind")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args(arguments)
    judge = load_judge(options.folder / "judge.safetensors")
    figures = {"judge": judge_accuracy(judge, 4096, seed=99)}
    print("judge on 4,096 held-out renderings:", _line(figures["judge"]))
    for title, found in score_base(load_pipeline(options.folder), judge, options.samples):
        figures[title] = found
        print(f"{title}, {options.samples} samples, {STEPS} steps, guidance {GUIDANCE:g}:", _line(found))
    if options.output:
        settings = {"samples": options.samples, "steps": STEPS, "guidance": GUIDANCE}
        options.output.write_text(json.dumps({**settings, **figures}, indent=2) + "\n")


def _line(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items())


def identity(judge: Judge, references: Tensor, drawn: Tensor, superclass: Tensor, true: Tensor) -> float:
    """How much of the instance `drawn` shows: 0 as the superclass prompt's pictures, 1 as other true pictures of it.

    All [n, 3, 64, 64]; similarity of two pictures is the product of their unit features, averaged over the references.
    """
    anchor = judge.features(references).mean(0)
    seen, low, high = ((judge.features(images) @ anchor).mean().item() for images in (drawn, superclass, true))
    return (seen - low) / (high - low)


if __name__ == "__main__":
    main()
