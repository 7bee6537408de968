"""The families of models that concepts are made for: everything that differs between them, one record each.

A family is decided by the widths of its text encoders and of what its cross-attention reads. Adding one is a `register` and its
tests: `tests/perfusion/test_families.py` holds every record against what the rest of the package does with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["CUSTOM", "FAMILIES", "CheckpointFile", "Family", "family_by_encoding_dim", "family_by_id", "family_by_widths", "register"]


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """How the family looks as one .safetensors file in its original layout.

    layer         a cross-attention layer that every model of the family has
    text_weights  a weight of each text encoder
    pipelines     channels that the UNet takes -> name of the diffusers pipeline
    prediction    what models of so many channels predict, where nothing says it; noise by default
    zero_snr      whether models that predict velocity were trained down to no signal at all
    """

    layer: str
    text_weights: tuple[str, ...]
    pipelines: Mapping[int, str]
    prediction: Mapping[int, str] = dataclasses.field(default_factory=dict)
    zero_snr: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of text-to-image models.

    id                  what concept files say, such as "sd1"
    title               its name for people
    text_widths         width of each text encoder, in the order in which their outputs are concatenated; () for any
    text_encoders       the pipeline's attributes that hold them; tokenizers have the same ending
    encoding_dim        D, the width that the cross-attention layers read: the sum of the above, unless the model projects the text
    added_conditioning  what the denoiser reads beside text and timestep: its `addition_embed_type`, "resolution" (`CONDITIONINGS`), or None
    default_size        side of a picture in pixels; None where only the model's configuration says it
    architecture        id in the Stability AI model metadata standard, to which concept files add "/perfusion"
    file_bytes          no concept file in half precision is larger, whatever its fields hold; None without such a promise
    denoiser            the pipeline's attribute that holds the model with the cross-attention layers
    embeddings          names under which one file holds a textual inversion for each text encoder; () for one encoder
    checkpoint          the family as one file, or None
    steps               of a picture, where nobody says how many
    guidance_scale      likewise
    """

    id: str
    title: str
    text_widths: tuple[int, ...]
    text_encoders: tuple[str, ...]
    encoding_dim: int | None
    added_conditioning: str | None
    default_size: int | None
    architecture: str
    file_bytes: int | None
    denoiser: str = "unet"
    embeddings: tuple[str, ...] = ()
    checkpoint: CheckpointFile | None = None
    steps: int = 50
    guidance_scale: float = 6.0

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The pipeline's attributes that hold the tokenizers of the text encoders."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


FAMILIES: dict[str, Family] = {}

# What a denoiser may read beside text and timestep, and how it is called: no more, the pooled text with the sizes of the picture
# (Stable Diffusion XL), or the size and shape of the picture (PixArt at 1024 pixels)
CONDITIONINGS = (None, "text_time", "resolution")


def register(family: Family) -> Family:
    """Make a family known. ValueError where its id, or what it is decided by, is taken, or it asks for what nobody gives."""
    if family.added_conditioning not in CONDITIONINGS:
        raise ValueError(f"family {family.id!r}: added_conditioning must be one of {CONDITIONINGS}, got {family.added_conditioning!r}")
    if len(family.text_widths) not in (0, len(family.text_encoders)):
        raise ValueError(f"family {family.id!r}: {len(family.text_encoders)} text encoders have {len(family.text_widths)} widths")
    for other in FAMILIES.values():
        if other.id == family.id or (other.text_widths, other.encoding_dim) == (family.text_widths, family.encoding_dim):
            raise ValueError(f"family {family.id!r} has the id or the widths of {other.id!r}")
    FAMILIES[family.id] = family
    return family


_ONE, _TWO = ("text_encoder",), ("text_encoder", "text_encoder_2")

register(
    Family(
        "sd1", "Stable Diffusion 1.x", (768,), _ONE, 768, None, 512, "stable-diffusion-v1", 2**15,
        checkpoint=CheckpointFile(
            "input_blocks.1.1",
            ("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",),
            {4: "StableDiffusionPipeline", 9: "StableDiffusionInpaintPipeline"},
        ),
    )
)  # fmt: skip
register(
    Family(
        "sd2", "Stable Diffusion 2.x", (1024,), _ONE, 1024, None, 768, "stable-diffusion-v2", 2**15 + 2**12,
        checkpoint=CheckpointFile(
            "input_blocks.1.1",
            ("cond_stage_model.model.positional_embedding",),
            {4: "StableDiffusionPipeline", 9: "StableDiffusionInpaintPipeline"},
            {4: "v_prediction"},
        ),
    )
)  # fmt: skip
register(
    Family(
        "sdxl", "Stable Diffusion XL", (768, 1280), _TWO, 2048, "text_time", 1024, "stable-diffusion-xl-v1-base", 3 * 2**16,
        embeddings=("clip_l", "clip_g"),
        checkpoint=CheckpointFile(
            "input_blocks.4.1",
            (
                "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
                "conditioner.embedders.1.model.positional_embedding",
            ),
            {4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"},
            zero_snr=True,
        ),
    )
)  # fmt: skip
# α and Σ read T5-XXL through a projection of their own; what a concept was learned with is told by the fingerprint
register(
    Family(
        "pixart", "PixArt-α and PixArt-Σ", (4096,), _ONE, 1152, "resolution", 1024, "pixart", 5 * 2**14,
        denoiser="transformer", steps=20, guidance_scale=4.5,
    )
)  # fmt: skip
# ChatGLM3-6B's states, projected to the width that XL's layers read
register(Family("kolors", "Kolors", (4096,), _ONE, 2048, "text_time", 1024, "kolors", 3 * 2**16, guidance_scale=5.0))
# the model that comes with the package; its colours burn out at the guidance of the large ones
register(Family("toybox", "toybox", (96,), _ONE, 96, None, 128, "toybox", 2**12, steps=25, guidance_scale=2.5))

CUSTOM = Family("custom", "a custom model", (), _TWO, None, None, None, "custom", None, embeddings=FAMILIES["sdxl"].embeddings)


def family_by_widths(text_widths: tuple[int, ...], encoding_dim: int | None = None) -> Family:
    """The family of these text encoders, whose cross-attention reads `encoding_dim` numbers, by default their sum; CUSTOM where none is."""
    reads = sum(text_widths) if encoding_dim is None else encoding_dim
    found = (family for family in FAMILIES.values() if (family.text_widths, family.encoding_dim) == (tuple(text_widths), reads))
    return next(found, CUSTOM)


def family_by_encoding_dim(encoding_dim: int) -> Family:
    """The family whose text encoders give this width, for a model without them; CUSTOM where none does."""
    found = (each for each in FAMILIES.values() if each.encoding_dim == sum(each.text_widths) == encoding_dim)
    return next(found, CUSTOM)


def family_by_id(id: str) -> Family:
    """The family of this id. KeyError for an unknown one."""
    return CUSTOM if id == CUSTOM.id else FAMILIES[id]
