"""The sentences of `Handle.explain`, `Handle.layer_paths` and `perfusion doctor --model`: which path was taken, or will be, and why."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from perfusion.attention_processor import FUSED, SCHEDULE, SLOTS, STOCK
from perfusion.batched_projection import layer_obstacle, obstacle
from perfusion.own_processors import OwnProcessors, processor_obstacle

__all__ = ["outlook", "paths_of", "what_ran"]

RAN = {
    STOCK: "The pipeline's own attention ran",
    SLOTS: "Keys and values were read from slots",
    SCHEDULE: "The edit of the step was applied as keys and values were loaded",
    FUSED: "Projection, edit and attention ran in one call",
    "hooks": "The compatibility path ran: hooks on to_k and to_v",
}


def what_ran(form: str, reason: str) -> str:
    """What the UNet did in a forward."""
    return f"{RAN[form]}: {reason}."


def outlook(unet: torch.nn.Module, blocked: str | None) -> str:
    """What stands in the way of something faster. blocked: what closes the fast path, or None."""
    return _sentence(blocked, obstacle(unet, frozen=False))


def paths_of(
    unet: torch.nn.Module, layers: Mapping[str, torch.nn.Module], processors: OwnProcessors, blocked: str | None
) -> dict[str, tuple[str, str]]:
    """layer -> the path that a concept takes in it, "slots" or "hooks", and why."""
    taken, called, first = processors.taken(), obstacle(unet, frozen=False), next(iter(layers.values()))
    found = {}
    for name, layer in layers.items():
        closed = blocked and (taken.get(name) or processor_obstacle(name, layer) or blocked)
        own = layer_obstacle(name, layer, first, frozen=False) or called
        found[name] = ("slots" if blocked is None else "hooks"), _sentence(closed, own)
    return found


def _sentence(blocked: str | None, called: str | None) -> str:
    if blocked is not None:
        return f"The fast path is closed: {blocked}."
    if called is not None:
        return f"Projections are called layer by layer, once per prompt: {called}."
    return "Projections of all layers are two products, once per prompt."
