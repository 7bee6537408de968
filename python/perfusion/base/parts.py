"""The parts of a pipeline that concepts concern: text encoders with their tokenizers, and cross-attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfusion.errors import UnsupportedPipeline

if TYPE_CHECKING:
    import torch
    from diffusers.models.attention_processor import Attention

__all__ = ["cross_attention_layers", "layer_width", "plain_module", "text_encoders", "text_width"]


def plain_module(module: Any) -> Any:
    """The module itself, also where torch.compile has wrapped it."""
    return getattr(module, "_orig_mod", module)


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def layer_width(attention: Attention) -> int:
    """d_l: how many outputs the layer's `to_v` has; the layer below LoRA where one is loaded."""
    return getattr(attention.to_v, "base_layer", attention.to_v).out_features


def cross_attention_layers(unet: torch.nn.Module) -> dict[str, Attention]:
    """All cross-attention layers by module name, in the order of `unet.named_modules()`.

    That is the order of diffusers' own `unet.attn_processors`: down blocks, up blocks, then the mid block. Everything that
    concatenates layers uses it. Names carry no trace of torch.compile.
    """
    return {
        _plain_name(name): module
        for name, module in plain_module(unet).named_modules()
        if getattr(module, "is_cross_attention", False) and hasattr(module, "to_v")
    }


def text_encoders(pipe: Any, *, required: bool = True) -> list[tuple[Any, torch.nn.Module]]:
    """The (tokenizer, text encoder) pairs of a pipeline: one for SD 1.x and 2.x, two for SDXL, in concatenation order.

    Raises UnsupportedPipeline when there is none, unless they are not required, or one without its tokenizer.
    """
    pairs = []
    for suffix in ("", "_2"):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}", None), getattr(pipe, f"tokenizer{suffix}", None)
        if encoder is None:
            continue
        if tokenizer is None:
            raise UnsupportedPipeline(f"{type(pipe).__name__} has a text_encoder{suffix} but no tokenizer{suffix}. Load both.")
        pairs.append((tokenizer, encoder))
    if required and not pairs:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} has no text encoder (text_encoder is None). "
            "A concept lives in the text encoder's output: load the pipeline with its text encoder and tokenizer."
        )
    return pairs


def text_width(encoder: torch.nn.Module) -> int:
    return plain_module(encoder).get_input_embeddings().embedding_dim
