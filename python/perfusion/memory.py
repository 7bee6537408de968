"""Memory that training and drawing take on a device, reckoned part by part before anything is loaded.

Weights are counted from a model's configuration. What a backward has to keep is not guessed: UNet and text encoders run once on the
meta device, which has shapes and no numbers, and every tensor that autograd saves is added up, attention being fused as it is on GPUs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from perfusion.base import text_input_width
from perfusion.base.parts import added_conditioning
from perfusion.files import size_text

__all__ = ["Parts", "Saved", "drawing", "saved_by_backward", "table", "total", "training"]

CUDA_CONTEXT = 0.5e9  # what a process has on an NVIDIA GPU before any tensor; depends on the driver
TOKENS = 77


@dataclasses.dataclass(frozen=True)
class Parts:
    """Numbers of parameters, and what else sizes come from: D, the outputs O of all layers, the side of a picture, the VAE's factor,
    the tokens of a prompt."""

    unet: int
    text_encoders: int
    vae: int
    encoding_dim: int
    outputs: int
    size: int
    vae_scale: int = 8
    tokens: int = TOKENS
    text_bytes: int | None = None  # of the text encoders' weights, where they are kept in another number format than the UNet's


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes that the backward of one picture keeps, and of one caption.

    whole: in the UNet. checkpointed: with gradient checkpointing, including the one block that is run again. text: in the text encoders.
    """

    whole: int
    checkpointed: int
    text: int = 0


class FusedAttention(torch.autograd.Function):
    """What a fused attention keeps for its backward: query, key, value, output, and a number for each row. Shapes only."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Fused(TorchFunctionMode):
    """Attention as GPUs and CPUs run it, where the meta device would write the scores down."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = arguments[:3] if len(arguments) >= 3 else [*arguments, *(options or {}).values()][:3]
            return FusedAttention.apply(query, key, value)
        return function(*arguments, **(options or {}))


def saved_by_backward(
    config: dict[str, Any],
    size: int,
    dtype: torch.dtype = torch.float32,
    texts: Sequence[Callable[[], Any]] = (),
    tokens: int = TOKENS,
    kind: str = "UNet2DConditionModel",
) -> Saved:
    """Count what autograd saves in a forward of the denoiser of this configuration, for one picture of `size` latents a side.

    texts: make its text encoders, of any weights. kind: diffusers' class of it.
    """
    import diffusers
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    with torch.device("meta"):
        unet = getattr(diffusers, kind).from_config(config).requires_grad_(False)
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(dtype)
        sample = torch.empty(1, unet.config.in_channels, size, size, dtype=dtype)
        text = torch.empty(1, tokens, text_input_width(unet), dtype=dtype, requires_grad=True)
        added = None
        if added_conditioning(unet) == "resolution":
            added = {"resolution": torch.empty(1, 2, dtype=dtype), "aspect_ratio": torch.empty(1, 1, dtype=dtype)}
        if added_conditioning(unet) == "text_time":
            times = unet.config.addition_time_embed_dim
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * times
            added = {"text_embeds": torch.empty(1, pooled, dtype=dtype), "time_ids": torch.empty(1, 6, dtype=dtype)}
        step = torch.empty(1, dtype=torch.int64)

    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    seen: set[int] = set()
    blocks: list[int] = []  # bytes saved inside each block that checkpointing would run again
    inputs, outside, depth = 0, 0, 0

    def enter(module: Any, arguments: tuple[Any, ...]) -> None:
        nonlocal depth, inputs
        if depth == 0:
            blocks.append(0)
            inputs += sum(_bytes(each) for each in arguments if isinstance(each, torch.Tensor))
        depth += 1

    def leave(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        nonlocal depth
        depth -= 1

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal outside
        storage = tensor.untyped_storage()._cdata
        if storage not in weights and storage not in seen:
            seen.add(storage)
            if depth:
                blocks[-1] += _bytes(tensor)
            else:
                outside += _bytes(tensor)
        return tensor

    handles = []
    for module in unet.modules():
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Fused():
        # kept: storages are known by their addresses
        result = unet(sample, timestep=step, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)
    del result
    text = sum(_saved_by_text_encoder(make, dtype, tokens) for make in texts)
    return Saved(outside + sum(blocks), outside + inputs + max(blocks), text)


def _saved_by_text_encoder(make: Callable[[], Any], dtype: torch.dtype, tokens: int) -> int:
    """Count what autograd saves in a forward of a text encoder for one caption, whose word is trained."""
    with torch.device("meta"):
        encoder = make().to(dtype).requires_grad_(False)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
    encoder.get_input_embeddings().weight.requires_grad_(True)
    weights = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            seen[storage] = max(_bytes(tensor), seen.get(storage, 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Fused():
        result = encoder(ids, output_hidden_states=True)
    del result
    return sum(seen.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def training(
    parts: Parts, saved: Saved, dtype: torch.dtype, *, rows: int, checkpointing: bool, low_memory: bool, batch: int | None = None,
    device: str = "cuda",
) -> dict[str, float]:  # fmt: skip
    """part -> bytes at the worst moment of a training: pictures are encoded, the UNet runs backward, or the text encoders do.

    rows: pictures that are in memory at once, of `batch` a step (by default as many). saved: of one picture and caption, in `dtype`.
    With low_memory text encoders and VAE are on the device only while they compute; a CPU holds them anyway.
    """
    size = dtype.itemsize
    again = low_memory or rows < (batch or rows)  # the text is read twice, and nothing of it is kept in between
    away = low_memory and device != "cpu"
    always = {
        "UNet": parts.unet * size,
        "CUDA": CUDA_CONTEXT if device == "cuda" else 0,
    }
    texts = parts.text_encoders * size if parts.text_bytes is None else parts.text_bytes
    text = rows * saved.text
    projections = 2 * parts.outputs * parts.encoding_dim * size
    vae = 0 if away else parts.vae * size
    encoded = {"text encoders": texts, "VAE": parts.vae * 4, "VAE's feature maps": _encoder_maps(parts, low_memory)}
    drawn = {
        "VAE": vae,
        "projections of all layers": projections,
        "text encoders": 0 if away else texts,
        "text's activations": 0 if again else text,
        "keys and values": 4 * rows * parts.tokens * parts.outputs * size,  # and their gradients
        "activations": rows * (saved.checkpointed if checkpointing else saved.whole),
    }
    read = {"VAE": vae, "projections of all layers": projections, "text encoders": texts, "text's activations": text}
    found = always | max((encoded, drawn, read), key=total)
    order = ("UNet", "text encoders", "VAE", "VAE's feature maps", "projections of all layers", "keys and values", "activations",
             "text's activations", "CUDA")  # fmt: skip
    return {name: found[name] for name in order if found.get(name)}


def _encoder_maps(parts: Parts, tiled: bool) -> float:
    """A picture and its mirror image, or one tile: 128 channels at full size, six of them at once, in float32 as SDXL's VAE needs it."""
    return (512**2 if tiled and parts.size > 512 else parts.size**2) * (1 if tiled else 2) * 128 * 6 * 4


def drawing(parts: Parts, dtype: torch.dtype, *, batch: int = 1, low_memory: bool = False) -> dict[str, float]:
    """part -> bytes, while pictures are drawn with guidance: weights, and the largest feature maps of the UNet and of the VAE's decoder."""
    size, side = dtype.itemsize, min(parts.size, 512) if low_memory else parts.size
    latent = (parts.size // parts.vae_scale) ** 2
    return {
        "UNet": parts.unet * size,
        "text encoders": parts.text_encoders * size,
        "VAE": parts.vae * size,
        "UNet's feature maps": 2 * batch * latent * 320 * size * 24,
        "VAE's decoder": batch * side * side * 256 * size * 4,  # 256 channels at full size: the input, its norm, and two outputs
        "CUDA": CUDA_CONTEXT,
    }


def total(found: dict[str, float]) -> float:
    return math.fsum(found.values())


def table(found: dict[str, float]) -> str:
    """"UNet 5.14 GB, keys and values 51.3 MB, …: 9.71 GB in all"."""
    return ", ".join(f"{name} {size_text(value)}" for name, value in found.items()) + f": {size_text(total(found))} in all"
