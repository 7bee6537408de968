"""`UNetWatch`: everything in a UNet that a recording of its forward has in it, looked at in well under a millisecond."""

from __future__ import annotations

import itertools
from typing import Any

import torch

__all__ = ["UNetWatch"]

FREEU = ("s1", "s2", "b1", "b2")  # attributes of up blocks
ADAPTER = ("scaling", "active_adapters", "merged_adapters", "disable_adapters")  # of peft's layers


class UNetWatch:
    """`stamp` changes when a module or weight is exchanged or moved, when LoRA is put in, scaled, fused or taken out, and with
    processors, hooks, FreeU, and training mode. Writes into a weight's own memory change nothing, as a recording reads them.

    obstacle: why a recording cannot stand for the UNet, or None.
    """

    def __init__(self, unet: torch.nn.Module):
        self._unet = unet
        self._structure: tuple[int, ...] | None = None
        self._modules: list[torch.nn.Module] = []
        self.obstacle: str | None = None

    def stamp(self) -> tuple[Any, ...]:
        structure = self._ids()
        if structure != self._structure:
            self._modules = list(self._unet.modules())
            self._children = [module._modules for module in self._modules]
            self._weights = [each for module in self._modules for each in (module._parameters, module._buffers) if each]
            self._adapters = [module for module in self._modules if isinstance(getattr(module, "scaling", None), dict)]
            self._blocks = list(getattr(self._unet, "up_blocks", ()))
            self._attention = [module for module in self._modules if "processor" in module.__dict__]
            self._structure = self._ids()
        self.obstacle = self._obstacle()
        try:
            weights = tuple(weight.data_ptr() for weights in self._weights for weight in weights.values() if weight is not None)
        except RuntimeError:
            self.obstacle, weights = "a weight of the UNet has no address of its own", ()
        adapters = tuple(repr(getattr(module, name, None)) for module in self._adapters for name in ADAPTER)
        freeu = tuple(module.__dict__.get(name) for module in self._blocks for name in FREEU)
        processors = tuple(id(module.__dict__["processor"]) for module in self._attention)
        return self._structure, weights, adapters, freeu, processors, self._unet.training

    def _ids(self) -> tuple[int, ...]:
        if not self._modules:
            return ()
        return tuple(map(id, itertools.chain.from_iterable(children.values() for children in self._children)))

    def _obstacle(self) -> str | None:
        if self._unet.training:
            return "the UNet is in training mode"
        for module in self._modules:
            own = module.__dict__
            if module is self._unet:
                if "_hf_hook" in own or getattr(own.get("_diffusers_hook"), "hooks", None):
                    return "the UNet is offloaded"
            elif own["_forward_hooks"] or own["_forward_pre_hooks"] or "_hf_hook" in own or "forward" in own:
                return f"a {type(module).__name__} has hooks, which a replay would not call"
        return None
