"""`ConceptStore`: far more concepts than a device holds. An index of files, and the few in use in a bank on the device.

    store = ConceptStore.of(pipe, capacity=1000)              # places on the device
    store.register("alice/teddy", "alice/teddy.safetensors")  # checks the file; nothing stays in memory but where it is
    store.register("bob/teddy", "bob/bear.safetensors")
    perfusion.attach(pipe, store=store)
    pipe([Request("a <teddy>", names={"teddy": "alice/teddy"}), Request("a <teddy>", names={"teddy": "bob/teddy"})])

A prompt reaches a concept of the store through `Request.names` alone, so no prompt can name what its request was not given. A concept
that is absent is read and checked outside of every lock, by the thread that asks for it, and takes the place of the one whose last
use is longest ago. A `Lease` keeps concepts in their places; encodings that were drawn with hold one while they are alive. A server takes a
lease per request before it forms a batch: what is wrong with a file is then raised for the request that wants it, and for no other.

Files are read, not mapped: one has 4 MB at most, and a mapped file that somebody cuts short ends the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from perfusion.base import Base, describe_base
from perfusion.concept import Concept
from perfusion.concept_file import read_bytes
from perfusion.concept_index import ConceptIndex, Entry
from perfusion.edit import BankPlace
from perfusion.loaded_concept import LoadedConcept
from perfusion_kernels import ConceptBank

__all__ = ["ConceptStore", "ConceptUnavailable", "Lease", "StoreFull"]

MAX_ID = 256  # characters


class ConceptUnavailable(ValueError):
    """A concept that the store cannot give: not registered, its file gone, damaged or exchanged, or of another base. id: which."""

    def __init__(self, id: str, reason: str):
        super().__init__(f"concept {id!r} cannot be used: {reason}")
        self.id, self.reason = id, reason


class StoreFull(ConceptUnavailable):
    """Every place is pinned; it may work later."""


@dataclasses.dataclass(eq=False)
class _Resident:
    """A concept in the bank. pins: one entry for each lease, as lists are written without a lock."""

    id: str
    digest: bytes
    loaded: LoadedConcept
    place: BankPlace
    pins: list[None] = dataclasses.field(default_factory=list)


class Lease:
    """Concepts that stay in their places until `close`, which also happens when the lease is forgotten. A context manager."""

    def __init__(self, store: ConceptStore):
        self._store = store
        self._held: dict[str, _Resident] = {}

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __contains__(self, id: str) -> bool:
        return id in self._held

    def __getitem__(self, id: str) -> LoadedConcept:
        """What prompts need of a concept; treat it as read-only."""
        return self._held[id].loaded

    def add(self, id: str) -> None:
        """Hold another concept, which is loaded if it is absent. ConceptUnavailable."""
        if id not in self._held:
            self._held[id] = self._store._pin(id)

    def place(self, id: str) -> BankPlace:
        """Where its vectors are."""
        return self._held[id].place

    def close(self) -> None:
        """Let the concepts give up their places when others need them."""
        while self._held:
            self._held.popitem()[1].pins.pop()  # no lock: a collection of garbage may come here in the midst of anything


class ConceptStore:
    """Concepts of one base by id: any number of them registered, `capacity` at once on the device.

    base: that all are for. device, dtype: of the bank's value vectors; float16 halves its memory and is exact for files in float16.
    index: a file of SQLite that keeps what is registered; None: it is kept in memory. IndexFileError. read: location -> the bytes of a
    file, at most 4 MB; by default the location is a path. It may raise anything, and is called by several threads. threads: that
    `prefetch` reads with. Safe to use from several threads.
    """

    def __init__(
        self,
        base: Base,
        *,
        capacity: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        index: str | os.PathLike[str] | None = None,
        read: Callable[[str], bytes] = read_bytes,
        threads: int = 2,
    ):
        self.base, self.capacity = base, capacity
        self._bank = ConceptBank(capacity, base.encoding_dim, base.outputs, device=device, dtype=dtype)
        self._index = ConceptIndex(base, index)
        self._read, self._threads = read, threads
        self._lock = threading.RLock()
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._leaving: list[_Resident] = []  # unregistered or exchanged while pinned: they have places, and no id
        self._loading: dict[str, threading.Event] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._used: Any = None  # event of the bank's last use on a CUDA device
        self.loads = self.hits = self.evictions = 0

    @classmethod
    def of(cls, pipe: Any, **options: Any) -> ConceptStore:
        """A store for a pipeline: its base, and by default its device. Options as of the class."""
        return cls(describe_base(pipe, text_required=False), **{"device": pipe._execution_device, **options})

    # what is registered

    def register(self, id: str, location: str | os.PathLike[str]) -> None:
        """Check a concept's file and keep where it is. A registered id is given the new file. ConceptUnavailable says what is wrong."""
        refused = self.register_all([(id, location)])
        for error in refused.values():
            raise error

    def register_all(self, files: Iterable[tuple[str, str | os.PathLike[str]]]) -> dict[str, ConceptUnavailable]:
        """Register many pairs (id, location) at once; returns id -> what is wrong for those that were refused.

        A location that several ids share is read once.
        """
        refused: dict[str, ConceptUnavailable] = {}
        entries: dict[str, Entry] = {}
        checked: dict[str, bytes | str] = {}  # location -> digest, or a reason
        for id, location in files:
            location = os.fspath(location)
            if not isinstance(id, str) or not 0 < len(id) <= MAX_ID or not id.isprintable():
                refused[id] = ConceptUnavailable(id, f"an id must be 1 to {MAX_ID} printable characters")
                continue
            if location not in checked:
                try:
                    checked[location] = self._checked(Entry(id, location, b""))[1]
                except ConceptUnavailable as error:
                    checked[location] = error.reason
            if isinstance(checked[location], str):
                refused[id] = ConceptUnavailable(id, checked[location])
            else:
                entries[id] = Entry(id, location, checked[location])
        with self._lock:
            self._index.put(entries.values())
            for id, entry in entries.items():
                resident = self._residents.get(id)
                if resident is not None and resident.digest != entry.digest:
                    self._retire(resident)
        return refused

    def unregister(self, id: str) -> None:
        """Forget a concept. Leases that hold it keep it until they end. ConceptUnavailable if it is not registered."""
        with self._lock:
            if not self._index.remove(id):
                raise ConceptUnavailable(id, "it is not registered")
            if id in self._residents:
                self._retire(self._residents[id])

    def __len__(self) -> int:
        """How many are registered."""
        return len(self._index)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and (id in self._residents or id in self._index)

    def __iter__(self) -> Iterator[str]:
        """The ids of all that are registered."""
        return iter(self._index)

    # what is on the device

    def lease(self, ids: Iterable[str]) -> Lease:
        """Hold concepts in their places; absent ones are loaded by this thread. ConceptUnavailable, and nothing is held."""
        lease = Lease(self)
        try:
            for id in ids:
                lease.add(id)
        except BaseException:
            lease.close()
            raise
        return lease

    def prefetch(self, ids: Iterable[str]) -> Future[Lease]:
        """`lease` by a thread of the store's own; an event loop awaits it with `asyncio.wrap_future`."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, "perfusion-store")
            return self._pool.submit(self.lease, list(ids))

    def resident(self) -> list[str]:
        """The ids of those on the device, least recently used first."""
        with self._lock:
            return list(self._residents)

    def memory(self) -> dict[str, int]:
        """Bytes: of the bank on the device, of words in host memory, of the index."""
        bank = self._bank
        tables = (bank.targets, bank.metric_targets, bank.superclasses, bank.value_outputs, bank.value_targets)
        with self._lock:
            words = sum(word.nbytes for resident in self._residents.values() for word in resident.loaded.embeddings)
        return {"bank": sum(each.nbytes for each in tables if each is not None), "words": words, "index": self._index.nbytes}

    def close(self) -> None:
        """End the threads of `prefetch` and close the index."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._index.close()

    @contextlib.contextmanager
    def bank_in_order(self) -> Iterator[None]:
        """Around reads and writes of the bank: after those before, also where threads use several streams of the device."""
        with self._lock:
            cuda = self._bank.targets.device.type == "cuda"
            if cuda and self._used is not None:
                torch.cuda.current_stream(self._bank.targets.device).wait_event(self._used)
            yield
            if cuda:
                self._used = torch.cuda.current_stream(self._bank.targets.device).record_event()

    def _pin(self, id: str) -> _Resident:
        while True:
            with self._lock:
                resident = self._residents.get(id)
                if resident is not None:
                    self._residents.move_to_end(id)
                    resident.pins.append(None)
                    self.hits += 1
                    return resident
                loading = self._loading.get(id)
                if loading is None:
                    mine = self._loading[id] = threading.Event()
            if loading is not None:
                loading.wait()  # what comes of it is looked up, or tried again: each request has an error of its own
                continue
            try:
                resident = self._load(id)
                if resident is not None:
                    return resident
            finally:
                with self._lock:
                    del self._loading[id]
                mine.set()

    def _load(self, id: str) -> _Resident | None:
        """A concept that is absent, pinned once; None where its entry was changed meanwhile."""
        entry = self._index.get(id)
        if entry is None:
            raise ConceptUnavailable(id, "it is not registered")
        concept, digest = self._checked(entry)
        if digest != entry.digest:
            raise ConceptUnavailable(id, "its file is another one than was registered. Register it anew.")
        with self._lock:
            if self._index.get(id) != entry:
                return None
            self._make_room(id)
            vectors = {"target": concept.target, "metric_target": concept.metric_target, "superclass": concept.superclass_encoding}
            with self.bank_in_order():
                slot = self._bank.add(**vectors, value_output=concept.value_outputs)
            # the rest of the concept is let go: its vectors are in the bank
            loaded = LoadedConcept(concept.superclass, concept.word_embeddings, bias=concept.bias, temperature=concept.temperature)
            place = BankPlace(self._bank, slot, concept.key_outputs)
            resident = self._residents[id] = _Resident(id, digest, loaded, place, [None])
            self.loads += 1
            return resident

    def _checked(self, entry: Entry) -> tuple[Concept, bytes]:
        """The concept in a file from wherever, and the file's digest. ConceptUnavailable."""
        try:
            data = self._read(entry.location)
        except Exception as error:
            raise ConceptUnavailable(entry.id, f"its file cannot be read: {error}") from error
        try:
            concept = Concept.from_bytes(data, source=entry.location)
        except ValueError as error:
            raise ConceptUnavailable(entry.id, str(error)) from error
        reason = concept.base.mismatch(self.base)
        if reason is not None:
            raise ConceptUnavailable(entry.id, reason)
        return concept, hashlib.blake2b(data, digest_size=16).digest()

    def _make_room(self, id: str) -> None:
        for resident in [each for each in self._leaving if not each.pins]:
            self._leaving.remove(resident)
            self._clear(resident)
        if len(self._residents) + len(self._leaving) < self.capacity:
            return
        idle = next((each for each in self._residents.values() if not each.pins), None)
        if idle is None:
            raise StoreFull(id, f"all {self.capacity} places on the device are in use; it may work later, or with a larger capacity")
        self.evictions += 1
        self._retire(idle)

    def _retire(self, resident: _Resident) -> None:
        """Its id names it no longer; its place is free once nobody holds it."""
        del self._residents[resident.id]
        if resident.pins:
            self._leaving.append(resident)
        else:
            self._clear(resident)

    def _clear(self, resident: _Resident) -> None:
        with self.bank_in_order():
            self._bank.remove(resident.place.slot)
