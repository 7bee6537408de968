"""What one row of a batch wants: `Request` is a prompt that says it, `RowRequest` what was understood."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.loaded_concept import Schedule
from perfusion.prompts import Mention, PromptError
from perfusion.settings import GATES, KEY_LOCKS, SETTINGS, one_of

__all__ = ["Request", "RowRequest", "check_schedule", "joined"]


class Request(str):
    """A prompt, and beside its text what the row of the batch wants. A `str`, so it goes wherever a prompt goes.

        pipe([Request("a <teddy> next to a <teapot>", regions={"teddy": left, "teapot": right}, gate="word"), "a cat"])

    names: how the prompt calls concepts -> the names under which they are loaded, so that two users may both write <teddy>.
    strength, bias, temperature: for all concepts of the prompt, or name -> value; each a number, a list with one number a
    step, the last of which holds on, or a function of the step, which counts from 0. What the prompt's text sets goes before
    them, and they go before `handle.set`. key_lock: "local" or "global". gate: "similarity" or "word".
    regions: name -> mask [H, W] of any size, where values above a half say where in the picture the concept acts: image tokens
    outside it do not attend to the concept's word. PromptError says which of them breaks which rule.
    """

    names: Mapping[str, str]
    settings: Mapping[str, Any]
    key_lock: str | None
    gate: str | None
    regions: Mapping[str, Tensor]

    def __new__(
        cls,
        text: str,
        *,
        names: Mapping[str, str] | None = None,
        strength: Schedule | Mapping[str, Schedule] | None = None,
        bias: Schedule | Mapping[str, Schedule] | None = None,
        temperature: Schedule | Mapping[str, Schedule] | None = None,
        key_lock: str | None = None,
        gate: str | None = None,
        regions: Mapping[str, Any] | None = None,
    ) -> Request:
        self = super().__new__(cls, text)
        self.names, self.key_lock, self.gate = {own.lower(): name for own, name in (names or {}).items()}, key_lock, gate
        given = {"strength": strength, "bias": bias, "temperature": temperature}
        by_name = {key: isinstance(value, Mapping) and {name.lower(): each for name, each in value.items()} for key, value in given.items()}
        self.settings = {key: by_name[key] or value for key, value in given.items() if value is not None}
        where = f"request {text!r}"
        for key, value in self.settings.items():
            for each in value.values() if isinstance(value, Mapping) else [value]:
                check_schedule(where, key, each)
        for key, value, allowed in (("key_lock", key_lock, KEY_LOCKS), ("gate", gate, GATES)):
            if value is not None and value not in allowed:
                raise PromptError(f"{where}: {key} must be {one_of(allowed)}, got {value!r}.")
        self.regions = {name.lower(): _mask(where, name, mask) for name, mask in (regions or {}).items()}
        return self

    def setting(self, key: str, name: str) -> Schedule | None:
        """What the request sets for a concept, by the name that its prompt uses; None if nothing."""
        value = self.settings.get(key)
        return value.get(name) if isinstance(value, Mapping) else value

    def check_names(self, known: Collection[str]) -> None:
        """PromptError if a setting or a region is for a name that no prompt could write here."""
        given = {f"sets {key}": value for key, value in self.settings.items() if isinstance(value, Mapping)}
        for what, named in {**given, "sets a region": self.regions}.items():
            unknown = [name for name in named if name not in known]
            if unknown:
                there = ", ".join(f"<{name}>" for name in sorted(known)) or "none"
                raise PromptError(f"request {str(self)!r} {what} for <{unknown[0]}>, which is no concept here; there are: {there}.")


def check_schedule(where: str, key: str, value: Any) -> None:
    """PromptError, beginning with `where`, unless a value is a number in the setting's range, a list of such, or a function."""
    setting = SETTINGS[key]
    several = isinstance(value, Sequence) and not isinstance(value, str)
    if callable(value) or (several and value and all(setting.holds(each) for each in value)) or setting.holds(value):
        return
    kind = "a list of one number a step, each" if several else "a number"
    raise PromptError(f"{where}: {key} must be {kind} between {setting.low:g} and {setting.high:g}, got {value!r}.")


def _mask(where: str, name: str, mask: Any) -> Tensor:
    tensor = torch.as_tensor(mask)
    if tensor.dim() != 2 or not tensor.numel():
        raise PromptError(f"{where}: the region of <{name}> must be a mask [H, W], got shape {list(tensor.shape)}.")
    tensor = tensor.detach().to("cpu", torch.float32)
    if not tensor.isfinite().all() or not (tensor > 0.5).any():
        raise PromptError(f"{where}: the region of <{name}> must have finite values, some of them above 0.5: there <{name}> acts.")
    return tensor


@dataclasses.dataclass(frozen=True, eq=False)
class RowRequest:
    """The concepts of one row of an encoding.

    mentions      which concepts, with what prompt and request set for them
    places        for each mention the positions of its word in the encoding; () where they are not known
    key_encoding  [T, D], the row that gives all keys under the global lock, or None
    gate          "similarity", "word", or None: as each concept is set
    regions       for each mention its mask [H, W], or None
    """

    mentions: tuple[Mention, ...]
    places: tuple[tuple[int, ...], ...] = ()
    key_encoding: Tensor | None = None
    gate: str | None = None
    regions: tuple[Tensor | None, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", self.places or ((),) * len(self.mentions))
        object.__setattr__(self, "regions", self.regions or (None,) * len(self.mentions))


def joined(parts: Sequence[tuple[int, RowRequest | None]]) -> RowRequest | None:
    """The request of an encoding that was joined of several, each (its first position, its request)."""
    mentions: dict[str, Mention] = {}
    places: dict[str, list[int]] = {}
    regions: dict[str, Tensor | None] = {}
    found = [(first, request) for first, request in parts if request is not None]
    for first, request in found:
        for mention, own, region in zip(request.mentions, request.places, request.regions):
            mentions.setdefault(mention.name, mention)
            places.setdefault(mention.name, []).extend(first + place for place in own)
            regions.setdefault(mention.name, region)
    if not found:
        return None
    if len(parts) == 1 and found[0][0] == 0:
        return found[0][1]
    return RowRequest(
        tuple(mentions.values()), tuple(tuple(each) for each in places.values()), None, found[0][1].gate, tuple(regions.values())
    )
