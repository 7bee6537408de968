"""The parts of a pipeline that concepts concern: text encoders with their tokenizers, the denoiser and its cross-attention layers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from perfusion.errors import UnsupportedPipeline
from perfusion.families import CUSTOM

if TYPE_CHECKING:
    import torch
    from diffusers.models.attention_processor import Attention

__all__ = [
    "added_conditioning",
    "cross_attention_layers",
    "denoiser",
    "latent_multiple",
    "layer_width",
    "plain_module",
    "prepared_text",
    "text_encoders",
    "text_encoding_width",
    "text_length",
    "text_width",
    "tokenizers",
]

DENOISERS = ("unet", "transformer")


def plain_module(module: Any) -> Any:
    """The module itself, also where torch.compile has wrapped it."""
    return getattr(module, "_orig_mod", module)


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def denoiser(pipe: Any) -> Any:
    """The model that removes the noise, a UNet or a transformer, as the pipeline holds it; None where there is none."""
    return next((model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None), None)


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
    """The (tokenizer, text encoder) pairs of a pipeline, in concatenation order: `Family.text_encoders`.

    Raises UnsupportedPipeline when there is none, unless they are not required, or one without its tokenizer.
    """
    pairs = []
    for name, beside in zip(CUSTOM.text_encoders, CUSTOM.tokenizers):
        encoder, tokenizer = getattr(pipe, name, None), getattr(pipe, beside, None)
        if encoder is None:
            continue
        if tokenizer is None:
            raise UnsupportedPipeline(f"{type(pipe).__name__} has a {name} but no {beside}. Load both.")
        pairs.append((tokenizer, encoder))
    if required and not pairs:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} has no text encoder (text_encoder is None). "
            "A concept lives in the text encoder's output: load the pipeline with its text encoder and tokenizer."
        )
    return pairs


def tokenizers(pipe: Any) -> list[Any]:
    """Those that the pipeline has, also where the text encoders are gone."""
    return [each for each in (getattr(pipe, name, None) for name in CUSTOM.tokenizers) if each is not None]


def added_conditioning(model: torch.nn.Module) -> str | None:
    """What a denoiser reads beside text and timestep: one of `families.CONDITIONINGS`, or what its configuration calls it."""
    model = plain_module(model)
    if hasattr(model, "use_additional_conditions"):  # transformers of PixArt, which take the argument in any case
        return "resolution"
    return getattr(model.config, "addition_embed_type", None)


def latent_multiple(model: torch.nn.Module) -> int:
    """What height and width of the latents are multiples of: a UNet halves them from level to level, a transformer cuts patches."""
    config = plain_module(model).config
    return config.patch_size if hasattr(config, "patch_size") else 2 ** (len(config.block_out_channels) - 1)


def prepared_text(pipe: Any, text: str | list[str], clean: bool = False) -> str | list[str]:
    """A text, or several, as the pipeline gives it to the tokenizer: some write it small, and clean it when asked to."""
    prepare = getattr(pipe, "_text_preprocessing", None)
    if prepare is None:
        return text
    prepared = prepare(text, clean_caption=clean)
    return prepared[0] if isinstance(text, str) else prepared


def text_length(pipe: Any) -> int:
    """T, how many tokens the pipeline encodes of a text, if it is told nothing else."""
    asked = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length") if hasattr(pipe, "encode_prompt") else None
    return tokenizers(pipe)[0].model_max_length if asked is None else asked.default


def text_width(encoder: torch.nn.Module) -> int:
    """The width of the encoder's input embeddings, which is that of its output."""
    return plain_module(encoder).get_input_embeddings().embedding_dim


def text_encoding_width(model: torch.nn.Module) -> int | list[int]:
    """The width of the encodings that the cross-attention layers of a denoiser read, as its configuration says."""
    reads = plain_module(model).config.cross_attention_dim
    return list(reads) if isinstance(reads, (list, tuple)) else reads
