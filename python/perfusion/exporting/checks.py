"""What an export cannot hold, said before anything is traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from perfusion.base import cross_attention_layers, denoiser, text_projection
from perfusion.families import CUSTOM

__all__ = ["ExportError", "check_exportable"]

# they compute what torch's own attention computes, in another order
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor", "AttentionProcessor")

PARTS = ("unet", "vae", *CUSTOM.text_encoders)


class ExportError(ValueError):
    """A pipeline that cannot be exported as it is. Says what stands in the way and what to do."""


def check_exportable(pipe: Any) -> None:
    """Raises ExportError, naming the obstacle; `check_supported` of the pipeline comes first."""
    for reason in _obstacles(pipe):
        raise ExportError(f"{type(pipe).__name__} cannot be exported: {reason}")


def _obstacles(pipe: Any) -> Iterator[str]:
    if getattr(pipe, "_perfusion_handle", None) is not None:
        yield "perfusion is attached to it. Call perfusion.detach(pipe) first: an export takes any concept at run time."
    if text_projection(denoiser(pipe)) is not None:
        yield "its denoiser projects the text before K and V are made of it (as PixArt and Kolors do). Draw with it in diffusers."
    if getattr(pipe, "vae", None) is None:
        yield "it has no VAE. Load it with its VAE."
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name in PARTS}
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts.values()):
        yield "a part of it is compiled. Export it as it is before torch.compile."
    for name, part in parts.items():
        yield from _weights(name, part)
    yield from _unet(pipe.unet)
    for name in CUSTOM.text_encoders:
        if getattr(getattr(getattr(pipe, name, None), "config", None), "use_attention_mask", False):
            yield f"its {name} reads a padding mask (use_attention_mask), which Stable Diffusion's encoders do not."
    if getattr(pipe.config, "requires_aesthetics_score", False):
        yield "it is a refiner, which starts from a picture. Export the base model."


def _weights(name: str, part: nn.Module) -> Iterator[str]:
    adapted = next((path for path, module in part.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        yield (
            f"a LoRA is loaded in its {name} (at {adapted}), and K and V are computed from plain weights. "
            "Call pipe.fuse_lora() and then pipe.unload_lora_weights(), and export what is left."
        )
    parameters = dict(part.named_parameters())
    for path, parameter in parameters.items():
        where = f"{path} of its {name}"
        if parameter.is_meta:
            yield f"{where} is offloaded (on the meta device). Export it before enable_sequential_cpu_offload()."
        if not parameter.is_floating_point() or type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            yield f"{where} is quantised ({parameter.dtype}). Export it before quantisation; runtimes quantise by themselves."
        if parameter.dtype not in (torch.float32, torch.float16):
            yield f"{where} is {parameter.dtype}. Load it with torch_dtype=torch.float32 or torch.float16."
    if len({parameter.dtype for parameter in parameters.values()}) > 1:
        yield f"its {name} mixes number formats. Load it with one torch_dtype."


def _unet(unet: nn.Module) -> Iterator[str]:
    config = unet.config
    for key in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
        if getattr(config, key, None) is not None:
            kind = " (a distilled guidance scale, as LCM has)" if key == "time_cond_proj_dim" else ""
            yield f"its UNet has {key}={getattr(config, key)!r}{kind}, an input that the export does not have."
    if config.in_channels != config.out_channels:
        yield (
            f"its UNet takes {config.in_channels} channels and gives {config.out_channels} (as for inpainting), "
            "and an export draws from text alone."
        )
    if any(getattr(block, "s1", None) is not None for block in unet.up_blocks):
        yield "FreeU is on. Call pipe.disable_freeu() first."
    for name, layer in cross_attention_layers(unet).items():
        for part in ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm"):
            if getattr(layer, part, None) is not None:
                yield f"layer {name} has a {part}, which comes between the text and K."
        if layer.to_k.bias is not None or layer.to_v.bias is not None:
            yield f"to_k or to_v of layer {name} has a bias."
        if layer.residual_connection or layer.rescale_output_factor != 1:
            yield f"layer {name} adds its input, or scales its output, inside attention."
    for name, module in unet.named_modules():
        processor = type(getattr(module, "processor", None)).__name__
        if processor != "NoneType" and processor not in PLAIN_PROCESSORS:
            yield f"layer {name} has a processor of its own ({processor}). Call pipe.unet.set_default_attn_processor() first."
