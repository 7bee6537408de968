"""Sheets of what the model draws: `python -m perfusion.toybox.sheets docs`. A sheet holds the digest of the weights that drew it."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm.auto import tqdm

from perfusion.contact_sheet import sheet
from perfusion.files import whole

from .score import WEIGHTS, draw
from .words import COLOURS, OBJECTS, PATTERNS, SCENES
from .world import with_article

__all__ = ["class_prompts", "pil", "save_sheet", "ten_prompts", "weights_digest"]


def class_prompts() -> list[str]:
    """Four of each class, in every pattern, in colours and scenes that change."""
    colours, scenes, prompts = list(COLOURS), list(SCENES.values()), []
    for number, thing in enumerate(OBJECTS):
        for row, pattern in enumerate(PATTERNS):
            colour, scene = colours[(3 * number + 2 * row + number // 4) % len(colours)], scenes[(4 * number + row) % len(scenes)]
            prompts.append(with_article("a {}", " ".join([colour, *[pattern][: row > 0], thing])) + f" {scene}")
    return prompts


def ten_prompts(scene: str = "on the beach") -> list[str]:
    """The plainest prompt of each class, ten times."""
    return [f"a {thing} {scene}" for thing in OBJECTS for _ in range(10)]


def pil(images: Tensor) -> list[Image.Image]:
    """Images [n, 3, H, W] in [0, 1] as pictures."""
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def weights_digest(folder: Path = WEIGHTS) -> str:
    """SHA-256 of a pipeline's weights, in hexadecimal: what its pictures depend on."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()


def save_sheet(image: Image.Image, path: Path) -> None:
    """As PNG of 256 colours, with the digest of the weights that drew it as text."""
    text = PngInfo()
    text.add_text("toybox", weights_digest())
    with whole(path) as draft:
        image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG).save(draft, "PNG", optimize=True, pnginfo=text)


def main(arguments: list[str] | None = None) -> None:
    from perfusion.models import load_pipeline

    parser = argparse.ArgumentParser(prog="python -m perfusion.toybox.sheets", description=__doc__)
    parser.add_argument("folder", type=Path, help="where toybox-classes.png and toybox-ten.png are written")
    folder, pipe = parser.parse_args(arguments).folder, load_pipeline(WEIGHTS)
    for name, prompts, columns, seed in (("classes", class_prompts(), 8, 50), ("ten", ten_prompts(), 10, 0)):
        save_sheet(sheet(pil(_drawn(pipe, name, prompts, seed)), columns=columns), folder / f"toybox-{name}.png")


def _drawn(pipe: Any, name: str, prompts: list[str], seed: int) -> Tensor:
    with tqdm(total=len(prompts), desc=name) as bar:
        return draw(pipe, prompts, seed=seed, progress=bar)


if __name__ == "__main__":
    main()
