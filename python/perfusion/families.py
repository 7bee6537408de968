"""The families of models that concepts are made for: everything that differs between them, one record each.

A family is decided by the widths of its text encoders. Adding one is an entry of `FAMILIES` and its tests.
"""

from __future__ import annotations

import dataclasses

__all__ = ["CUSTOM", "FAMILIES", "Family", "family_by_id", "family_by_widths", "family_by_encoding_dim"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of text-to-image models.

    id                  what concept files say, such as "sd1"
    title               its name for people
    text_widths         width of each text encoder, in the order in which their outputs are concatenated; () for any
    text_encoders       the pipeline's attributes that hold them; tokenizers have the same ending
    added_conditioning  what the UNet reads beside the encodings: its `addition_embed_type`, or None
    default_size        side of a picture in pixels; None where only the model's configuration says it
    architecture        id in the Stability AI model metadata standard, to which concept files add "/perfusion"
    """

    id: str
    title: str
    text_widths: tuple[int, ...]
    text_encoders: tuple[str, ...]
    added_conditioning: str | None
    default_size: int | None
    architecture: str

    @property
    def encoding_dim(self) -> int:
        """D, the width of the encodings that cross-attention reads."""
        return sum(self.text_widths)


_ONE, _TWO = ("text_encoder",), ("text_encoder", "text_encoder_2")
FAMILIES = (
    Family("sd1", "Stable Diffusion 1.x", (768,), _ONE, None, 512, "stable-diffusion-v1"),
    Family("sd2", "Stable Diffusion 2.x", (1024,), _ONE, None, 768, "stable-diffusion-v2"),
    Family("sdxl", "Stable Diffusion XL", (768, 1280), _TWO, "text_time", 1024, "stable-diffusion-xl-v1-base"),
)
CUSTOM = Family("custom", "a custom model", (), _TWO, None, None, "custom")

# what a UNet that can be edited may read beside the encodings
CONDITIONINGS = tuple(dict.fromkeys(family.added_conditioning for family in (CUSTOM, *FAMILIES)))


def family_by_widths(text_widths: tuple[int, ...]) -> Family:
    """The family of these text encoders; CUSTOM where none has them."""
    return next((family for family in FAMILIES if family.text_widths == tuple(text_widths)), CUSTOM)


def family_by_encoding_dim(encoding_dim: int) -> Family:
    """The family whose encodings have this width, for a pipeline without text encoders; CUSTOM where none has."""
    return next((family for family in FAMILIES if family.encoding_dim == encoding_dim), CUSTOM)


def family_by_id(id: str) -> Family:
    """The family of this id. KeyError for an unknown one."""
    return {family.id: family for family in (*FAMILIES, CUSTOM)}[id]
