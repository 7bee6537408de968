"""What a diffusers pipeline is made of, as far as a concept is concerned.

A concept is a set of vectors for one *base*: text encoders of certain widths and weights, and a UNet with certain
cross-attention layers. This module finds those parts, describes them (`describe_base`), tells two bases apart
(`Base.mismatch`) and refuses by name what Perfusion cannot edit (`check_supported`).

Nothing here changes a pipeline, and importing this module does not import diffusers.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

__all__ = [
    "Base",
    "UnsupportedPipeline",
    "check_supported",
    "cross_attention_layers",
    "describe_base",
    "fingerprints_match",
    "layer_width",
    "text_encoder_fingerprint",
    "text_encoders",
]

SUPPORTED = (
    "Supported are pipelines with a UNet2DConditionModel whose cross-attention reads the text encoders' output directly: "
    "Stable Diffusion 1.x, 2.x and XL, and models of their shape (image-to-image, inpainting and ControlNet included)."
)

# family -> (name for people, text widths)
FAMILIES: dict[str, tuple[str, tuple[int, ...]]] = {
    "sd1": ("Stable Diffusion 1.x", (768,)),
    "sd2": ("Stable Diffusion 2.x", (1024,)),
    "sdxl": ("Stable Diffusion XL", (768, 1280)),
}


class UnsupportedPipeline(ValueError):
    """A pipeline that Perfusion cannot edit. The message names the part that stands in the way and what is supported."""


# Parts of a pipeline


def _plain(module: Any) -> Any:
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
        for name, module in _plain(unet).named_modules()
        if getattr(module, "is_cross_attention", False) and hasattr(module, "to_v")
    }


def text_encoders(pipe: Any) -> list[tuple[Any, torch.nn.Module]]:
    """The (tokenizer, text encoder) pairs of a pipeline: one for SD 1.x and 2.x, two for SDXL, in concatenation order.

    Raises UnsupportedPipeline when there is none, or one without its tokenizer.
    """
    pairs = []
    for suffix in ("", "_2"):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}", None), getattr(pipe, f"tokenizer{suffix}", None)
        if encoder is None:
            continue
        if tokenizer is None:
            raise UnsupportedPipeline(f"{type(pipe).__name__} has a text_encoder{suffix} but no tokenizer{suffix}. Load both.")
        pairs.append((tokenizer, encoder))
    if not pairs:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} has no text encoder (text_encoder is None). "
            "A concept lives in the text encoder's output: load the pipeline with its text encoder and tokenizer."
        )
    return pairs


def _text_width(encoder: torch.nn.Module) -> int:
    return _plain(encoder).get_input_embeddings().embedding_dim


# The text encoder's fingerprint

_NUMBERS = 32  # projections per encoder
_ROWS = 256  # of each matrix; CLIP's first 256 tokens are its bytes, so tokens added later change nothing
_COLUMNS = 256
_SAME = 0.9  # cosine. Two unrelated encoders: 0 +- 0.18. A change of 20 % of the weights' norm: 0.98.


def _blocks(encoder: torch.nn.Module) -> list[torch.Tensor]:
    """The weights a fingerprint reads: the token embedding and the last layer's MLP, a fixed corner of each, on the CPU."""
    encoder = _plain(encoder)
    mlps = [module for name, module in encoder.named_modules() if name.rsplit(".", 1)[-1] == "mlp"]
    if not mlps:
        raise UnsupportedPipeline(f"{type(encoder).__name__} has no layer called 'mlp'. Supported are CLIP text models.")
    linears = [getattr(child, "base_layer", child) for child in mlps[-1].children()]
    weights = [encoder.get_input_embeddings().weight, *(m.weight for m in linears if hasattr(m, "weight"))]
    if any(weight.is_meta for weight in weights):
        raise UnsupportedPipeline(
            f"the weights of {type(encoder).__name__} are offloaded (on the meta device) and cannot be read. "
            "Describe the pipeline, or attach to it, before enable_sequential_cpu_offload()."
        )
    return [weight.detach()[:_ROWS, :_COLUMNS].to("cpu", torch.float64) for weight in weights]


def _signs(index: int, count: int) -> np.ndarray:
    """`count` numbers -1 or +1, the same on every machine: bits of SHAKE-256, not of a random generator."""
    stream = hashlib.shake_256(f"perfusion text encoder fingerprint 1:{index}".encode()).digest((count + 7) // 8)
    return np.unpackbits(np.frombuffer(stream, np.uint8), count=count).astype(np.float64) * 2 - 1


def _encoder_numbers(encoder: torch.nn.Module) -> bytes:
    """32 signed bytes: projections of the encoder's weights, scaled so that the largest is 127."""
    blocks = [block.numpy().ravel() for block in _blocks(encoder)]
    # Every matrix has the same say, whatever its scale.
    values = np.concatenate([block / max(np.linalg.norm(block), 1e-30) for block in blocks])
    numbers = np.array([values @ _signs(i, values.size) for i in range(_NUMBERS)])
    return np.rint(numbers * (127 / max(np.abs(numbers).max(), 1e-30))).astype(np.int8).tobytes()


def text_encoder_fingerprint(pipe: Any) -> str:
    """A short signature of the text encoders' weights, to be compared by `fingerprints_match`, never by `==`.

    Per encoder 32 random-sign projections of a fixed corner of the token embedding and of the last layer's MLP, as int8 in
    base64; two encoders are joined by ".". Projections keep angles, so loads of the same weights in other precisions and
    light fine-tunes stay close, and another encoder of the same shape does not. Raises UnsupportedPipeline when the
    weights are offloaded to the meta device.
    """
    return ".".join(base64.b64encode(_encoder_numbers(encoder)).decode("ascii") for _, encoder in text_encoders(pipe))


def _fingerprint_vectors(fingerprint: str) -> list[np.ndarray]:
    try:
        parts = [base64.b64decode(part, validate=True) for part in fingerprint.split(".")]
    except (binascii.Error, ValueError):
        parts = []
    if not parts or any(len(part) != _NUMBERS for part in parts):
        raise ValueError(f"not a text encoder fingerprint: {fingerprint[:120]!r}. Expected {_NUMBERS} bytes in base64 per encoder.")
    return [np.frombuffer(part, np.int8).astype(np.float64) for part in parts]


def fingerprints_match(a: str, b: str) -> bool:
    """Whether two fingerprints are of the same encoders, up to precision and light fine-tuning. ValueError on other text."""
    left, right = _fingerprint_vectors(a), _fingerprint_vectors(b)
    if len(left) != len(right):
        return False
    return all(x @ y >= _SAME * np.linalg.norm(x) * np.linalg.norm(y) and x.any() and y.any() for x, y in zip(left, right))


# The base


@dataclasses.dataclass(frozen=True)
class Base:
    """What a concept was made for, and what a pipeline is.

    family         "sd1", "sd2", "sdxl" or "custom": decided by the text widths
    encoding_dim   D, the width of the encoding that cross-attention reads
    text_widths    width of each text encoder; they concatenate to D
    layers         cross-attention layer -> d_l, in the order of `cross_attention_layers`
    text_encoder   fingerprint of the text encoders' weights
    """

    family: str
    encoding_dim: int
    text_widths: tuple[int, ...]
    layers: Mapping[str, int]
    text_encoder: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_widths", tuple(self.text_widths))
        object.__setattr__(self, "layers", dict(self.layers))
        expected = _family(self.text_widths)
        if self.family != expected:
            raise ValueError(f"Base: family must be {expected!r} for text widths {self.text_widths}, got {self.family!r}")
        if self.encoding_dim < 1 or self.encoding_dim != sum(self.text_widths):
            raise ValueError(f"Base: encoding_dim must be the sum of text_widths {self.text_widths}, got {self.encoding_dim}")
        if not self.layers or any(width < 1 for width in self.layers.values()):
            raise ValueError(f"Base: layers must name at least one layer, of positive width, got {self.layers}")
        if len(_fingerprint_vectors(self.text_encoder)) != len(self.text_widths):
            raise ValueError(f"Base: text_encoder must hold one fingerprint for each of {len(self.text_widths)} encoders")

    @property
    def outputs(self) -> int:
        """O: the outputs of all layers together."""
        return sum(self.layers.values())

    @property
    def slices(self) -> dict[str, slice]:
        """Where each layer's outputs lie in a vector [O]."""
        ends = np.cumsum(list(self.layers.values())).tolist()
        return {name: slice(end - width, end) for (name, width), end in zip(self.layers.items(), ends)}

    def __str__(self) -> str:
        name = FAMILIES[self.family][0] if self.family in FAMILIES else "a custom model"
        widths = " + ".join(str(width) for width in self.text_widths)
        plural = "" if len(self.layers) == 1 else "s"
        return f"{name} (text width {widths}, {len(self.layers)} cross-attention layer{plural}, {self.outputs:,} outputs)"

    def mismatch(self, other: Base) -> str | None:
        """None when a concept made for this base works on `other`; otherwise one sentence that names both and says why."""
        reason = self._difference(other)
        return None if reason is None else f"made for {self}, but this is {other}: {reason}."

    def _difference(self, other: Base) -> str | None:
        if self.text_widths != other.text_widths:
            return "the text encoders have other widths"
        if dict(self.layers) != dict(other.layers):
            missing = [name for name in self.layers if name not in other.layers]
            extra = [name for name in other.layers if name not in self.layers]
            if missing:
                return f"it lacks layer {missing[0]}{_and_more(missing)}"
            if extra:
                return f"it has layer {extra[0]}{_and_more(extra)} in addition"
            name = next(name for name in self.layers if self.layers[name] != other.layers[name])
            return f"layer {name} is {other.layers[name]} wide, not {self.layers[name]}"
        if list(self.layers) != list(other.layers):
            return "the cross-attention layers come in another order"
        if not fingerprints_match(self.text_encoder, other.text_encoder):
            return "the shapes agree, but the text encoder's weights are not the ones the concept was trained with"
        return None


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _family(text_widths: tuple[int, ...]) -> str:
    return next((family for family, (_, widths) in FAMILIES.items() if widths == tuple(text_widths)), "custom")


def describe_base(pipe: Any) -> Base:
    """The Base of a pipeline. Raises UnsupportedPipeline as `check_supported` does."""
    check_supported(pipe)
    widths = tuple(_text_width(encoder) for _, encoder in text_encoders(pipe))
    return Base(
        family=_family(widths),
        encoding_dim=sum(widths),
        text_widths=widths,
        layers={name: layer_width(layer) for name, layer in cross_attention_layers(pipe.unet).items()},
        text_encoder=text_encoder_fingerprint(pipe),
    )


# Refusals


def check_supported(pipe: Any) -> None:
    """Raises UnsupportedPipeline, naming the obstacle, unless every cross-attention layer of the pipeline can be edited."""
    reason = _unsupported_model(pipe) or _unsupported_processor(pipe.unet)
    if reason is not None:
        raise UnsupportedPipeline(f"{type(pipe).__name__} is not supported: {reason} {SUPPORTED}")
    encoders = [encoder for _, encoder in text_encoders(pipe)]
    widths, reads = [_text_width(encoder) for encoder in encoders], _plain(pipe.unet).config.cross_attention_dim
    if any(read != sum(widths) for read in (reads if isinstance(reads, (list, tuple)) else [reads])):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} is not supported: its text encoders give {' + '.join(map(str, widths))} numbers per token, "
            f"its UNet reads {reads}. Is a text encoder missing? {SUPPORTED}"
        )


def _unsupported_model(pipe: Any) -> str | None:
    from diffusers import UNet2DConditionModel

    unet = _plain(getattr(pipe, "unet", None))
    if unet is None and getattr(pipe, "transformer", None) is not None:
        kind = type(_plain(pipe.transformer)).__name__
        return f"it has a {kind}, a transformer that mixes text and image states in joint attention (as SD3 and Flux do)."
    if not isinstance(unet, UNet2DConditionModel):
        return "it has no UNet." if unet is None else f"its UNet is of type {type(unet).__name__}."
    conditioning, projection = unet.config.addition_embed_type, unet.config.encoder_hid_dim_type
    if conditioning not in (None, "text_time"):
        return f"its UNet has addition_embed_type={conditioning!r} (as DeepFloyd IF and Kandinsky do)."
    if projection == "ip_image_proj":
        return "an IP-Adapter is loaded. Call pipe.unload_ip_adapter() first."
    if projection is not None:
        return f"its UNet projects the text encodings itself (encoder_hid_dim_type={projection!r})."
    return None if cross_attention_layers(unet) else "its UNet has no cross-attention layer."


def _unsupported_processor(unet: torch.nn.Module) -> str | None:
    for name, module in _plain(unet).named_modules():
        processor = type(getattr(module, "processor", None)).__name__
        if "IPAdapter" in processor:
            return f"layer {name} has an IP-Adapter processor ({processor}). Call pipe.unload_ip_adapter() first."
        if "AddedKV" in processor or getattr(module, "added_kv_proj_dim", None) is not None:
            return f"layer {name} has added key and value projections ({processor}, as DeepFloyd IF and Kandinsky have)."
        # The processor decides: unfusing puts the old ones back and leaves the fused weights where they are, unused.
        if "Fused" in processor:
            return f"layer {name} has fused key and value projections ({processor}). Call pipe.unfuse_qkv_projections() first."
    return None
