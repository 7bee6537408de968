"""`Plan`: what one batch of encodings wants, in tables that the operators take. `Client`: who says so. `GivenRows`: a batch without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from perfusion.client_concepts import HeldConcepts
from perfusion.edit import RowSettings, Tables
from perfusion.loaded_concept import Schedule, value_at
from perfusion.prompts import Mention, PromptError
from perfusion.requests import RowRequest, check_schedule
from perfusion.settings import SETTINGS, WORD_GATE_FLOOR

__all__ = ["Client", "GivenRows", "Plan"]


class Client(Protocol):
    """Who has concepts in a UNet."""

    exact: bool

    def rows_of(self, encodings: Tensor) -> dict[int, RowRequest]:
        """row -> what it wants, for the rows of encodings [R, T, D] that hold concepts of this client."""

    def hold(self, names: list[str]) -> HeldConcepts:
        """The concepts that requests name, for as long as the result lives."""

    def has_concepts(self) -> bool:
        """Whether any concept is loaded and enabled."""

    def doubt(self, encodings: Tensor, rows: Sequence[int]) -> None:
        """Rows of encodings that no client knows."""

    def compiled(self) -> bool:
        """Whether code that was compiled runs the UNet, which hooks that come later do not reach."""


@dataclasses.dataclass(eq=False)
class GivenRows:
    """Keys and values of a batch that somebody else keeps, row by row: see `Engine.give`.

    keys, values [R, T, O] of all layers side by side; query_regions and key_regions as `perfusion.regions` makes them, or None.
    """

    keys: Tensor
    values: Tensor
    query_regions: dict[int, Tensor] | None = None
    key_regions: Tensor | None = None


class Plan:
    """What one tensor of encodings needs.

    number: of all plans; an id() may be that of another, once it is gone. client, rows: who knows which rows, and row -> request.
    contents: for each row the first row of equal content and request. names: of the concepts, in the order of `tables`. scheduled:
    whether a setting follows the steps. locked: whether a row takes its keys from another encoding. held: keeps the concepts in
    their places. least: how many places for concepts a row has at least. slots, regions: the fast path's, where the rows' keys and values
    are and what reads them.
    """

    def __init__(self, encodings: Tensor, number: int):
        # an inference tensor counts no versions, so a later change in place is noticed by a copy
        self._stamp: int | Tensor = encodings.clone() if encodings.is_inference() else encodings._version
        self.number = number
        self.client: Client | None = None
        self.rows: dict[int, RowRequest] = {}
        self.contents: list[int] = []
        self.names: list[str] = []
        self.scheduled = self.locked = self.regional = False
        self.held: HeldConcepts | None = None
        self.least = 1
        self.slots: list[int] = []
        self.regions: tuple[Any, ...] = ()
        self._tables: Tables | None = None

    def is_of(self, encodings: Tensor) -> bool:
        """Whether the tensor that it was made for has not been written since."""
        return torch.equal(encodings, self._stamp) if isinstance(self._stamp, Tensor) else encodings._version == self._stamp

    def describe(self, encodings: Tensor, client: Client, rows: dict[int, RowRequest]) -> None:
        """Take what a client says of the rows. ValueError for concepts that cannot share a row, ConceptUnavailable."""
        self.client, self.rows = client, rows
        self.least = 2 if client.compiled() else 1  # a graph of one place is for one alone, and one of two may be for any number
        mentions = [mention for request in rows.values() for mention in request.mentions]
        self.names = list(dict.fromkeys(mention.name for mention in mentions))
        self.held = client.hold(self.names)
        self.held.require_independent([[mention.name for mention in request.mentions] for request in rows.values()])
        content = [row.float().numpy().tobytes() for row in encodings.detach().cpu()]
        first: dict[Any, int] = {}
        self.contents = [first.setdefault((each, id(rows.get(row))), row) for row, each in enumerate(content)]
        self.locked = any(request.key_encoding is not None for request in rows.values())
        self.regional = any(region is not None for request in rows.values() for region in request.regions)
        self.scheduled = any(_is_schedule(self._setting(mention, key)) for mention in mentions for key in SETTINGS)

    def tables_on(self, device: torch.device) -> Tables:
        """The concepts' tables, made at the first call."""
        if self._tables is None:
            self._tables = self.held.tables(device)
        return self._tables

    def settings(self, rows: Sequence[int], step: int, device: torch.device) -> RowSettings:
        """The settings of some rows of the batch at a step."""
        requests = [self.rows.get(row) for row in rows]
        width = max([self.least, *(len(request.mentions) for request in requests if request is not None)])
        width = 1 << (width - 1).bit_length()  # few different shapes, so few compiled graphs

        def table(value_of: Any, empty: float, dtype: torch.dtype = torch.float32) -> Tensor:
            counts = [0 if request is None else len(request.mentions) for request in requests]
            values = [[value_of(request, number) for number in range(count)] for request, count in zip(requests, counts)]
            return torch.tensor([each + [empty] * (width - len(each)) for each in values], dtype=dtype, device=device)

        def setting(key: str) -> Any:
            return lambda request, number: self._value(request.mentions[number], key, max(step, 0))

        settings = RowSettings(
            table(lambda request, number: self.names.index(request.mentions[number].name), -1, torch.int32),
            table(setting("bias"), 0.0),
            table(setting("temperature"), 1.0),
            table(setting("strength"), 0.0),
        )
        settings.places, settings.floor = self._places(requests, width, device)
        return settings

    def _setting(self, mention: Mention, key: str) -> Schedule:
        own = getattr(mention, key)
        return getattr(self.held[mention.name], key) if own is None else own

    def _value(self, mention: Mention, key: str, step: int) -> float:
        """A setting at a step. PromptError for what a function must not return; numbers and lists were checked when they were given."""
        schedule = self._setting(mention, key)
        if not callable(schedule):
            return value_at(schedule, step)
        try:
            value = value_at(schedule, step)
        except (TypeError, ValueError) as error:
            raise PromptError(f"<{mention.name}>: the function that is its {key} returned no number at step {step} ({error}).") from None
        check_schedule(f"<{mention.name}> at step {step}", key, value)
        return value

    def _places(self, requests: list[RowRequest | None], width: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The concepts' words, in rows whose gates go by them."""
        by_word = [
            request is not None and (request.gate or self.held[request.mentions[0].name].gate) == "word" and all(request.places)
            for request in requests
        ]
        if not any(by_word):
            return None, None
        places = [request.places if word else () for word, request in zip(by_word, requests)]
        longest = max(len(each) for row in places for each in row)
        filled = [[list(each) + [-1] * (longest - len(each)) for each in row] + [[-1] * longest] * (width - len(row)) for row in places]
        floor = [[WORD_GATE_FLOOR] * len(row) + [0.0] * (width - len(row)) for row in places]
        return torch.tensor(filled, dtype=torch.int32, device=device), torch.tensor(floor, device=device)


def _is_schedule(value: Schedule) -> bool:
    return callable(value) or isinstance(value, Sequence)
