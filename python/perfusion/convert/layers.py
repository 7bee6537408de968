"""Layers by name, and by their order in a bare list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from perfusion.base import Base, cross_attention_layers
from perfusion.convert.checkpoint import ConversionError
from perfusion.convert.fitting import LOCKED, fit, projection_weights

__all__ = ["assign", "by_layer", "layer_paths"]


def layer_paths(pipe: Any) -> dict[str, tuple[str, ...]]:
    """layer -> its names: diffusers' own, and the one in the original Stable Diffusion code."""
    per_block = getattr(pipe.unet, "_orig_mod", pipe.unet).config.layers_per_block
    return {layer: (layer, *_original_name(layer, per_block)) for layer in cross_attention_layers(pipe.unet)}


def _original_name(layer: str, per_block: Any) -> Iterator[str]:
    """input_blocks, middle_block and output_blocks count residual blocks; a down block has `per_block`, an up block one more."""
    kind, *rest = layer.split(".attentions.")
    if not rest or not isinstance(per_block, int):
        return
    attention, _, tail = rest[0].partition(".")
    block = int(kind.rsplit(".", 1)[-1]) if kind[-1].isdigit() else 0
    place = block * (per_block + 1) + int(attention)
    if kind.startswith("down_blocks."):
        yield f"input_blocks.{place + 1}.1.{tail}"
    elif kind.startswith("up_blocks."):
        yield f"output_blocks.{place}.1.{tail}"
    elif kind == "mid_block":
        yield f"middle_block.1.{tail}"


def by_layer(values: Mapping[str, Any], paths: Mapping[str, tuple[str, ...]], base: Base, what: str) -> dict[str, Any]:
    """Values by path -> values by layer, every layer exactly once."""
    result = {}
    for layer in base.layers:
        hits = [path for path in values if any(path == name or path.endswith(f".{name}") for name in paths[layer])]
        if len(hits) != 1:
            raise ConversionError(
                f"{what} must be there once for each of {len(base.layers)} layers, but for {layer} it is there {len(hits)} times. "
                "Was it trained on another model?"
            )
        result[layer] = values[hits[0]]
    if len(result) != len(values):
        raise ConversionError(f"{what} is there for {len(values)} layers, {base} has {len(result)}. Was it trained on another model?")
    return result


def assign(outputs: list[Tensor], pipe: Any, base: Base) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which output in a bare list belongs to which layer: (keys, values) by layer.

    Two orders are known: diffusers' module order, and the original code's, which has the middle block in the middle.
    Widths decide, then the key lock: only in the right order are the keys W_K s.
    """
    places = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    run_order = sorted(base.layers, key=lambda layer: places.get(layer.split(".")[0], 0))
    widths = [output.shape[1] for output in outputs]
    candidates = []
    for order in dict.fromkeys((tuple(base.layers), tuple(run_order))):
        if widths == [base.layers[layer] for layer in order for _ in ("key", "value")]:
            keys = dict(zip(order, outputs[0::2]))
            residual = fit(projection_weights(pipe, "to_k"), torch.cat([keys[layer] for layer in base.layers], 1)[0])[1]
            candidates.append((order, residual))
    if not candidates:
        raise ConversionError(f"the outputs' widths {widths[0::2]} are not those of {base}. It was trained on another model.")
    order, residual = min(candidates, key=lambda candidate: candidate[1])
    if len(candidates) > 1 and residual > LOCKED:
        raise ConversionError("the order of the layers cannot be told: two orders fit the widths, and the keys are not locked.")
    keys, values = dict(zip(order, outputs[0::2])), dict(zip(order, outputs[1::2]))
    return {layer: keys[layer] for layer in base.layers}, {layer: values[layer] for layer in base.layers}
