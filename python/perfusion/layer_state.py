"""Everything in a UNet's `to_k` and `to_v` that keys and values depend on, read cheaply before each forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

__all__ = ["lora_scaled", "offloaded_block", "parameter_stamp", "projection_stamp"]


def projection_stamp(layers: list[torch.nn.Module]) -> tuple[Any, ...]:
    """Changes when a weight is written, cast, moved or exchanged, when LoRA is put in, scaled, fused or taken out, and with hooks.

    Writes are those that torch counts (`_version`), so not those through `.data`, of which only casts and moves are seen.
    """
    stamp: list[Any] = []
    for layer in layers:
        modules = layer._modules
        for module in (modules["to_k"], modules["to_v"]):
            weight = module._parameters.get("weight")
            if weight is None:
                stamp.append(_adapted(module))
            else:
                stamp += (id(module), id(weight), 0 if weight.is_inference() else weight._version, weight.dtype, weight.device)
                stamp += ("forward" in module.__dict__, len(module._forward_pre_hooks), len(module._forward_hooks))
    return tuple(stamp)


def _adapted(module: torch.nn.Module) -> tuple[Any, ...]:
    """The state of a module that wraps a layer, as peft's LoRA does."""
    names = ("active_adapters", "merged_adapters", "disable_adapters")
    state = [id(module), *(repr(getattr(module, name, None)) for name in names)]
    scaling = getattr(module, "scaling", None)
    # rounded: diffusers multiplies it by a call's scale and divides it again, which may leave another last bit
    scales = tuple((name, f"{value:.9g}") for name, value in scaling.items()) if isinstance(scaling, dict) else repr(scaling)
    return (*state, scales, *parameter_stamp(module))


def parameter_stamp(module: torch.nn.Module) -> tuple[Any, ...]:
    """Changes when a parameter of a module is written, cast, moved or exchanged."""
    return tuple((id(each), 0 if each.is_inference() else each._version, each.dtype, each.device) for each in module.parameters())


@contextlib.contextmanager
def lora_scaled(layers: Iterable[torch.nn.Module], scale: float) -> Iterator[None]:
    """LoRA of `to_k` and `to_v` times a number, as diffusers' UNets have it within their forward, and as it was afterwards."""
    projections = [] if scale == 1 else [each for layer in layers for part in (layer.to_k, layer.to_v) for each in part.modules()]
    adapted = [(module, dict(module.scaling)) for module in projections if isinstance(getattr(module, "scaling", None), dict)]
    try:
        for module, held in adapted:
            module.scaling.update({name: value * scale for name, value in held.items()})
        yield
    finally:
        for module, held in adapted:
            module.scaling.update(held)


def offloaded_block(unet: torch.nn.Module) -> str | None:
    """The name of a module above single layers that moves weights of its own when it is called; None if there is none.

    Layers below it cannot be called before it is. A whole UNet that accelerate moves is not meant: it can be asked to.
    """
    for name, module in unet.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and any("group_offloading" in key for key in getattr(registry, "hooks", {})) and any(module.children()):
            return name or "the UNet"
        if name and any(module.children()) and _moves_children(getattr(module, "_hf_hook", None)):
            return name
    return None


def _moves_children(hook: Any) -> bool:
    """Whether a hook of accelerate's moves more than a module's own parameters, which a block beside its layers may have, too."""
    hooks = getattr(hook, "hooks", [] if hook is None else [hook])
    return any(getattr(each, "place_submodules", True) for each in hooks)
