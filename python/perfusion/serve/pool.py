"""`Pool`: the workers as the server sees them. A worker that dies is replaced, and what it had not answered is drawn again.

Everything here runs in the server's event loop, but for two threads per worker that read and write its pipe.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any

from perfusion.serve import worker as workers
from perfusion.serve.drawing import Drawing, Failure, Picture
from perfusion.serve.fair_queue import FairQueue, Full
from perfusion.serve.settings import Settings

__all__ = ["Busy", "Pool", "Ticket", "processes"]

ATTEMPTS = 3  # deaths of a worker that a drawing may see; before the last one it is drawn alone, so it takes no other with it
PATIENCE = 30.0  # most seconds between attempts to start a worker that does not start

log = logging.getLogger("perfusion.serve")


class Busy(Exception):
    """There is no room for more. retry_after: seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"too many pictures wait; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclasses.dataclass(eq=False)
class Ticket:
    """A drawing that was taken. result: the last Picture, or a Failure. shown: Pictures before it, then None."""

    key: str
    drawing: Drawing
    taken: float
    result: asyncio.Future[Picture | Failure]
    shown: asyncio.Queue[Picture | None] = dataclasses.field(default_factory=asyncio.Queue)
    attempts: int = 0
    previews: int = 0
    step: int = 0
    over: bool = False
    worker: _Worker | None = None
    timer: asyncio.TimerHandle | None = None


@dataclasses.dataclass(eq=False)
class _Worker:
    """One child process. A worker that died is never used again; another takes its place."""

    number: int
    device: str | None
    process: Any
    connection: Any
    tickets: dict[str, Ticket] = dataclasses.field(default_factory=dict)
    outbox: queue.SimpleQueue[Any] = dataclasses.field(default_factory=queue.SimpleQueue)
    ready: bool = False
    heard: float = 0.0


class Pool:
    """Draws drawings on all devices. observe: called with (event, value) for metrics: see `perfusion.serve.metrics`."""

    def __init__(self, settings: Settings, observe: Callable[[str, Any], None] = lambda event, value: None):
        self.settings, self._observe = settings, observe
        self.bases: dict[str, workers.BaseFacts] = {}
        self.waiting: FairQueue[Ticket] = FairQueue(settings.queue, settings.queue_per_key)
        self.closing = False
        self.restarts = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers: list[_Worker | None] = []
        self._failures: collections.Counter[int] = collections.Counter()  # starts of a worker that came to nothing, one after another
        self._tasks: set[asyncio.Task[Any]] = set()
        self._seconds_per_picture = 1.0
        self._processes = processes()

    # from the routes

    @property
    def ready(self) -> bool:
        return not self.closing and any(worker is not None and worker.ready for worker in self._workers)

    @property
    def drawing(self) -> int:
        """How many pictures the workers have."""
        return sum(len(worker.tickets) for worker in self._workers if worker is not None)

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers if worker is not None and worker.process.pid]

    def submit(self, key: str, drawings: list[Drawing]) -> list[Ticket]:
        """Take drawings, all or none: Busy."""
        loop = asyncio.get_running_loop()
        tickets = [Ticket(key, drawing, loop.time(), loop.create_future()) for drawing in drawings]
        try:
            if self.closing:
                raise Full
            self.waiting.push(key, tickets)
        except Full:
            self._observe("refused", "queue_full")
            raise Busy(self._retry_after()) from None
        for ticket in tickets:
            ticket.timer = loop.call_later(self.settings.timeout, self._time_out, ticket)
        self._pump()
        return tickets

    def tickets(self, key: str) -> list[Ticket]:
        """What a key is having drawn."""
        found = [ticket for worker in self._workers if worker is not None for ticket in worker.tickets.values()]
        return [ticket for ticket in found if ticket.key == key]

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more."""
        if not ticket.over:
            self._observe("cancelled", 1)
            self._end(ticket, Failure(ticket.drawing.id, "cancelled", "cancelled"))

    def _retry_after(self) -> int:
        return max(1, min(60, round((len(self.waiting) + self.drawing) * self._seconds_per_picture)))

    # life

    async def start(self) -> None:
        """Start a worker per device; they are ready later."""
        self._loop = asyncio.get_running_loop()
        devices = self.settings.devices or (None,)
        self._workers = [None] * len(devices)
        for number, device in enumerate(devices):
            await self._start(number, device)
        self._spawn(self._watch())

    def drain(self) -> None:
        """Take nothing new, refuse what waits, and what is still being drawn after the grace. From any thread, or from a signal."""
        if not self.closing:
            self.closing = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._refuse_waiting)

    def _refuse_waiting(self) -> None:
        while len(self.waiting):
            _, ticket = self.waiting.pop({})
            self._refuse(ticket)
        self._loop.call_later(self.settings.grace, self._refuse_drawn)

    def _refuse_drawn(self) -> None:
        for worker in self._workers:
            for ticket in list(worker.tickets.values()) if worker is not None else ():
                self._refuse(ticket)

    def _refuse(self, ticket: Ticket) -> None:
        self._end(ticket, Failure(ticket.drawing.id, "closing", "the server is shutting down; try again"))

    async def stop(self) -> None:
        """Finish what is being drawn, within the grace, refuse what waits, and end the workers."""
        self.drain()
        await asyncio.sleep(0)  # the refusals come first
        pending = [ticket.result for worker in self._workers if worker is not None for ticket in worker.tickets.values()]
        if pending:
            await asyncio.wait(pending, timeout=self.settings.grace)
        self._refuse_drawn()
        for task in self._tasks:
            task.cancel()
        found = [worker for worker in self._workers if worker is not None]
        for worker in found:
            worker.outbox.put(None)
        for worker in found:
            await asyncio.to_thread(worker.process.join, 5)
            if worker.process.is_alive():
                worker.process.kill()
                await asyncio.to_thread(worker.process.join)
        self._workers = []

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, number: int, device: str | None) -> None:
        here, there = multiprocessing.Pipe()
        process = self._processes.Process(
            target=workers.run, args=(there, self.settings, device), daemon=True, name=f"perfusion-worker-{number}"
        )
        await asyncio.to_thread(process.start)
        there.close()
        worker = _Worker(number, device, process, here, heard=self._loop.time())
        self._workers[number] = worker
        threading.Thread(target=self._read, args=(worker,), daemon=True).start()
        threading.Thread(target=self._write, args=(worker,), daemon=True).start()

    def _read(self, worker: _Worker) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    message = worker.connection.recv()
                    self._loop.call_soon_threadsafe(self._hear, worker, message)
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._died, worker)

    def _write(self, worker: _Worker) -> None:
        with contextlib.suppress(OSError):
            message = worker
            while message is not None:
                message = worker.outbox.get()
                worker.connection.send(message)

    # the loop

    def _hear(self, worker: _Worker, message: Any) -> None:
        worker.heard = self._loop.time()
        if isinstance(message, workers.Ready):
            worker.ready, self.bases = True, message.bases
            self._failures[worker.number] = 0
            log.info("worker ready", extra={"fields": {"device": worker.device or "default", "pid": worker.process.pid}})
        elif isinstance(message, (Picture, Failure)):
            ticket = worker.tickets.get(message.id)
            if ticket is None:
                return  # cancelled, or timed out
            if isinstance(message, Picture) and message.step < message.steps:
                if ticket.previews < ticket.drawing.previews:  # a second attempt shows none again
                    ticket.previews += 1
                    ticket.shown.put_nowait(message)
                return
            seconds = self._loop.time() - ticket.taken
            self._observe("drawn" if isinstance(message, Picture) else "failed", seconds)
            self._end(ticket, message)
        else:
            for ticket in filter(None, map(worker.tickets.get, message.ids)):
                ticket.step += 1
                if ticket.step == 1 and not ticket.attempts:
                    self._observe("begun", self._loop.time() - ticket.taken)
            spent = message.seconds * 30 / message.rows
            self._seconds_per_picture += 0.05 * (spent - self._seconds_per_picture)
            self._observe("step", (worker.number, message))
        self._pump()

    def _pump(self) -> None:
        """Give workers what they have room for."""
        if self.closing:
            return
        busy: collections.Counter[str] = collections.Counter()
        for worker in self._workers:
            for ticket in worker.tickets.values() if worker is not None else ():
                busy[ticket.key] += 1
        room = self._room()
        room = self.settings.queue if self.settings.split_by_concept else room  # who sorts must see what there is
        while len(self.waiting):
            able = [worker for worker in self._workers if worker is not None and worker.ready and len(worker.tickets) < room]
            able = [worker for worker in able if not any(ticket.attempts >= ATTEMPTS - 1 for ticket in worker.tickets.values())]
            if not able:
                return
            worker = min(able, key=lambda each: len(each.tickets))
            key, ticket = self.waiting.pop(busy)
            if ticket.attempts >= ATTEMPTS - 1 and worker.tickets:
                self.waiting.push_back(key, ticket)
                return
            busy[key] += 1
            ticket.worker = worker
            if not worker.tickets:
                worker.heard = self._loop.time()
            worker.tickets[ticket.drawing.id] = ticket
            worker.outbox.put(ticket.drawing)

    def _room(self) -> int:
        """Drawings that a worker is given at once: a batch, and some whose prompts are encoded meanwhile."""
        return self.settings.rows + max(1, self.settings.rows // 2)

    def _end(self, ticket: Ticket, outcome: Picture | Failure) -> None:
        if ticket.over:
            return
        ticket.over = True
        if ticket.timer is not None:
            ticket.timer.cancel()
        if ticket.worker is None:
            self.waiting.remove(ticket.key, ticket)
        elif ticket.worker.tickets.pop(ticket.drawing.id, None) is not None and isinstance(outcome, Failure):
            ticket.worker.outbox.put(workers.Cancel(ticket.drawing.id))
        ticket.worker = None
        if not ticket.result.done():
            ticket.result.set_result(outcome)
            ticket.shown.put_nowait(None)
        self._pump()

    def _time_out(self, ticket: Ticket) -> None:
        self._observe("refused", "timeout")
        self._end(ticket, Failure(ticket.drawing.id, "timeout", f"the picture was not drawn in {self.settings.timeout:g} s"))

    def _died(self, worker: _Worker) -> None:
        if self._workers == [] or self._workers[worker.number] is not worker:
            return
        self._workers[worker.number] = None
        worker.outbox.put(None)
        if self.closing:
            for ticket in list(worker.tickets.values()):
                self._refuse(ticket)
            return
        self.restarts += 1
        self._observe("restarted", 1)
        self._failures[worker.number] += not worker.ready
        log.warning("worker died", extra={"fields": {"pid": worker.process.pid, "drawings": len(worker.tickets)}})
        tickets, worker.tickets = list(worker.tickets.values()), {}
        for ticket in reversed(tickets):
            ticket.attempts += 1
            ticket.worker, ticket.step = None, 0
            if ticket.attempts >= ATTEMPTS:
                self._end(ticket, Failure(ticket.drawing.id, "internal", "the picture could not be drawn: its worker ended each time"))
            else:
                self.waiting.push_back(ticket.key, ticket)
        self._spawn(self._replace(worker))

    async def _replace(self, worker: _Worker) -> None:
        await asyncio.to_thread(worker.process.join, 5)
        failed = self._failures[worker.number]
        if failed:
            await asyncio.sleep(min(2.0**failed / 2, PATIENCE))
        await self._start(worker.number, worker.device)

    async def _watch(self) -> None:
        """A worker that has work and gives no sign is ended; it is replaced as one that died."""
        while True:
            await asyncio.sleep(min(1.0, self.settings.stall / 4))
            for worker in self._workers:
                if worker is not None and worker.ready and worker.tickets and self._loop.time() - worker.heard > self.settings.stall:
                    log.warning("worker stalled", extra={"fields": {"pid": worker.process.pid}})
                    with contextlib.suppress(OSError):
                        os.kill(worker.process.pid, signal.SIGKILL)


@functools.cache
def processes() -> Any:
    """How workers are started: forked from a process that has imported everything and done nothing, where there is such."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["perfusion.serve.preloaded"])
        return context
    return multiprocessing.get_context("spawn")
