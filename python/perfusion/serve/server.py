"""`Server`: the parts of one server, together. The routes reach them through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from perfusion.serve.concepts import Library
from perfusion.serve.jobs import Jobs
from perfusion.serve.keys import Keys
from perfusion.serve.metrics import Metrics
from perfusion.serve.pool import Pool
from perfusion.serve.settings import Settings
from perfusion.serve.state import open_database
from perfusion.serve.store import Store

__all__ = ["Server"]

log = logging.getLogger("perfusion.serve")


class Server:
    """pool: makes what draws, of the settings and of a function that counts events.

    ValueError where it is to be reached from elsewhere and has no key.
    """

    def __init__(self, settings: Settings, pool: Callable[[Settings, Callable[[str, Any], None]], Pool] = Pool):
        self.settings, self.metrics = settings, Metrics()
        settings.folder.mkdir(parents=True, exist_ok=True)
        self.database = open_database(settings.database_url)
        self.keys = Keys(self.database)
        if not settings.loopback and not self.keys.any():
            raise ValueError(
                f"serve: {settings.host} can be reached from other computers, and there is no key. Make one first: perfusion keys NAME "
                "--scope admin"
            )
        self.library = Library(self.database, Store(settings.store_url))
        self.pool = pool(settings, self.metrics.observe)
        self.jobs = Jobs(settings, self.database, self.library, self.pool, self.metrics)
        self._sweeping: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From the start of the workers to their end."""
        await self.pool.start()
        if self.settings.train:
            await self.jobs.start()
        if self.settings.store is None:  # what a server that was killed could not remove
            await asyncio.to_thread(lambda: self.library.sweep(self.library.store.digests()))
        try:
            yield
        finally:
            self.drain()
            for task in self._sweeping:
                task.cancel()
            await self.jobs.stop()
            await self.pool.stop()
            self.database.dispose()

    def drain(self) -> None:
        """Take nothing new and refuse what waits: the server is about to end. HTTP ends once all is answered."""
        self.pool.drain()

    def sweep_later(self, digest: str) -> None:
        """Remove a concept's file when nothing that was asked for before can want it any more. From the event loop."""

        async def sweep() -> None:
            await asyncio.sleep(self.settings.timeout)
            await asyncio.to_thread(self.library.sweep, [digest])

        task = asyncio.create_task(sweep())
        self._sweeping.add(task)
        task.add_done_callback(self._sweeping.discard)
