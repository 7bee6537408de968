"""What concepts do to text encodings: the part of an edit that all layers share.

The edit of a layer is (arXiv 2305.01644, eq. 3 and 4; DESIGN.md, "What the hook computes")

    K = W_K (e - Aᵀa + Σ_j g_j s_j)         one edited encoding serves the keys of all layers: the key lock
    V = W_V (e - Aᵀa) + Σ_j g_j o*_V,j      one edited encoding for the values, and an update of the outputs per layer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

import perfusion_kernels

__all__ = ["BankPlace", "EditedText", "RowSettings", "Tables", "edit_encodings", "gates_of", "spread", "tables_of"]


@dataclasses.dataclass
class Tables:
    """The concepts of a set of rows: S concepts in a bank's layout.

    targets, metric_targets, superclasses [S, D]; value_outputs [S, O]; key_outputs [S, O] of the concepts whose keys were
    trained without the lock, and unlocked [S] bool saying which those are, or None for neither.
    """

    targets: Tensor
    metric_targets: Tensor
    superclasses: Tensor
    value_outputs: Tensor
    key_outputs: Tensor | None = None
    unlocked: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class BankPlace:
    """Where a concept's vectors are: a slot of a bank. key_outputs [O]: of keys that were trained without the lock, or None."""

    bank: perfusion_kernels.ConceptBank
    slot: int
    key_outputs: Tensor | None = None


def tables_of(places: Sequence[BankPlace], device: torch.device) -> Tables:
    """The tables of some concepts alone, in that order, as copies: banks may hold many that a prompt does not use."""

    def table(name: str) -> Tensor:
        rows = [getattr(place.bank, name)[place.slot] for place in places]
        if len({(row.device, row.dtype) for row in rows}) > 1:
            rows = [row.to(device, torch.float32) for row in rows]
        rows = torch.stack(rows).to(device)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    tables = Tables(*map(table, ("targets", "metric_targets", "superclasses", "value_outputs")))
    keys = [place.key_outputs for place in places]
    if any(key is not None for key in keys):
        tables.unlocked = torch.tensor([key is not None for key in keys], device=device)
        tables.key_outputs = torch.zeros_like(tables.value_outputs)
        for row, key in zip(tables.key_outputs, keys):
            if key is not None:
                row.copy_(key)
    return tables


@dataclasses.dataclass
class RowSettings:
    """Which concepts each of n rows has, and how they are set.

    index [n, J] int32 into the tables, -1 for none; bias, temperature, strength [n, J] float32. Strength scales the whole
    edit of a concept: 0 leaves the row as it is. places [n, J, P] int32 and floor [n, J]: gates by word, see `concept_gates`.
    The concepts of a row must be independent; `ClientConcepts.require_independent` refuses others.
    """

    index: Tensor
    bias: Tensor
    temperature: Tensor
    strength: Tensor
    places: Tensor | None = None
    floor: Tensor | None = None


@dataclasses.dataclass(eq=False)
class EditedText:
    """What `to_k` and `to_v` are to read, and the gates that open the outputs added to what they give.

    keys, values [n, T, D]; gates [n, T, J] of the value outputs; key_gates [n, T, J] of the key outputs, or None under the
    key lock. All float32 at least.
    """

    keys: Tensor
    values: Tensor
    gates: Tensor
    key_gates: Tensor | None


def gates_of(encodings: Tensor, tables: Tables, rows: RowSettings) -> tuple[Tensor, Tensor]:
    """Gates and components [n, T, J] of encodings [n, T, D], both scaled by strength; 0 where index is -1."""
    gates, components = perfusion_kernels.concept_gates(
        encodings, tables.targets, tables.metric_targets, rows.index, rows.bias, rows.temperature, places=rows.places, floor=rows.floor
    )
    return gates * rows.strength[:, None], components * rows.strength[:, None]


def edit_encodings(encodings: Tensor, tables: Tables, rows: RowSettings) -> EditedText:
    """The edit of encodings [n, T, D]. Computed in at least float32, under autocast too; differentiable."""
    wide = torch.promote_types(encodings.dtype, torch.float32)
    with torch.autocast(encodings.device.type, enabled=False):
        gates, components = (each.to(wide) for each in gates_of(encodings, tables, rows))
        values = encodings.to(wide) - spread(components, tables.targets, rows.index)
        locked, key_gates = gates, None
        if tables.unlocked is not None:
            unlocked = tables.unlocked[rows.index.clamp(min=0).long()][:, None]
            locked, key_gates = gates.masked_fill(unlocked, 0), gates.masked_fill(~unlocked, 0)
        return EditedText(values + spread(locked, tables.superclasses, rows.index), values, gates, key_gates)


def spread(coefficients: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Σ_j coefficients[r, T, j] · table[index[r, j]]: [r, T, n]."""
    return torch.einsum("rtj,rjn->rtn", coefficients, table[index.clamp(min=0).long()].to(coefficients.dtype))
