"""What people paint, as masks: of what they photographed, and of where a concept acts. No Gradio, no HTTP."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy
from PIL import Image

__all__ = ["BOXES", "COLOURS", "box_mask", "overlay", "painted_mask", "png", "region_masks", "tinted"]

COLOURS = ("#d9480f", "#1c7ed6")  # of the two regions; apart for every kind of colour blindness
BOXES = {  # left, top, right, bottom in parts of the picture, for two concepts
    "left and right": ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)),
    "top and bottom": ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)),
}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _layers(painting: Any) -> list[Image.Image]:
    """The strokes of an editor's value: RGBA, transparent where nothing was painted."""
    return [layer.convert("RGBA") for layer in (painting or {}).get("layers", []) if layer is not None]


def painted_mask(painting: Any, size: tuple[int, int]) -> Image.Image | None:
    """White [L, size] where anything was painted in an editor; None if nothing was."""
    mask = Image.new("L", size)
    for layer in _layers(painting):
        alpha = layer.getchannel("A").point(lambda value: 255 * (value > 127)).resize(size, Image.Resampling.NEAREST)
        mask.paste(255, mask=alpha)
    return mask if mask.getbbox() else None


def region_masks(painting: Any, size: tuple[int, int], colours: Sequence[str] = COLOURS) -> list[Image.Image | None]:
    """For each colour, white [L, size] where the editor has a stroke that is nearer to it than to the others; None where there is none.

    Later layers cover earlier ones.
    """
    wanted = numpy.array([[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in colours])
    owner = numpy.full((size[1], size[0]), -1)
    for layer in _layers(painting):
        pixels = numpy.asarray(layer.resize(size, Image.Resampling.NEAREST)).astype(int)
        distance = ((pixels[..., None, :3] - wanted) ** 2).sum(-1)
        owner = numpy.where(pixels[..., 3] > 127, distance.argmin(-1), owner)
    masks = [Image.fromarray((255 * (owner == place)).astype(numpy.uint8)) for place in range(len(colours))]
    return [mask if mask.getbbox() else None for mask in masks]


def box_mask(box: Sequence[float], size: tuple[int, int]) -> Image.Image:
    """White [L, size] in a box of parts of the picture, left, top, right, bottom."""
    mask = Image.new("L", size)
    left, top, right, bottom = (round(part * size[number % 2]) for number, part in enumerate(box))
    mask.paste(255, (left, top, right, bottom))
    return mask


def tinted(image: Image.Image, masks: Sequence[Image.Image | None], colours: Sequence[str] = COLOURS) -> Image.Image:
    """The picture with each mask laid over it in its colour."""
    result = image.convert("RGB")
    for mask, colour in zip(masks, colours):
        if mask is not None:
            strength = mask.resize(result.size, Image.Resampling.NEAREST).point(lambda value: value * 115 // 255)
            result.paste(Image.new("RGB", result.size, colour), mask=strength)
    return result


def overlay(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """What training looks at: the picture as it is inside its mask, pale and grey outside."""
    seen = image.convert("RGB")
    if mask is None:
        return seen
    pale = Image.blend(seen.convert("L").convert("RGB"), Image.new("RGB", seen.size, "white"), 0.7)
    return Image.composite(seen, pale, mask.resize(seen.size, Image.Resampling.NEAREST))
