"""`ClientConcepts`: the concepts that one client of an engine can name, those that it loaded itself and those of a store.

A pipeline's handle and a UNet without a pipeline share it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence

import torch

from perfusion.base import Base
from perfusion.concept import Concept, check_name
from perfusion.concept_store import ConceptStore, Lease
from perfusion.edit import BankPlace, Tables, tables_of
from perfusion.loaded_concept import LoadedConcept
from perfusion_kernels import ConceptBank

__all__ = ["ClientConcepts", "HeldConcepts"]


class ClientConcepts(Mapping[str, LoadedConcept]):
    """name -> LoadedConcept. Iteration goes over those that were loaded; ids of the store are found by `in` and `[]` alone.

    A concept of the store that is looked up stays in its place until `begin_prompt` is called in the same thread again.
    """

    def __init__(self, base: Base, capacity: int, store: ConceptStore | None = None):
        if store is not None and (reason := store.base.mismatch(base)) is not None:
            raise ValueError(f"the store cannot be used here: its concepts are {reason}")
        self.base, self.store = base, store
        self._bank = ConceptBank(capacity, base.encoding_dim, base.outputs)
        self._loaded: dict[str, LoadedConcept] = {}  # replaced, never changed, so that a thread may go through it
        self._changing = threading.Lock()
        self._prompt = threading.local()

    def __bool__(self) -> bool:
        """Whether any concept can be named."""
        return bool(self._loaded) or self.store is not None

    def __len__(self) -> int:
        return len(self._loaded)

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def items(self) -> ItemsView[str, LoadedConcept]:
        """As they are now: others may be loaded or unloaded meanwhile."""
        return self._loaded.items()

    def __contains__(self, name: object) -> bool:
        return name in self._loaded or (self.store is not None and name in self.store)

    def __getitem__(self, name: str) -> LoadedConcept:
        """ConceptUnavailable where the store cannot give it."""
        if (loaded := self._loaded.get(name)) is not None:
            return loaded
        if self.store is None or name not in self.store:
            raise KeyError(name)
        if (lease := getattr(self._prompt, "lease", None)) is None:
            lease = self._prompt.lease = self.store.lease(())
        lease.add(name)
        return lease[name]

    def is_loaded(self, name: str) -> bool:
        """Whether it was loaded here, and is no id of the store."""
        return name in self._loaded

    def loaded(self, name: str) -> LoadedConcept:
        """One that was loaded here. ValueError."""
        known = self._loaded
        if name not in known:
            raise ValueError(f"no concept named {name!r} is loaded; loaded are: {', '.join(sorted(known)) or 'none'}")
        return known[name]

    def load(
        self, concept: str | os.PathLike[str] | Concept, name: str | None, user: str, check: Callable[[str, Concept], None]
    ) -> str:
        """Make a concept known under a name, by default its own; returns the name. A failure changes nothing.

        user: what it is loaded for, in errors. check: what else it must pass, given its name. ValueError as `Handle.load`.
        """
        concept = concept if isinstance(concept, Concept) else Concept.load(concept)
        name = concept.name if name is None else name
        check_name(name)
        reason = concept.base.mismatch(self.base)
        if reason is not None:
            raise ValueError(f"concept {concept.name!r} cannot be used with this {user}: {reason}")
        check(name, concept)
        vectors = {"target": concept.target, "metric_target": concept.metric_target, "superclass": concept.superclass_encoding}
        loaded = LoadedConcept(concept.superclass, concept.word_embeddings, concept, bias=concept.bias, temperature=concept.temperature)
        with self._changing:
            self._bank.add(name, **vectors, value_output=concept.value_outputs)
            self._loaded = {**self._loaded, name: loaded}
        return name

    def unload(self, name: str) -> None:
        """Forget a concept that was loaded here, and free its place."""
        with self._changing:
            self.loaded(name)
            self._bank.remove(name)
            self._loaded = {other: loaded for other, loaded in self._loaded.items() if other != name}

    def begin_prompt(self) -> None:
        """Concepts of the store that this thread looked up for its last prompt may leave their places."""
        if self.store is not None:
            self._prompt.lease = None

    def hold(self, names: Sequence[str]) -> HeldConcepts:
        """Concepts for as long as the result lives. ConceptUnavailable."""
        lease = None if self.store is None else self.store.lease(name for name in names if name not in self._loaded)
        return HeldConcepts(self, names, lease)

    def nbytes(self) -> int:
        """Of the bank of those that were loaded here."""
        bank = self._bank
        tables = (bank.targets, bank.metric_targets, bank.superclasses, bank.value_outputs, bank.value_targets)
        return sum(table.nbytes for table in tables)


class HeldConcepts:
    """The concepts of a batch, in their places until this is forgotten."""

    def __init__(self, client: ClientConcepts, names: Sequence[str], lease: Lease | None):
        self._names, self._lease, self._store, self._bank = list(names), lease, client.store, client._bank
        self._loaded = {name: client.loaded(name) if client.is_loaded(name) else lease[name] for name in names}
        self._places = [self._place(name) if client.is_loaded(name) else lease.place(name) for name in names]

    def _place(self, name: str) -> BankPlace:
        return BankPlace(self._bank, self._bank.slot(name), self._loaded[name].concept.key_outputs)

    def __getitem__(self, name: str) -> LoadedConcept:
        return self._loaded[name]

    def tables(self, device: torch.device) -> Tables:
        """The concepts' tables, in the order of the names."""
        if self._store is None:
            return tables_of(self._places, device)
        with self._store.bank_in_order():
            return tables_of(self._places, device)

    def require_independent(self, rows: Sequence[Sequence[str]]) -> None:
        """ValueError where a row names a concept twice, or such that are copies of each other or nearly so."""
        bank = self._bank
        if self._lease is not None and any(len(row) > 1 for row in rows):  # of several banks, so in one of their own
            tables, nothing = self.tables(torch.device("cpu")), torch.zeros(1)
            bank = ConceptBank(len(self._names), tables.targets.shape[1], 1)
            for name, *vectors in zip(self._names, tables.targets, tables.metric_targets, tables.superclasses):
                bank.add(name, **dict(zip(("target", "metric_target", "superclass"), vectors)), value_output=nothing)
        try:
            bank.index([row for row in rows if len(row) > 1])
        except ValueError as error:
            raise ValueError(f"{str(error).removeprefix('ConceptBank: ')}. Write only one of them in a prompt.") from None
