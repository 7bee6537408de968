"""`Slots`: keys and values of all cross-attention layers for distinct rows of prompts, at addresses that stay.

A slot holds one row's K and V [T, O] of all layers side by side. A batch names slots by a device index, so what a prompt,
its concepts or their settings are compiles and captures nothing anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["Slots"]


class Slots:
    """P slots of T positions and O columns; P is the least power of two that held the largest batch so far.

    keys, values [P, T, O]: None before the first `write`.
    """

    def __init__(self, length: int, columns: int, device: torch.device):
        """length: T. columns: O. The dtype is that of what is written."""
        self.length, self.columns, self.device = length, columns, device
        self.capacity = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._held: OrderedDict[Hashable, int] = OrderedDict()  # what a slot holds, least recently used first

    def fits(self, length: int, device: torch.device) -> bool:
        return (self.length, self.device) == (length, device)

    def clear(self) -> None:
        """Nothing that is held counts any more; the memory stays."""
        self._held.clear()

    def place(self, rows: Sequence[Hashable]) -> tuple[list[int], dict[Hashable, int]]:
        """The slot of each row, and row -> slot for those that are still to be written."""
        distinct = list(dict.fromkeys(rows))
        if len(distinct) > self.capacity:
            self.capacity = max(2, 1 << (len(distinct) - 1).bit_length())
            self._held.clear()  # the tables that `write` makes anew hold nothing
        for row in distinct:
            if row in self._held:
                self._held.move_to_end(row)
        used, missing = set(self._held.values()), {}
        free = [slot for slot in range(self.capacity) if slot not in used]
        for row in distinct:
            if row not in self._held:
                slot = free.pop(0) if free else self._held.popitem(last=False)[1]
                self._held[row] = missing[row] = slot
        return [self._held[row] for row in rows], missing

    def write(self, slots: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """keys, values [n, T, O] into slots."""
        shape = (self.capacity, self.length, self.columns)
        if self.keys is None or self.keys.shape != shape or self.keys.dtype != keys.dtype:
            with torch.inference_mode(False):  # an inference tensor could not be written later
                self.keys, self.values = (torch.zeros(shape, device=self.device, dtype=keys.dtype) for _ in range(2))
            for table in (self.keys, self.values):
                torch._dynamo.mark_static_address(table)
        index = torch.tensor(slots, device=self.device)
        self.keys.index_copy_(0, index, keys.detach())
        self.values.index_copy_(0, index, values.detach())

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes
