"""Distances of the encodings that the thresholds of recognition must separate. Table of docs/pipelines.md.

    PYTHONPATH=.:python python bench/recognition.py perfusion-demo/*.safetensors --out bench/results/recognition.jsonl

A minute, no GPU.

Same: encodings of prompts with a concept after what users do to them (scaling, casts, weighting of words). Other: encodings of
prompts that share most words with one of these and hold no concept, another one, or the same one elsewhere. Of each: the
share of tokens whose cosine is above `SAME`, and the least cosine at the concept's own word, the two numbers that
`perfusion/encoding_registry.py` looks at. And by what `perfusion/handle.py` warns: the similarity c(e) at that word, the largest one of
tokens that point where the concept's target does, and how often it would warn if it did not know the row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import rows
from perfusion.concept import Concept
from perfusion.encoding_registry import ALIKE, SAME
from perfusion.handle import DOUBT, attach, seeming
from perfusion.models import load_pipeline

SCENES = ("a {} on a beach", "a {} in the snow", "a photo of a {}", "two cubes next to a {}", "a {} next to a mug", "a red {} in a forest")
THINGS = (
    *("ball", "mug", "cube", "box", "lamp", "chair", "house", "tree", "car", "bird", "fish", "robot"),
    *("bear", "cat", "dog", "vase", "star", "cone", "ring", "clock", "boat", "flower", "teddy", "teapot"),
)
ELSEWHERE = ("a mug next to a {}", "the {} on a beach", "a photo of my {} in the snow")


def changes(encoding: Tensor, place: int) -> Iterator[tuple[str, Tensor]]:
    """What an encoding [T, D] may become and still be the same prompt's."""
    for scale in (0.5, 1.5):
        yield f"scaled by {scale}", encoding * scale
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        yield f"cast to {str(dtype).removeprefix('torch.')}", encoding.to(dtype).float()
    for weight in (0.6, 1.5):
        for name, first, last in (("the word", place, place + 1), ("three words", place - 1, place + 2)):
            changed = encoding.clone()
            changed[first:last] *= weight
            yield f"{name} weighted {weight}", changed
            yield f"{name} weighted {weight}, mean kept", changed * (encoding.mean() / changed.mean())
            empty = encoding.mean(0)  # weighting towards another encoding
            towards = encoding.clone()
            towards[first:last] = empty + (encoding[first:last] - empty) * weight
            yield f"{name} moved {weight} from the mean", towards


def numbers(row: Tensor, other: Tensor, places: tuple[int, ...]) -> tuple[float, float]:
    cosine = torch.nn.functional.cosine_similarity(row, other, dim=-1)
    return float((cosine > SAME).float().mean()), float(min(cosine[place] for place in places))


def measured(concepts: list[Concept]) -> Iterator[dict[str, Any]]:
    pipe = load_pipeline("toybox", device="cpu")
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}

    def see(kind: str, name: str, changed: Tensor) -> None:  # of the concept, row and places of the loop below
        seen = *numbers(changed, row, places), similarity(concept, changed, places), seeming(concept, changed[1:])
        found.setdefault((kind, name), []).append(seen)

    def encode(prompt: str) -> Tensor:
        return pipe.encode_prompt([prompt], "cpu", 1, False)[0][0]

    def similarity(concept: Concept, row: Tensor, places: tuple[int, ...]) -> float:
        return float(concept.similarity(row[1:])[[place - 1 for place in places]].max())

    with attach(pipe) as handle, torch.no_grad():
        for concept in concepts:
            handle.load(concept)
        for number, concept in enumerate(concepts):
            word, other = f"<{concept.name}>", f"<{concepts[number - 1].name}>"
            for scene in SCENES:
                row = encode(scene.format(word))
                places = tuple(handle.rows_of(row[None])[0].places[0])
                see("same", "as it is", row)
                for name, changed in changes(row, places[0]):
                    see("same", name, changed)
                others = {"the superclass, no concept": concept.superclass, "another concept": other}
                prompts = [(name, scene.format(each)) for name, each in others.items()]
                prompts += [("another thing, no concept", scene.format(each)) for each in THINGS if each != concept.superclass]
                for name, prompt in (*prompts, *(("the concept in other words", each.format(word)) for each in ELSEWHERE)):
                    see("other", name, encode(prompt))
    for (kind, name), seen in found.items():
        alike, word, c, near = (torch.tensor(each) for each in zip(*seen))
        spans = {"alike": alike, "word": word, "similarity": c, "seeming": near}
        taken = float(((alike >= ALIKE) & (word > ALIKE)).float().mean())
        yield {
            "suite": "recognition", "case": name, "kind": kind, "pairs": len(seen), "taken": taken,
            "warned": float((near > DOUBT).float().mean()),
            **{key: [round(float(each.min()), 4), round(float(each.max()), 4)] for key, each in spans.items()}, **rows.provenance("cpu"),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", nargs="*", type=Path, help="two or more concept files of toybox, as `perfusion demo` writes them")
    parser.add_argument("--out", type=Path, help="file for the rows, besides the table")
    arguments = parser.parse_args()
    concepts = [Concept.load(path) for path in arguments.concepts]
    if len(concepts) < 2:
        parser.error("give two or more concept files")
    results = list(measured(concepts))
    head = "", "pairs", "share of tokens alike", "cosine at the word", "c there", "largest c in its direction", "taken", "warned of"
    print(f"|{'|'.join(head)}|\n|{'---|' * len(head)}")
    for row in results:
        spans = (f"{row[key][0]:.3f} … {row[key][1]:.3f}" for key in ("alike", "word", "similarity", "seeming"))
        print(f"| {row['kind']}: {row['case']} | {row['pairs']} | {' | '.join(spans)} | {row['taken']:.0%} | {row['warned']:.0%} |")
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in results), encoding="utf-8")


if __name__ == "__main__":
    main()
