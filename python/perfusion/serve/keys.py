"""`Keys`: who may do what. A key is shown once; what is kept is its SHA-256, which suffices, as a key is 256 random bits."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection

from sqlalchemy import Engine, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from perfusion.serve import state
from perfusion.serve.settings import SCOPES

__all__ = ["LOCAL", "Keys", "Principal"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclasses.dataclass(frozen=True)
class Principal:
    """Who asks. name: also the namespace of their concepts. concepts: their quota, None for the server's."""

    name: str
    scopes: frozenset[str]
    concepts: int | None = None

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


LOCAL = Principal("local", frozenset(SCOPES))  # who reaches a server on loopback that has no keys


class Keys:
    """The keys in a database."""

    def __init__(self, database: Engine):
        self._database = database

    def add(self, name: str, scopes: Collection[str], concepts: int | None = None) -> str:
        """Make a key and return it. ValueError when the name or a scope breaks its rule, or the name is taken."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            rule = "1 to 32 characters of a-z, 0-9, '-' and '_', the first a letter or digit"
            raise ValueError(f"a key's name must be {rule}, got {name!r:.80}")
        if not scopes or not set(scopes) <= set(SCOPES):
            raise ValueError(f"a key's scopes must be some of {', '.join(SCOPES)}, got {', '.join(map(str, scopes)) or 'none'}")
        key = f"pk-{secrets.token_urlsafe(32)}"
        row = dict(name=name, digest=_digest(key), scopes=",".join(sorted(set(scopes))), concepts=concepts, created=time.time())
        try:
            with self._database.begin() as connection:
                connection.execute(insert(state.keys), row)
        except IntegrityError:
            raise ValueError(f"there is a key named {name!r} already; revoke it first, or choose another name") from None
        return key

    def revoke(self, name: str) -> bool:
        """Forget a key; whether there was one. Concepts of its namespace stay."""
        with self._database.begin() as connection:
            return connection.execute(delete(state.keys).where(state.keys.c.name == name)).rowcount > 0

    def list(self) -> list[dict[str, object]]:
        with self._database.connect() as connection:
            rows = connection.execute(select(state.keys).order_by(state.keys.c.name)).mappings().all()
        shown = ("name", "concepts")
        return [{key: row[key] for key in shown} | {"scopes": row["scopes"].split(","), "created": int(row["created"])} for row in rows]

    def any(self) -> bool:
        with self._database.connect() as connection:
            return bool(connection.execute(select(func.count()).select_from(state.keys)).scalar())

    def find(self, key: str) -> Principal | None:
        """Whose key it is. The search is by digest, so its time says nothing of a kept key; the comparison takes constant time."""
        digest = _digest(key)
        with self._database.connect() as connection:
            row = connection.execute(select(state.keys).where(state.keys.c.digest == digest)).mappings().first()
        if row is None or not hmac.compare_digest(row["digest"], digest):
            return None
        return Principal(row["name"], frozenset(row["scopes"].split(",")), row["concepts"])


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
