"""What a server keeps in a database: keys, concepts and jobs. SQLite in a file by default, PostgreSQL by its URL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Column, Engine, Float, Integer, MetaData, String, Table, Text, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

__all__ = ["concepts", "jobs", "keys", "open_database"]

LOCK = 0x50657266  # PostgreSQL's name of this program's lock

_tables = MetaData()

keys = Table(
    "keys",
    _tables,
    Column("name", String(64), primary_key=True),  # and the namespace of its concepts
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the key, which is random: 256 bits
    Column("scopes", String(64), nullable=False),
    Column("concepts", Integer),  # quota; NULL for the server's
    Column("created", Float, nullable=False),
)

concepts = Table(
    "concepts",
    _tables,
    Column("namespace", String(64), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("models", Text, nullable=False),  # JSON: which bases it fits
    Column("family", String(64), nullable=False),
    Column("superclass", String(128), nullable=False),
    Column("bias", Float, nullable=False),
    Column("temperature", Float, nullable=False),
    Column("license", String(128), nullable=False),
    Column("author", String(128), nullable=False),
    Column("created", Float, nullable=False),
)

jobs = Table(
    "jobs",
    _tables,
    Column("id", String(32), primary_key=True),
    Column("namespace", String(64), nullable=False, index=True),
    Column("name", String(32), nullable=False),
    Column("model", String(128), nullable=False),
    Column("settings", Text, nullable=False),  # JSON: of TrainingConfig
    Column("status", String(16), nullable=False, index=True),
    Column("owner", String(32), nullable=False),  # the server whose folder has the pictures
    Column("attempts", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("loss", Float),
    Column("error", Text),
    Column("created", Float, nullable=False),
)


def open_database(url: str) -> Engine:
    """The database, its tables made where there are none. ValueError where the URL is none, or its driver is not installed."""
    try:
        parsed = make_url(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url))
        sqlite = parsed.get_backend_name() == "sqlite"
        engine = create_engine(parsed, pool_pre_ping=not sqlite)
    except (ArgumentError, ImportError) as error:  # neither message has the password
        raise ValueError(
            f"serve: this database cannot be used: {error}. Give --database sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME "
            "with pip install 'perfusion-kernels[postgresql]'."
        ) from None
    if sqlite and parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    if sqlite:

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    with engine.begin() as connection:
        if parsed.get_backend_name() == "postgresql":  # of servers that start together one makes the tables
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": LOCK})
        _tables.create_all(connection)
    return engine
