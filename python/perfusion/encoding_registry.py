"""Which rows of a batch of encodings hold concepts: the encodings that were made with a prompt, known again wherever they come.

Pipelines cut, repeat, join and cast what `encode_prompt` gave them, and drop whatever is attached to it; users scale, weight,
join and store it. So a row is known by what it says, in this order:

1. by its exact content, which also tells rows of one batch apart that differ in settings only (by their order);
2. by the direction of its tokens: nearly all have the cosine of a remembered row's, the concept's words included. That survives
   scaling, weighting of single words, casts, files, and joining several encodings of T tokens to one of a multiple of T.

What neither finds must be bound by hand (`Handle.bind`).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfusion.requests import RowRequest, joined

__all__ = ["EncodingRegistry"]

REMEMBERED = 4096  # rows known by their content
RECENT = 128  # rows known by the direction of their tokens
SAME = 0.999  # cosine of a token that was scaled, cast to as little as float8, or stored
# Share of a row's tokens that must be the same, and least cosine at the concept's own words, which may be weighted. On toybox (bench/
# recognition.py) the share is .91 and more with three words weighted, and up to .97 with the plain superclass in the concept's place,
# whose cosine there is at most .88; that of the concept's word stays above .94 unless it was moved towards the row's mean.
ALIKE = 0.9


class EncodingRegistry:
    """The rows that were encoded with concepts, the last few thousand of them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._requests: OrderedDict[bytes, list[RowRequest | None]] = OrderedDict()
        self._directions: OrderedDict[bytes, Tensor] = OrderedDict()  # content -> [T, D] float16, each token of length 1
        self._lock = threading.Lock()
        self._sources = WeakTensorKeyDictionary()  # a tensor that encode_prompt returned -> what it taught

    def __bool__(self) -> bool:
        with self._lock:
            return any(any(requests) for requests in self._requests.values())

    def remember(self, parts: Sequence[tuple[Tensor, Sequence[RowRequest | None]]]) -> None:
        """Learn the rows of encodings [R, T, D], each with its RowRequest or None.

        parts: in the order in which the pipeline will stack them. Content that now comes without any concept is known as such.
        """
        fresh: dict[bytes, tuple[Tensor, list[RowRequest | None]]] = {}
        for encodings, requests in parts:
            for row, request in zip(encodings.detach().cpu(), requests, strict=True):
                fresh.setdefault(_digest(row), (row, []))[1].append(request)
        with self._lock:
            for encodings, _ in parts:
                self._sources[encodings] = fresh
            self._learn(fresh)

    def recall(self, encodings: Tensor | None) -> None:
        """A tensor that was learned earlier is used again: what it taught goes before what came since."""
        if encodings is not None:
            with self._lock:
                self._learn(self._sources.get(encodings, {}))

    def find(self, encodings: Tensor) -> dict[int, RowRequest]:
        """row -> RowRequest for the rows of encodings [R, T, D] that hold concepts.

        Rows of equal content, which differ in settings only, take their requests in the order in which they were learned: the
        rows of a batch keep it, with or without guidance, and repeat it where a pipeline doubles them.
        """
        if not self:
            return {}
        rows = encodings.detach().cpu()
        with self._lock:
            return self._find(rows)

    def _find(self, rows: Tensor) -> dict[int, RowRequest]:
        seen: dict[bytes, int] = {}
        found = {}
        for row, encoding in enumerate(rows):
            key = _digest(encoding)
            if key not in self._requests:
                parts = self._by_direction(encoding)
                if len(parts) > 1:
                    request = joined([(first, None if part is None else self._first(part)) for first, part in parts])
                    if request is not None:
                        found[row] = request
                if len(parts) != 1 or parts[0][1] is None:
                    continue
                key = parts[0][1]
            requests = self._requests[key]
            count = seen[key] = seen.get(key, -1) + 1
            request = requests[count % len(requests)]
            if request is not None:
                found[row] = request
        return found

    def known(self, row: Tensor) -> bool:
        """Whether the content of a row [T, D] was learned, with a concept or without."""
        return _digest(row.detach().cpu()) in self._requests

    def forget(self, name: str) -> None:
        """Forget every row that holds the concept."""

        def holds(requests: Sequence[RowRequest | None]) -> bool:
            return any(mention.name == name for request in filter(None, requests) for mention in request.mentions)

        with self._lock:
            for key in [key for key, requests in self._requests.items() if holds(requests)]:
                del self._requests[key]
                self._directions.pop(key, None)
            for known in self._sources.values():
                for key in [key for key, (_, requests) in known.items() if holds(requests)]:
                    del known[key]

    def _first(self, key: bytes) -> RowRequest | None:
        return next(filter(None, self._requests[key]), None)

    def _by_direction(self, encoding: Tensor) -> list[tuple[int, bytes | None]]:
        """(first position, content of the remembered row) for each part of an encoding [T', D] that has as many tokens as that row."""
        groups: dict[int, list[bytes]] = {}
        for key, directions in self._directions.items():
            if directions.shape[1] == encoding.shape[1] and len(encoding) % len(directions) == 0:
                groups.setdefault(len(directions), []).append(key)
        for length, keys in sorted(groups.items(), reverse=True):
            table = torch.stack([self._directions[key] for key in keys]).float()
            parts = [(first, self._nearest(_directions(part), keys, table)) for first, part in _parts(encoding, length)]
            if any(key is not None for _, key in parts):
                return parts
        return []

    def _nearest(self, directions: Tensor, keys: list[bytes], table: Tensor) -> bytes | None:
        cosines = (table * directions.float()).sum(-1)  # [remembered, T]
        alike = (cosines > SAME).float().mean(1)
        for number in torch.argsort(alike + cosines.mean(1) / 100, descending=True, stable=True)[:8].tolist():
            if alike[number] < ALIKE:
                return None
            request = self._first(keys[number])
            places = [place for own in request.places for place in own] if request is not None else []
            if all(cosines[number, place] > ALIKE for place in places):
                return keys[number]
        return None

    def _learn(self, fresh: dict[bytes, tuple[Tensor, list[RowRequest | None]]]) -> None:
        for key, (row, requests) in fresh.items():
            self._requests.pop(key, None)
            self._directions.pop(key, None)
            self._requests[key] = requests
            self._directions[key] = _directions(row).half()
        while len(self._requests) > REMEMBERED:
            self._requests.popitem(last=False)
        while len(self._directions) > RECENT:
            self._directions.popitem(last=False)
        for key in [key for key in self._directions if key not in self._requests]:
            del self._directions[key]


def _parts(encoding: Tensor, length: int) -> list[tuple[int, Tensor]]:
    return [(first, encoding[first : first + length]) for first in range(0, len(encoding), length)]


def _directions(row: Tensor) -> Tensor:
    return torch.nn.functional.normalize(row.detach().float(), dim=-1)


def _digest(row: Tensor) -> bytes:
    """The identity of one encoding [T, D] on the CPU: its numbers, in whatever type they come."""
    return hashlib.blake2b(row.float().flatten().view(torch.uint8).numpy(), digest_size=16).digest()
