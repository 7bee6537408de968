"""`OwnProcessors`: the exchange of the cross-attention layers' processors for ours, and back, and what stands in its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from perfusion.attention_processor import AttentionState, ConceptAttnProcessor

__all__ = ["OwnProcessors", "processor_obstacle"]

# processors whose work ours does: the rest keep their place, and concepts take the compatibility path
REPLACED = ("AttnProcessor", "AttnProcessor2_0")


class OwnProcessors:
    """Of the layers of one UNet, by name. Either all have ours, or none is touched."""

    def __init__(self, layers: Mapping[str, torch.nn.Module], state: AttentionState):
        self._layers, self._state = layers, state
        self.placed: list[ConceptAttnProcessor] = []  # one per layer while they are in place, whatever became of them since

    def put(self) -> None:
        """Exchange the processors, unless that is done or a layer's cannot give way."""
        if not self.placed and self.obstacle() is None:
            for number, layer in enumerate(self._layers.values()):
                self.placed.append(ConceptAttnProcessor(layer.processor, self._state, number))
                layer.processor = self.placed[-1]

    def take_back(self) -> None:
        """Give the layers the processors that they had; what somebody else put there since is theirs."""
        for layer, own in zip(self._layers.values(), self.placed):
            if layer.processor is own:
                layer.processor = own.stock
        self.placed = []

    def follow(self) -> None:
        """Each layer takes its part of the state, before a forward."""
        for own in self.placed:
            own.follow()

    def obstacle(self) -> str | None:
        """Why a layer's processor cannot give way to ours, or None."""
        return next(filter(None, (processor_obstacle(name, layer) for name, layer in self._layers.items())), None)

    def replaced(self) -> bool:
        """Whether one of ours was exchanged since it was put in place."""
        return any(layer.processor is not own for layer, own in zip(self._layers.values(), self.placed))

    def taken(self) -> dict[str, str]:
        """The layers whose processor is ours no more, and a sentence of each."""
        now: dict[str, Any] = {name: layer.processor for name, layer in self._layers.items()}
        replaced = {name: now[name] for name, own in zip(now, self.placed) if now[name] is not own}
        return {name: f"layer {name} was given another processor, {type(each).__name__}" for name, each in replaced.items()}


def processor_obstacle(name: str, layer: torch.nn.Module) -> str | None:
    """Why the processor of a layer cannot give way to ours, or None."""
    processor = layer.processor.stock if type(layer.processor) is ConceptAttnProcessor else layer.processor
    if type(processor).__name__ not in REPLACED:
        return f"layer {name} has a processor of its own, {type(processor).__name__}"
    if layer.residual_connection or layer.rescale_output_factor != 1 or layer.norm_cross:
        return f"layer {name} does more than attention"
    if any(getattr(layer, part, None) is not None for part in ("spatial_norm", "group_norm", "norm_q", "norm_k")):
        return f"layer {name} normalises"
    return None
