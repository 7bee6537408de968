"""`Library`: the concepts of all namespaces. Their rows are in the database, their files in the store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import Engine, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from perfusion.concept import Concept, check_name
from perfusion.serve import state
from perfusion.serve.store import Store

__all__ = ["Library", "NameTaken", "QuotaReached"]

MOST_BYTES = 4 * 2**20  # of a concept file; one of XL with keys of its own has 0.4 MB


class NameTaken(ValueError):
    """The namespace has a concept of this name."""


class QuotaReached(ValueError):
    """The namespace has as many concepts as it may."""


class Library:
    def __init__(self, database: Engine, store: Store):
        self._database, self.store = database, store
        self._adding = threading.Lock()  # so that two uploads at once do not pass a quota

    def add(self, namespace: str, name: str | None, data: bytes, bases: Mapping[str, Any], quota: int) -> dict[str, Any]:
        """Keep a concept file that has been checked; returns its row. bases: name -> Base of the models that are served.

        ValueError when it is no concept file, or for other models; NameTaken; QuotaReached; OSError where it cannot be kept.
        Nothing is kept then.
        """
        if len(data) > MOST_BYTES:
            raise ValueError(f"a concept file has at most {MOST_BYTES} bytes, and this one has {len(data)}")
        concept = Concept.from_bytes(data, "the file")
        name = concept.name if name is None else name
        check_name(name)
        reasons = {model: concept.base.mismatch(base) for model, base in bases.items()}
        fits = [model for model, reason in reasons.items() if reason is None]
        if not fits:
            raise ValueError(f"the concept fits no model of this server: {next(iter(reasons.values()))}")
        row = dict(
            namespace=namespace, name=name, digest=Store.digest(data), bytes=len(data), models=json.dumps(fits), family=concept.base.family,
            superclass=concept.superclass, bias=concept.bias, temperature=concept.temperature, license=concept.license,
            author=concept.author, created=time.time(),
        )  # fmt: skip
        with self._adding:
            if self.find(namespace, [name]):
                raise NameTaken(f"you have a concept named {name!r} already; delete it first, or give another name")
            if self.count(namespace) >= quota:
                raise QuotaReached(f"you have {quota} concepts, which is your quota; delete one first")
            self.store.put(data)
            try:
                with self._database.begin() as connection:
                    connection.execute(insert(state.concepts), row)
            except IntegrityError:  # another server on this database was faster
                raise NameTaken(f"you have a concept named {name!r} already; delete it first, or give another name") from None
        return row

    def count(self, namespace: str) -> int:
        table = state.concepts
        with self._database.connect() as connection:
            return connection.execute(select(func.count()).select_from(table).where(table.c.namespace == namespace)).scalar()

    def find(self, namespace: str, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """name -> row of those that there are."""
        table = state.concepts
        if not names:
            return {}
        with self._database.connect() as connection:
            found = connection.execute(select(table).where(table.c.namespace == namespace, table.c.name.in_(list(names)))).mappings()
            return {row["name"]: dict(row) for row in found}

    def list(self, namespace: str, limit: int = 10_000) -> list[dict[str, Any]]:
        table = state.concepts
        with self._database.connect() as connection:
            query = select(table).where(table.c.namespace == namespace).order_by(table.c.name).limit(limit)
            return [dict(row) for row in connection.execute(query).mappings()]

    def remove(self, namespace: str, name: str) -> str | None:
        """Forget a concept; the digest of its file, which `sweep` removes, or None where there is none."""
        table = state.concepts
        with self._adding, self._database.begin() as connection:
            where = table.c.namespace == namespace, table.c.name == name
            digest = connection.execute(select(table.c.digest).where(*where)).scalar()
            connection.execute(delete(table).where(*where))
            return digest

    def sweep(self, digests: Iterable[str]) -> None:
        """Remove those of the files that are no concept's any more."""
        table = state.concepts
        with self._adding:
            for digest in digests:
                with self._database.connect() as connection:
                    used = connection.execute(select(table.c.name).where(table.c.digest == digest).limit(1)).first()
                if used is None:
                    self.store.remove(digest)


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A concept as the API shows it."""
    return {
        "id": row["digest"], "object": "concept", "name": row["name"], "namespace": row["namespace"], "models": json.loads(row["models"]),
        "family": row["family"], "superclass": row["superclass"], "beta": row["bias"], "tau": row["temperature"], "bytes": row["bytes"],
        "created": int(row["created"]), "license": row["license"], "author": row["author"],
    }  # fmt: skip
