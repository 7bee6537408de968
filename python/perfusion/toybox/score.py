"""Scores by the judge: the base model's, `python -m perfusion.toybox.score`, and a concept's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .judge import Judge, frechet_distance, load_judge
from .render import render
from .words import COLOURS, OBJECTS, PATTERNS, RELATIONS, SCENES, SIZES, STYLE_FRAMES, STYLES
from .world import Phrase, Pictures, caption, sample_pictures, with_article

WEIGHTS = Path(__file__).parent / "weights"
STEPS, GUIDANCE = 25, 2.5  # what toybox pictures are drawn with


def draw(pipe: Any, prompts: list[str], *, seed: int | Sequence[int] = 0, batch: int = 16, progress: Any = None) -> Tensor:
    """Pictures [n, 3, 128, 128] in [0, 1] of prompts; picture i depends on prompt i and its seed alone: seed + i, or seed[i]."""
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    images = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(each) for each in seeds[start : start + batch]]
        chunk = prompts[start : start + batch]
        drawn = pipe(chunk, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt").images
        images.append(drawn.float().cpu())
        if progress is not None:
            progress.update(len(chunk))
    return torch.cat(images)


def one_prompts(count: int, seed: int) -> tuple[list[str], dict[str, Tensor]]:
    """Prompts of one thing with its colour, pattern and scene named, evenly drawn, some with a size word, and the truth about each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"object": len(OBJECTS), "colour": len(COLOURS), "pattern": len(PATTERNS), "scene": len(SCENES)}
    truth = {name: torch.randint(words, (count,), generator=generator) for name, words in sizes.items()}
    truth["size"] = torch.where(torch.rand(count, generator=generator) < 0.2, torch.randint(len(SIZES), (count,), generator=generator), 0)
    prompts = []
    for row in range(count):
        thing, colour, pattern, size = (int(truth[name][row]) for name in ("object", "colour", "pattern", "size"))
        noun = " ".join(Phrase(thing, colour, pattern, size).words())
        prompts.append(with_article("a {}", noun) + f" {list(SCENES.values())[truth['scene'][row]]}")
    return prompts, truth


def pair_prompts(count: int, seed: int) -> tuple[list[str], dict[str, Tensor]]:
    """Prompts of two different things in a relation, and the truth: `things` [n, 2] and `relation` [n]."""
    pictures = sample_pictures(8 * count, torch.Generator().manual_seed(seed), pairs=1.0, styled=0.0)
    rows = (pictures.first.object_class != pictures.second.object_class).nonzero().flatten()[:count]
    things = torch.stack([pictures.first.object_class[rows], pictures.second.object_class[rows]], dim=1)
    scenes = list(SCENES.values())
    prompts = [
        f"a {OBJECTS[a]} {RELATIONS[pictures.relation[row]]} a {OBJECTS[b]} {scenes[pictures.scene[row]]}"
        for row, (a, b) in zip(rows.tolist(), things.tolist())
    ]
    return prompts, {"things": things, "relation": pictures.relation[rows]}


def style_prompts(count: int, seed: int) -> tuple[list[str], dict[str, Tensor]]:
    """Prompts of one thing in every other style in turn."""
    generator = torch.Generator().manual_seed(seed)
    style = 1 + torch.arange(count) % (len(STYLES) - 1)
    thing, scene = (torch.randint(n, (count,), generator=generator) for n in (len(OBJECTS), len(SCENES)))
    frames, scenes = [STYLE_FRAMES.get(word, "") for word in STYLES], list(SCENES.values())
    prompts = [with_article(frames[style[row]], OBJECTS[thing[row]]) + f" {scenes[scene[row]]}" for row in range(count)]
    return prompts, {"style": style, "object": thing}


def accuracy(seen: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Share of pictures in which the judge sees what is true, by label; two things count in either order."""
    return {
        name: (seen[name].sort(-1).values == value.sort(-1).values).all(-1).float().mean().item()
        if name == "things"
        else (seen[name] == value).float().mean().item()
        for name, value in truth.items()
    }


def by_word(seen: Tensor, truth: Tensor, words: tuple[str, ...]) -> dict[str, float]:
    """Share of right answers where each word is true."""
    right = (seen == truth).float()
    return {word: right[truth == index].mean().item() for index, word in enumerate(words) if (truth == index).any()}


def held_out(count: int, seed: int, decode: Any = None) -> tuple[Pictures, Tensor]:
    """Renderings in no training set; `decode` takes images [256, 3, 128, 128] through the autoencoder."""
    generator, pictures, images = torch.Generator().manual_seed(seed), [], []
    for start in range(0, count, 256):
        pictures.append(sample_pictures(min(256, count - start), generator))
        found = render(pictures[-1])[0]
        images.append(found if decode is None else decode(found))
    return pictures, torch.cat(images)


@torch.no_grad()
def through(vae: Any, images: Tensor) -> Tensor:
    """Images in [0, 1] through the autoencoder and back."""
    parts = [vae.decode(vae.encode(part * 2 - 1).latents).sample for part in images.split(32)]
    return torch.cat(parts).clamp(-1, 1) / 2 + 0.5


def judge_accuracy(judge: Judge, pictures: list[Pictures], images: Tensor) -> dict[str, float]:
    """The judge on renderings that it was not trained on; object of lone things, colour of those not in pencil."""
    seen = judge.read(images)
    labels = ("scene", "relation", "style", "size")
    truth = {name: torch.cat([getattr(block, name) for block in pictures]) for name in labels}
    truth |= {
        name: torch.cat([getattr(block.first, field) for block in pictures])
        for name, field in (("object", "object_class"), ("colour", "colour"), ("pattern", "pattern"))
    }
    alone = truth["relation"] == 0
    kept = {"object": alone, "pattern": alone, "colour": alone & (truth["style"] != 1), "size": alone}
    return {name: (seen[name] == value)[kept.get(name, slice(None))].float().mean().item() for name, value in truth.items()}


def score_base(pipe: Any, judge: Judge, count: int, seed: int = 1000) -> dict[str, dict[str, float]]:
    """Accuracies over `count` samples of one thing (also by pattern), of two things and of styles, and the Fréchet distance."""
    figures: dict[str, dict[str, float]] = {}
    for title, make in (("one thing", one_prompts), ("two things", pair_prompts), ("styles", style_prompts)):
        prompts, truth = make(count, seed)
        with tqdm(total=len(prompts), desc=title) as bar:
            seen = judge.read(draw(pipe, prompts, seed=seed, progress=bar))
        figures[title] = accuracy(seen, truth)
        if title == "one thing":
            figures["one thing, pattern"] = by_word(seen["pattern"], truth["pattern"], PATTERNS)
        if title == "styles":
            figures["styles, style"] = by_word(seen["style"], truth["style"], STYLES)
    return figures


def distance_to_renderings(pipe: Any, judge: Judge, count: int, seed: int = 2000) -> dict[str, float]:
    """Fréchet distances of judge features to held-out renderings: of drawn captions' pictures, and of as many other renderings."""
    pictures, images = held_out(count, seed)
    true = judge.summary(images)
    words = torch.Generator().manual_seed(seed)
    captions = [text for block in pictures for text in caption(block, words)]
    with tqdm(total=len(captions), desc="Fréchet distance") as bar:
        drawn = judge.summary(draw(pipe, captions, seed=seed, progress=bar))
    others, restored = (judge.summary(held_out(count, seed + 1, decode)[1]) for decode in (None, lambda x: through(pipe.vae, x)))
    distances = {"drawn": drawn, "other renderings": others, "other renderings through the autoencoder": restored}
    return {name: frechet_distance(found, true) for name, found in distances.items()}


def main(arguments: list[str] | None = None) -> None:
    from perfusion.models import load_pipeline

    parser = argparse.ArgumentParser(prog="python -m perfusion.toybox.score", description="Score toybox with its judge.")
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--samples", type=int, default=1024, help="pictures of each kind")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args(arguments)
    judge, pipe = load_judge(options.folder / "judge.safetensors"), load_pipeline(options.folder)
    figures = {"judge": judge_accuracy(judge, *held_out(2048, seed=99))}
    print("judge on 2,048 held-out renderings:", _line(figures["judge"]))
    figures["judge, decoded"] = judge_accuracy(judge, *held_out(2048, seed=99, decode=lambda images: through(pipe.vae, images)))
    print("the same through the autoencoder:", _line(figures["judge, decoded"]))
    for title, found in score_base(pipe, judge, options.samples).items():
        figures[title] = found
        print(f"{title}, {options.samples} samples, {STEPS} steps, guidance {GUIDANCE:g}:", _line(found))
    figures["fréchet"] = distance_to_renderings(pipe, judge, options.samples)
    print("Fréchet distance to held-out renderings:", ", ".join(f"{name} {value:.2f}" for name, value in figures["fréchet"].items()))
    if options.output:
        settings = {"samples": options.samples, "steps": STEPS, "guidance": GUIDANCE}
        options.output.write_text(json.dumps({**settings, **figures}, indent=2) + "\n")


def _line(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items())


def identity(
    judge: Judge, references: Tensor, drawn: Tensor, superclass: Tensor, true: Tensor, object_class: int
) -> float:
    """How much of the instance `drawn` shows: 0 as the superclass prompt's pictures, 1 as other true pictures of it.

    All [n, 3, 128, 128]. The instance is what stands under the judge's mask of `object_class`; similarity of two pictures is the product
    of their unit features, averaged over the references.
    """
    anchor = judge.features(references, object_class).mean(0)
    seen, low, high = ((judge.features(images, object_class) @ anchor).mean().item() for images in (drawn, superclass, true))
    return (seen - low) / (high - low)


if __name__ == "__main__":
    main()
