"""`Base`: what a concept was made for, and what a pipeline is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from perfusion.base.fingerprint import fingerprint_vectors, fingerprints_match
from perfusion.families import family_by_id, family_by_widths

__all__ = ["Base"]


@dataclasses.dataclass(frozen=True)
class Base:
    """What a concept was made for, and what a pipeline is.

    family         id of a family, or "custom": decided by the widths
    encoding_dim   D, the width of the encodings that cross-attention reads
    text_widths    width of each text encoder; they concatenate to D, unless the denoiser projects the text
    layers         cross-attention layer -> d_l, in the order of `cross_attention_layers`
    text_encoder   fingerprint of the text encoders' weights; "" for a pipeline without them
    """

    family: str
    encoding_dim: int
    text_widths: tuple[int, ...]
    layers: Mapping[str, int]
    text_encoder: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_widths", tuple(self.text_widths))
        object.__setattr__(self, "layers", dict(self.layers))
        if self.encoding_dim < 1 or not self.text_widths or min(self.text_widths) < 1:
            raise ValueError(f"Base: encoding_dim and text_widths must be positive, got {self.encoding_dim} and {self.text_widths}")
        expected = family_by_widths(self.text_widths, self.encoding_dim).id
        if self.family != expected:
            widths = f"text widths {self.text_widths} and an encoding_dim of {self.encoding_dim}"
            raise ValueError(f"Base: family must be {expected!r} for {widths}, got {self.family!r}")
        if not self.layers or any(width < 1 for width in self.layers.values()):
            raise ValueError(f"Base: layers must name at least one layer, of positive width, got {self.layers}")
        if self.text_encoder and len(fingerprint_vectors(self.text_encoder)) != len(self.text_widths):
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
        name = family_by_id(self.family).title
        widths = " + ".join(str(width) for width in self.text_widths)
        plural = "" if len(self.layers) == 1 else "s"
        return f"{name} (text width {widths}, {len(self.layers)} cross-attention layer{plural}, {self.outputs:,} outputs)"

    def mismatch(self, other: Base) -> str | None:
        """None when a concept made for this base works on `other`; otherwise one sentence that names both and says why."""
        reason = self._difference(other)
        return None if reason is None else f"made for {self}, but this is {other}: {reason}."

    def _difference(self, other: Base) -> str | None:
        unknown = not (self.text_encoder and other.text_encoder)
        if self.encoding_dim != other.encoding_dim or (self.text_widths != other.text_widths and not unknown):
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
        if not unknown and not fingerprints_match(self.text_encoder, other.text_encoder):
            return "the shapes agree, but the text encoder's weights are not the ones the concept was trained with"
        return None


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
