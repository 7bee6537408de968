"""Which rows of a batch of encodings hold concepts.

Pipelines cut, repeat, join and cast what `encode_prompt` gave them, and drop whatever is attached to it. An address or an
object may be reused, the bytes of an encoding may not: so a row is known by its content.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfusion.prompts import Mention

__all__ = ["KnownRows", "RowEdit"]

REMEMBERED = 4096  # digests, about three per row
CASTS = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class RowEdit:
    """The concepts of one row of an encoding, and the row that gives the keys under the global lock [T, D], if any."""

    mentions: tuple[Mention, ...]
    key_encoding: Tensor | None = None


class KnownRows:
    """The rows that were encoded with concepts, the last few thousand of them."""

    def __init__(self) -> None:
        self._edits: OrderedDict[bytes, list[RowEdit | None]] = OrderedDict()
        self._sources = WeakTensorKeyDictionary()  # a tensor that encode_prompt returned -> what it taught

    def __bool__(self) -> bool:
        return bool(self._edits)

    def remember(self, parts: Sequence[tuple[Tensor, Sequence[RowEdit | None]]]) -> None:
        """Learn the rows of encodings [R, T, D], each with its RowEdit or None.

        parts: in the order in which the pipeline will stack them. A row is known again after a cast to float32, float16
        or bfloat16 and back as well. Content that now comes without any concept is forgotten.
        """
        fresh: dict[bytes, list[RowEdit | None]] = {}
        for encodings, edits in parts:
            for row, edit in zip(encodings.detach().cpu(), edits, strict=True):
                for key in {_digest(row.to(dtype)) for dtype in CASTS}:
                    fresh.setdefault(key, []).append(edit)
        for encodings, _ in parts:
            self._sources[encodings] = fresh
        self._learn(fresh)

    def recall(self, encodings: Tensor | None) -> None:
        """A tensor that was learned earlier is used again: what it taught goes before what came since."""
        if encodings is not None:
            self._learn(self._sources.get(encodings, {}))

    def find(self, encodings: Tensor) -> dict[int, RowEdit]:
        """row -> RowEdit for the rows of encodings [R, T, D] that hold concepts.

        Rows of equal content, which differ in the gate's settings only, take their edits in the order in which they were
        learned: the rows of a batch keep it, with or without guidance, and repeat it where a pipeline doubles them.
        """
        if not self._edits:
            return {}
        seen: dict[bytes, int] = {}
        found = {}
        for row, encoding in enumerate(encodings.detach().cpu()):
            key = _digest(encoding)
            edits = self._edits.get(key)
            if edits is not None:
                count = seen[key] = seen.get(key, -1) + 1
                edit = edits[count % len(edits)]
                if edit is not None:
                    found[row] = edit
        return found

    def forget(self, name: str) -> None:
        """Forget every row that holds the concept."""
        for known in (self._edits, *self._sources.values()):
            held = {key: {mention.name for edit in filter(None, edits) for mention in edit.mentions} for key, edits in known.items()}
            for key in [key for key, names in held.items() if name in names]:
                del known[key]

    def _learn(self, fresh: dict[bytes, list[RowEdit | None]]) -> None:
        for key, edits in fresh.items():
            self._edits.pop(key, None)
            if any(edits):
                self._edits[key] = edits
        while len(self._edits) > REMEMBERED:
            self._edits.popitem(last=False)


def _digest(row: Tensor) -> bytes:
    """The identity of one encoding [T, D] on the CPU: its numbers, in whatever type they come."""
    return hashlib.blake2b(row.float().flatten().view(torch.uint8).numpy(), digest_size=16).digest()
