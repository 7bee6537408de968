"""`FairQueue`: what waits, bounded, taken in turns by whom it is for."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Generic, TypeVar

__all__ = ["FairQueue", "Full"]

_Item = TypeVar("_Item")


class Full(Exception):
    """The queue, or one key's part of it, has no room."""


class FairQueue(Generic[_Item]):
    """Items of several keys. size: of all; size_per_key: of one."""

    def __init__(self, size: int, size_per_key: int | None = None):
        self.size, self.size_per_key = size, size_per_key or size
        self._waiting: collections.OrderedDict[str, collections.deque[_Item]] = collections.OrderedDict()  # next turn first

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, key: str, items: list[_Item]) -> None:
        """Put all items at the end of a key's line, or none: Full."""
        if len(self) + len(items) > self.size or len(self._waiting.get(key, ())) + len(items) > self.size_per_key:
            raise Full
        self._waiting.setdefault(key, collections.deque()).extend(items)

    def push_back(self, key: str, item: _Item) -> None:
        """Return an item that was taken to the head of its line, where there is always room."""
        self._waiting.setdefault(key, collections.deque()).appendleft(item)

    def pop(self, busy: Mapping[str, int]) -> tuple[str, _Item]:
        """The next item and its key: of the key with the least that is being worked on (`busy`), and of these in turns. KeyError."""
        if not self._waiting:
            raise KeyError("the queue is empty")
        key = min(self._waiting, key=lambda each: busy.get(each, 0))  # the first of the least
        line = self._waiting[key]
        item = line.popleft()
        self._waiting.move_to_end(key)
        if not line:
            del self._waiting[key]
        return key, item

    def remove(self, key: str, item: _Item) -> bool:
        """Take an item out of its line; whether it was there."""
        line = self._waiting.get(key)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._waiting[key]
        return True
