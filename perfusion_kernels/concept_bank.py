"""`ConceptBank`: the resident concepts, as tables at fixed addresses that the operators index."""

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .shape_checks import FLOATING, WIDE
from .validation import MAX_CONDITION, dependent_concepts

ROWS = {  # table: the argument of `add` that is one row of it
    "targets": "target",
    "metric_targets": "metric_target",
    "superclasses": "superclass",
    "value_outputs": "value_output",
    "value_targets": "value_target",
    "key_outputs": "key_output",
    "key_targets": "key_target",
}
OPTIONAL = ("value_target", "key_target")


def _rows(*rows: Tensor | None) -> dict[str, Tensor | None]:
    """By name, in the order of ROWS."""
    return dict(zip(ROWS.values(), rows, strict=True))


class ConceptBank:
    """Up to `capacity` = S concepts in tables that are allocated once and written in place.

    A captured CUDA graph or a compiled function that read the tables stays valid whatever is added,
    replaced or removed. A slot is a row number; a name, if given, is another way to say it. The bank
    holds every concept that is resident, and `index` says which of them a batch row uses.

    Tables (attributes):
        targets, metric_targets, superclasses [S, D]: i*, i* C⁻¹ and the superclass encoding; float32, or
            float64 if `dtype` is.
        value_outputs, value_targets [S, value_dim]: o*_V and W_V i*, all layers side by side; `dtype`.
        key_outputs, key_targets [S, key_dim]: o*_K and W_K i*; `dtype`; None unless key_dim is given.

    Args:
        capacity: S. encoding_dim: D. value_dim, key_dim: columns of the value and key tables.
        max_condition: what `index` accepts as independent concepts, see `validate_concepts`.

    Not safe for concurrent writes, nor for writing while the device still reads: `add`, `replace` and
    `remove` are ordered with other work only within one stream.
    """

    def __init__(
        self,
        capacity: int,
        encoding_dim: int,
        value_dim: int,
        *,
        key_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        max_condition: float = MAX_CONDITION,
    ):
        for name, size in (("capacity", capacity), ("encoding_dim", encoding_dim), ("value_dim", value_dim)):
            if size < 1:
                raise ValueError(f"ConceptBank: {name} must be at least 1; got {size}")
        if key_dim is not None and key_dim < 1:
            raise ValueError(f"ConceptBank: key_dim must be at least 1, or None for no key tables; got {key_dim}")
        if dtype not in FLOATING:
            raise ValueError(f"ConceptBank: dtype must be float16, bfloat16, float32 or float64; got {dtype}")
        wide = dtype if dtype in WIDE else torch.float32

        def table(width: int, dtype: torch.dtype) -> Tensor:
            with torch.inference_mode(False):  # an inference tensor could not be written later
                return torch.zeros(capacity, width, dtype=dtype, device=device)

        self.capacity = capacity
        self.max_condition = max_condition
        self.targets = table(encoding_dim, wide)
        self.metric_targets = table(encoding_dim, wide)
        self.superclasses = table(encoding_dim, wide)
        self.value_outputs = table(value_dim, dtype)
        self.value_targets = table(value_dim, dtype)
        self.key_outputs = None if key_dim is None else table(key_dim, dtype)
        self.key_targets = None if key_dim is None else table(key_dim, dtype)
        self._free = list(range(capacity))  # a heap: the lowest free slot is taken first
        self._names: dict[int, str | None] = {}  # slot -> name
        self._slots: dict[str, int] = {}  # name -> slot
        self._independent: set[frozenset[int]] = set()  # sets of slots that `index` has found independent

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, concept: int | str) -> bool:
        return concept in (self._slots if isinstance(concept, str) else self._names)

    def __iter__(self) -> Iterator[int]:
        """The slots in use, in ascending order."""
        return iter(sorted(self._names))

    def __repr__(self) -> str:
        return f"ConceptBank({len(self)} of {self.capacity} slots: {', '.join(map(self.describe, self)) or 'empty'})"

    def slot(self, concept: int | str) -> int:
        """The slot of a concept given by name or slot; ValueError if the bank holds none such."""
        if concept not in self:
            held = ", ".join(map(self.describe, self)) or "nothing"
            raise ValueError(f"ConceptBank: no concept {concept!r} here (removed, or never added); it holds {held}")
        return self._slots[concept] if isinstance(concept, str) else concept

    def describe(self, slot: int) -> str:
        """The concept's name in quotes, or "slot 3" if it has none."""
        name = self._names.get(slot)
        return f"slot {slot}" if name is None else repr(name)

    def add(
        self,
        name: str | None = None,
        *,
        target: Tensor,
        metric_target: Tensor,
        superclass: Tensor,
        value_output: Tensor,
        value_target: Tensor | None = None,
        key_output: Tensor | None = None,
        key_target: Tensor | None = None,
    ) -> int:
        """Writes one concept into the lowest free slot and returns the slot.

        Each tensor is one row of the table of that name, of any floating dtype and device; key rows belong
        to a bank with key tables only. A caller that edits encodings, e - Aᵀa, and so never reads W i*, may
        leave out value_target and key_target: their rows are then NaN, which shows if they are read after all.

        Raises ValueError, and changes nothing, when the bank is full, the name is taken, a row is missing,
        a width is wrong, a value is not finite in the table's dtype, or the energy i*·C⁻¹i* is not positive.
        """
        if not self._free:
            raise ValueError(f"ConceptBank: all {self.capacity} slots are in use; remove one or make a larger bank")
        if name in self._slots:
            raise ValueError(f"ConceptBank: slot {self._slots[name]} has the name {name!r}; replace or remove it")
        rows = _rows(target, metric_target, superclass, value_output, value_target, key_output, key_target)
        slot = self._free[0]
        self._write(slot, "a new concept" if name is None else repr(name), rows)
        heapq.heappop(self._free)
        self._names[slot] = name
        if name is not None:
            self._slots[name] = slot
        return slot

    def replace(
        self,
        concept: int | str,
        *,
        target: Tensor | None = None,
        metric_target: Tensor | None = None,
        superclass: Tensor | None = None,
        value_output: Tensor | None = None,
        value_target: Tensor | None = None,
        key_output: Tensor | None = None,
        key_target: Tensor | None = None,
    ) -> None:
        """Overwrites rows of a concept in its slot; what is not given stays. Checks as `add` does.

        target and metric_target come together. value_target and key_target follow from target: if they are
        not given with a new one, their rows become NaN, as in `add`.
        """
        slot = self.slot(concept)
        if (target is None) != (metric_target is None):
            raise ValueError(
                f"ConceptBank: target and metric_target of {self.describe(slot)} must be replaced together"
            )
        rows = _rows(target, metric_target, superclass, value_output, value_target, key_output, key_target)
        for name, table in self._tables().items():
            if table is None or rows[ROWS[name]] is not None:
                continue
            unknown = ROWS[name] in OPTIONAL and (target is not None or table[slot].isnan().any())
            rows[ROWS[name]] = None if unknown else table[slot]
        self._write(slot, self.describe(slot), rows)

    def remove(self, concept: int | str) -> None:
        """Zeroes the concept's rows and frees its slot and name.

        An index tensor made before still names the slot, and then gives values that are not finite, or the
        concept that took the slot: call `index` again.
        """
        slot = self.slot(concept)
        for table in self._tables().values():
            if table is not None:
                table[slot].zero_()
        self._forget(slot)
        name = self._names.pop(slot)
        if name is not None:
            del self._slots[name]
        heapq.heappush(self._free, slot)

    def index(self, rows: Sequence[Sequence[int | str]], width: int | None = None) -> Tensor:
        """The operators' `index` [B, J], int32 on the bank's device, for B lists of slots or names.

        width: J, at least the longest list, which is the default; shorter lists are filled up with -1. Keep it
            fixed over calls where a graph was captured or compiled.

        Raises ValueError when a concept is unknown or removed, appears twice in a row, when a list is
        longer than width, or when the concepts of a row are nearly dependent; the error names them. A set
        of two or more concepts that the bank has not seen together reads their rows from the device.
        """
        slots = [[self.slot(concept) for concept in row] for row in rows]
        longest = max(map(len, slots), default=0)
        width = longest if width is None else width
        if longest > width:
            raise ValueError(f"ConceptBank: a row uses {longest} concepts, more than the width of {width}")
        for row in slots:
            self._require_independent(row)
        padded = [row + [-1] * (width - len(row)) for row in slots]
        return torch.tensor(padded, dtype=torch.int32, device=self.targets.device).reshape(len(rows), width)

    def _require_independent(self, row: list[int]) -> None:
        members = frozenset(row)
        if len(members) < len(row):
            twice = next(slot for slot in row if row.count(slot) > 1)
            raise ValueError(f"ConceptBank: a row may use a concept once; {self.describe(twice)} appears again")
        if len(row) < 2 or members in self._independent:
            return
        dependent = dependent_concepts(self.targets[row].cpu(), self.metric_targets[row].cpu(), self.max_condition)
        if dependent:
            raise ValueError(
                f"ConceptBank: {', '.join(self.describe(row[i]) for i in dependent)} cannot share a prompt: they"
                f" are copies of each other or nearly so (Gram condition above {self.max_condition:g})"
            )
        self._independent.add(members)

    def _write(self, slot: int, concept: str, rows: dict[str, Tensor | None]) -> None:
        """Checks all rows, then writes them."""
        tables = self._tables()
        new = {name: _row(concept, ROWS[name], table, rows[ROWS[name]]) for name, table in tables.items()}
        energy = (new["targets"].double() @ new["metric_targets"].double()).item()
        if not energy > 0:
            raise ValueError(
                f"ConceptBank: the energy target · metric_target of {concept} must be positive; got {energy:g}:"
                " the covariance is not positive definite, or metric_target is not target @ C⁻¹"
            )
        for name, table in tables.items():
            if table is not None:
                table[slot].copy_(new[name])
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        self._independent = {members for members in self._independent if slot not in members}

    def _tables(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in ROWS}


def _row(concept: str, argument: str, table: Tensor | None, row: Tensor | None) -> Tensor | None:
    """The row in its table's dtype and device; ValueError if it does not fit."""
    if table is None:
        if row is not None:
            raise ValueError(f"ConceptBank: {argument} of {concept} must not be given: the bank has no key tables")
        return None
    if row is None and argument in OPTIONAL:
        return table.new_full(table.shape[1:], float("nan"))
    if row is None:
        raise ValueError(f"ConceptBank: {argument} of {concept} must be given; got None")
    if row.shape != table.shape[1:]:
        raise ValueError(
            f"ConceptBank: {argument} of {concept} must have shape {list(table.shape[1:])}; got {list(row.shape)}"
        )
    row = row.detach().to(table)
    if not row.isfinite().all():
        raise ValueError(f"ConceptBank: {argument} of {concept} must be finite in {table.dtype}")
    return row
