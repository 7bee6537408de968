"""Names of a UNet's layers in the original implementations of Stable Diffusion, which other programs use."""

from __future__ import annotations

import re

__all__ = ["original_name"]


def original_name(layer: str, layers_per_block: int) -> str:
    """A UNet layer's name in the original implementation, which SDXL's LoRAs use: down_blocks.1.attentions.0 is input_blocks.4.1."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", layer)
    if found is None:
        return layer.replace("mid_block.attentions.0", "middle_block.1")
    side, block, number, rest = found[1], int(found[2]), int(found[3]), found[4]
    place = block * (layers_per_block + 1) + number
    return f"input_blocks.{place + 1}.1.{rest}" if side == "down" else f"output_blocks.{place}.1.{rest}"
