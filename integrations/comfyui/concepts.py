"""What the nodes hand to one another: concepts with their settings, and where they stand in a conditioning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import Tensor

from perfusion import Concept
from perfusion.prompts import check_settings

KEY = "perfusion"  # of a conditioning's dictionary, beside "pooled_output"


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A concept and how it is set. region [H, W] in [0, 1], any size, or None: where in the picture it may be."""

    concept: Concept
    strength: float = 1.0
    bias: float | None = None
    temperature: float | None = None
    region: Tensor | None = None

    @property
    def name(self) -> str:
        return self.concept.name

    def change(self, **changes: object) -> Loaded:
        check_settings(f"<{self.name}>", **{key: value for key, value in changes.items() if key != "region"})
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A concept in one conditioning. encodings [n, D]: what the text encoders made of its word, at each of its n places."""

    loaded: Loaded
    encodings: Tensor


def joined(*lists: Sequence[Loaded]) -> list[Loaded]:
    """ValueError for two concepts of one name, or of different models."""
    found: dict[str, Loaded] = {}
    for each in (each for part in lists for each in part):
        if each.name in found and found[each.name].concept is not each.concept:
            raise ValueError(f"two concepts are called <{each.name}>, and prompts cannot tell them apart. Train one under another name.")
        found[each.name] = each
    first = next(iter(found.values()), None)
    for each in found.values():
        reason = first.concept.base.mismatch(each.concept.base)
        if reason is not None:
            raise ValueError(f"<{first.name}> and <{each.name}> are of different models and cannot be combined: {reason}")
    return list(found.values())


def chosen(concepts: Sequence[Loaded], name: str) -> list[str]:
    """The concepts that a node's `name` means: all of them where it is left empty. ValueError for one that is not there."""
    names = [each.name for each in concepts]
    wanted = name.strip().strip("<>").lower()
    if wanted and wanted not in names:
        raise ValueError(f"there is no concept <{wanted}>; loaded are: {', '.join(f'<{each}>' for each in names) or 'none'}.")
    return [wanted] if wanted else names


def changed(concepts: Sequence[Loaded], name: str, **changes: object) -> list[Loaded]:
    names = chosen(concepts, name)
    return [each.change(**changes) if each.name in names else each for each in concepts]


def uses_of(conditioning: Iterable) -> list[Use]:
    return [use for _, options in conditioning for use in options.get(KEY, ())]
