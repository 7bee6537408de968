"""Which image tokens may attend to which text positions, as bit sets for `edited_attention`: regions of concepts, and padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from perfusion.requests import RowRequest

__all__ = ["MAX_REGIONS", "key_regions", "padding_bits", "query_regions"]

MAX_REGIONS = 31  # bits of an int32 without its sign
PADDING = -(2**31)  # that sign: the bit of padding, which no image token has
LEVELS = 8  # how often a UNet may halve the picture
INSIDE = 0.5  # a token belongs to a region if the mask's mean over it is above this


def query_regions(rows: Mapping[int, RowRequest], count: int, size: tuple[int, int], device: torch.device) -> dict[int, Tensor]:
    """Number of image tokens N -> bit sets [R, N] int32: bit j of a token says that it lies in the region of the row's concept j.

    rows: of a batch of `count`; size: height and width of the latents, which a UNet halves from level to level, rounding up.
    """
    height, width = size
    found: dict[int, Tensor] = {}
    for _ in range(LEVELS):
        bits = torch.zeros(count, height * width, dtype=torch.int32)
        for row, request in rows.items():
            for number, region in enumerate(request.regions):
                if region is not None:
                    inside = interpolate(region[None, None], (height, width), mode="area").flatten() > INSIDE
                    bits[row] |= inside.int() << number
        found.setdefault(height * width, bits.to(device))
        height, width = (height + 1) // 2, (width + 1) // 2
    return found


def key_regions(rows: Mapping[int, RowRequest], shape: tuple[int, int], device: torch.device, padding: Tensor | None = None) -> Tensor:
    """Bit sets [R, T] int32: bit j at the places of the row's concept j, if it has a region; 0, which all may read, elsewhere.

    padding: what `padding_bits` gives of the batch's text mask, if it has one.
    """
    bits = torch.zeros(shape, dtype=torch.int32)
    for row, request in rows.items():
        for number, (places, region) in enumerate(zip(request.places, request.regions)):
            if region is not None:
                for place in places:
                    bits[row, place] |= 1 << number
    bits = bits.to(device)
    return bits if padding is None else torch.where(padding != 0, padding, bits)


def padding_bits(read: Tensor) -> Tensor:
    """Bit sets [R, T] int32 of a text mask [R, T] that is True where text is read: no image token attends to the other positions."""
    return torch.where(read, 0, PADDING).to(torch.int32)
