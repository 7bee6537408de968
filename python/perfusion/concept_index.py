"""`ConceptIndex`: id -> where a concept's file is and what was in it when it was checked. In memory, or in a file of SQLite."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator

from perfusion.base import Base

__all__ = ["ConceptIndex", "Entry", "IndexFileError"]

APPLICATION = 0x50666378  # SQLite's mark of whose file it is


class IndexFileError(ValueError):
    """A file that is no index of concepts, is damaged, or is the index of another base."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One concept. location: what the store's `read` is given, a path by default. digest: BLAKE2b of the file, 16 bytes."""

    id: str
    location: str
    digest: bytes


class ConceptIndex:
    """Concepts of one base by id. path: the file that keeps them, made where there is none; None: they are kept in memory."""

    def __init__(self, base: Base, path: str | os.PathLike[str] | None = None):
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:" if path is None else os.fspath(path), check_same_thread=False, isolation_level=None)
        try:
            self._open(base)
        except (sqlite3.DatabaseError, IndexFileError) as error:
            self._database.close()
            raise IndexFileError(f"{os.fspath(path or ':memory:')}: {error}. Give another file, or register the concepts anew.") from None

    def _open(self, base: Base) -> None:
        made = json.dumps(dataclasses.asdict(base), sort_keys=True)
        mark = self._database.execute("PRAGMA application_id").fetchone()[0]
        if mark == 0 and not self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._database.execute(f"PRAGMA application_id = {APPLICATION}")
            self._database.execute("CREATE TABLE base (description TEXT)")
            self._database.execute("CREATE TABLE concepts (id TEXT PRIMARY KEY, location TEXT, digest BLOB) WITHOUT ROWID")
            self._database.execute("INSERT INTO base VALUES (?)", (made,))
            return
        if mark != APPLICATION:
            raise IndexFileError("this is a database of another program")
        damage = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise IndexFileError(f"the index is damaged ({damage})")
        rows = self._database.execute("SELECT description FROM base").fetchall()
        if rows != [(made,)]:
            raise IndexFileError("the index belongs to concepts of another base model")

    def __len__(self) -> int:
        return self._one("SELECT count(*) FROM concepts")[0]

    def __contains__(self, id: str) -> bool:
        return self.get(id) is not None

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            rows = self._database.execute("SELECT id FROM concepts ORDER BY id").fetchall()
        return (row[0] for row in rows)

    def get(self, id: str) -> Entry | None:
        found = self._one("SELECT id, location, digest FROM concepts WHERE id = ?", (id,))
        return None if found is None else Entry(*found)

    def put(self, entries: Iterable[Entry]) -> None:
        """Add or replace, all or none."""
        with self._lock, self._database:
            self._database.execute("BEGIN")
            rows = ((each.id, each.location, each.digest) for each in entries)
            self._database.executemany("INSERT OR REPLACE INTO concepts VALUES (?, ?, ?)", rows)

    def remove(self, id: str) -> bool:
        """Whether it was there."""
        with self._lock:
            return self._database.execute("DELETE FROM concepts WHERE id = ?", (id,)).rowcount > 0

    @property
    def nbytes(self) -> int:
        """Of the database."""
        return self._one("PRAGMA page_count")[0] * self._one("PRAGMA page_size")[0]

    def close(self) -> None:
        self._database.close()

    def _one(self, query: str, values: tuple[str, ...] = ()) -> tuple | None:
        with self._lock:
            return self._database.execute(query, values).fetchone()
