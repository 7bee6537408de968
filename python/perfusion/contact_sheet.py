"""Pictures side by side: the contact sheets of validation grids, model cards, `perfusion generate` and the demo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["image", "sheet"]


def image(pixels: Tensor) -> Image.Image:
    """A PIL image of pixels [3, H, W] in [-1, 1]."""
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def sheet(
    images: Sequence[Image.Image], columns: int | None = None, *, titles: Sequence[str] | None = None, side: int = 128, gap: int = 4
) -> Image.Image:
    """All images on one white sheet in the size of the first, enlarged to at least `side` pixels' width, with titles beneath.

    columns: by default one row of up to 8. titles: one for each image, "" for none. ValueError for another number of titles.
    """
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"sheet: {len(images)} images need as many titles, got {len(titles)}")
    columns = columns or min(len(images), 8) or 1
    factor = max(1, math.ceil(side / images[0].width)) if images else 1
    width, height = (images[0].width * factor, images[0].height * factor) if images else (side, side)
    font = ImageFont.load_default(size=max(11, width // 11))
    strip = 0 if not titles else int(font.size * 1.6)
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + strip + gap) + gap), "white")
    for number, picture in enumerate(images):
        x, y = gap + number % columns * (width + gap), gap + number // columns * (height + strip + gap)
        page.paste(
            picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS if factor == 1 else Image.Resampling.NEAREST), (x, y)
        )
        if titles and titles[number]:
            ImageDraw.Draw(page).text((x + width / 2, y + height + strip / 2), titles[number], "black", font, anchor="mm")
    return page
