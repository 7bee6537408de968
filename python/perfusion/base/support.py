"""Which pipelines can be edited (`check_supported`), and what they are (`describe_base`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfusion.base.fingerprint import text_encoder_fingerprint
from perfusion.base.parts import (
    cross_attention_layers,
    denoiser,
    layer_width,
    plain_module,
    text_encoders,
    text_encoding_width,
    text_width,
)
from perfusion.base.record import Base
from perfusion.base.text_projection import text_input_width, text_projection
from perfusion.errors import UnsupportedPipeline
from perfusion.families import CONDITIONINGS, family_by_encoding_dim, family_by_widths

if TYPE_CHECKING:
    import torch

__all__ = ["check_supported", "describe_base"]

SUPPORTED = (
    "Supported are pipelines whose UNet (UNet2DConditionModel, UNetMotionModel) or PixArtTransformer2DModel reads the text by "
    "cross-attention: Stable Diffusion 1.x, 2.x and XL, Kolors, PixArt-α and Σ, and models of their shape (image-to-image, inpainting, "
    "ControlNet and AnimateDiff included)."
)
_JOINT = (
    "mixes text and image states in joint attention: a word's states change in every block, and no key or value of it stays to be edited"
)
# the start of a transformer's class name -> what it does, and what to use with that model instead
TRANSFORMERS = {
    "SD3": (_JOINT, "diffusers' examples/dreambooth/train_dreambooth_lora_sd3.py"),
    "Flux": (_JOINT, "diffusers' examples/dreambooth/train_dreambooth_lora_flux.py"),
}


def describe_base(pipe: Any, *, text_required: bool = True) -> Base:
    """The Base of a pipeline. Raises UnsupportedPipeline as `check_supported` does.

    text_required: whether a pipeline without text encoders is refused; if not, its base says nothing of them.
    """
    check_supported(pipe, text_required=text_required)
    model = denoiser(pipe)
    reads = _one(text_encoding_width(model))
    widths = tuple(text_width(encoder) for _, encoder in text_encoders(pipe, required=text_required))
    fingerprint = text_encoder_fingerprint(pipe) if widths else ""
    if not widths:
        widths = (() if text_projection(model) else family_by_encoding_dim(reads).text_widths) or (_one(text_input_width(model)),)
    return Base(
        family=family_by_widths(widths, reads).id,
        encoding_dim=reads,
        text_widths=widths,
        layers={name: layer_width(layer) for name, layer in cross_attention_layers(model).items()},
        text_encoder=fingerprint,
    )


def check_supported(pipe: Any, *, text_required: bool = True) -> None:
    """Raises UnsupportedPipeline, naming the obstacle, unless every cross-attention layer of the pipeline can be edited."""
    reason = _unsupported_model(pipe) or _unsupported_processor(denoiser(pipe))
    if reason is not None:
        raise UnsupportedPipeline(f"{type(pipe).__name__} is not supported: {reason} {SUPPORTED}")
    encoders = [encoder for _, encoder in text_encoders(pipe, required=text_required)]
    if not encoders:
        return
    model = denoiser(pipe)
    widths, reads = [text_width(encoder) for encoder in encoders], text_input_width(model)
    if any(read != sum(widths) for read in (reads if isinstance(reads, list) else [reads])):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} is not supported: its text encoders give {' + '.join(map(str, widths))} numbers per token, "
            f"its {'UNet' if hasattr(pipe, 'unet') else 'transformer'} reads {reads}. Is a text encoder missing? {SUPPORTED}"
        )


def _one(width: int | list[int]) -> int:
    return width[0] if isinstance(width, list) else width


def _unsupported_model(pipe: Any) -> str | None:
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel, UNetMotionModel

    model = plain_module(denoiser(pipe))
    if isinstance(model, PixArtTransformer2DModel):
        return None if model.config.caption_channels is not None else "its transformer has no caption projection."
    if model is not None and getattr(pipe, "unet", None) is None:
        kind = type(model).__name__
        does, instead = next(
            (each for start, each in TRANSFORMERS.items() if kind.startswith(start)),
            ("is a transformer, whose attention the edit was not made for", "a LoRA of that model by peft"),
        )
        return f"it has a {kind}, which {does}. With that model use {instead}; concepts need one of the models below."
    if not isinstance(model, (UNet2DConditionModel, UNetMotionModel)):
        return "it has no UNet." if model is None else f"its UNet is of type {type(model).__name__}."
    conditioning, projection = model.config.addition_embed_type, model.config.encoder_hid_dim_type
    if conditioning not in CONDITIONINGS:
        return f"its UNet has addition_embed_type={conditioning!r} (as DeepFloyd IF and Kandinsky do)."
    if projection not in (None, "text_proj", "ip_image_proj"):  # an IP-Adapter's pictures go beside the text, which stays as it is
        return f"its UNet makes text encodings of something else (encoder_hid_dim_type={projection!r})."
    return None if cross_attention_layers(model) else "its UNet has no cross-attention layer."


def _unsupported_processor(unet: torch.nn.Module) -> str | None:
    for name, module in plain_module(unet).named_modules():
        processor = type(getattr(module, "processor", None)).__name__
        if "AddedKV" in processor or getattr(module, "added_kv_proj_dim", None) is not None:
            return f"layer {name} has added key and value projections ({processor}, as DeepFloyd IF and Kandinsky have)."
        # The processor decides: unfusing puts the old ones back and leaves the fused weights where they are, unused.
        if "Fused" in processor:
            return f"layer {name} has fused key and value projections ({processor}). Call pipe.unfuse_qkv_projections() first."
    return None
