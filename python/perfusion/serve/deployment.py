"""Drawing on a Ray cluster: `perfusion serve --ray`. The HTTP side stays one process; replicas of a Ray Serve deployment draw.

    fleet = Fleet(least=1, most=8)
    app = create_app(settings, pool=functools.partial(RayPool, fleet=fleet))

A replica is a `Pool` with one device. Any replica draws any concept: a drawing names its concepts by digest, and the replica reads
them from the shared store (`Settings.store`) and keeps them as a server of one machine does; nothing is routed, batched or scaled by
concept. Replicas come and go with the number of drawings that are under way. One that dies in the middle of a picture loses nothing
but time: the same `Drawing`, seed and all, goes to another. Source: DESIGN.md, "The concept store and the server".
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

from perfusion.serve.drawing import Drawing, Failure, Picture
from perfusion.serve.pool import ATTEMPTS, Pool, Ticket, _Worker
from perfusion.serve.settings import Settings
from perfusion.serve.worker import BaseFacts, Cancel

__all__ = ["Fleet", "Painter", "RayPool", "deployment"]

NAME = "perfusion"  # of the application in Ray Serve
LEASE = 30.0  # seconds between questions after the state of the replicas

log = logging.getLogger("perfusion.serve")


@dataclasses.dataclass(frozen=True)
class Fleet:
    """How many replicas there are, and what one takes. ValueError says what breaks which rule.

    address: of a Ray cluster; None starts one on this machine, or joins the one that RAY_ADDRESS names. least, most: replicas.
    cpus, gpus: of one. upscale, downscale: seconds for which there must be more, or fewer, drawings under way than replicas have rows.
    """

    address: str | None = None
    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    upscale: float = 5.0
    downscale: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"serve: replicas must be 1 <= least <= most, got {self.least} and {self.most}")


class Painter:
    """A replica: a worker of its own, with all that `Pool` does for it."""

    def __init__(self, settings: Settings):
        self._pool = Pool(settings)

    async def _started(self) -> Pool:
        if not self._pool._workers:
            await self._pool.start()
        while not self._pool.ready:
            await asyncio.sleep(0.05)
        return self._pool

    async def facts(self) -> dict[str, BaseFacts]:
        """What the server has to know of the models, once a first picture was drawn."""
        return (await self._started()).bases

    async def draw(self, drawing: Drawing) -> AsyncIterator[Picture | Failure]:
        """Pictures on the way, then the last one or a Failure. A caller who goes away cancels it."""
        pool = await self._started()
        (ticket,) = pool.submit("", [drawing])
        try:
            while (shown := await ticket.shown.get()) is not None:
                yield shown
            yield await ticket.result
        finally:
            pool.cancel(ticket)

    async def __del__(self) -> None:
        with contextlib.suppress(Exception):
            await self._pool.stop()


def deployment(settings: Settings, fleet: Fleet) -> Any:
    """The Ray Serve application of `Painter`s. Deployed anew under the same name it is a rolling update: replicas finish what they draw."""
    from ray import serve

    of_one = Pool(settings)._room()
    own = dataclasses.replace(
        settings, store=settings.store_url, devices=("cuda",) if fleet.gpus else settings.devices[:1] or ("cpu",), queue=2 * of_one,
    )  # fmt: skip
    return serve.deployment(
        Painter, name="Painter", max_ongoing_requests=of_one, graceful_shutdown_timeout_s=settings.grace,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        autoscaling_config={
            "min_replicas": fleet.least, "max_replicas": fleet.most, "initial_replicas": fleet.least,
            "target_ongoing_requests": settings.rows, "upscale_delay_s": fleet.upscale, "downscale_delay_s": fleet.downscale,
        },
    ).bind(own)  # fmt: skip


class RayPool(Pool):
    """A `Pool` whose one worker is the whole fleet: what it is given goes to whichever replica Ray Serve chooses."""

    def __init__(self, settings: Settings, observe: Callable[[str, Any], None] = lambda event, value: None, fleet: Fleet = Fleet()):
        super().__init__(settings, observe)
        self._fleet, self._handle, self._began_ray = fleet, None, False
        self._drawn: dict[str, asyncio.Task[None]] = {}

    def _room(self) -> int:
        """As many as all replicas take at most: what waits with Ray is what it scales by."""
        return super()._room() * self._fleet.most

    async def start(self) -> None:
        """Deploy. The fleet is ready when its first replica has drawn a picture."""
        self._loop = asyncio.get_running_loop()
        self._workers = [_Worker(0, None, None, None, heard=self._loop.time(), outbox=_Outbox(self))]
        self._handle = await asyncio.to_thread(self._deploy)
        self._spawn(self._wait_until_ready())

    def _deploy(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise
        import ray
        from ray import serve

        if not ray.is_initialized():
            ray.init(address=self._fleet.address, namespace="serve", log_to_driver=False, include_dashboard=False)
            self._began_ray = True
        serve.start(http_options={"location": "NoServer"})
        return serve.run(deployment(self.settings, self._fleet), name=NAME, route_prefix=None)

    async def _wait_until_ready(self) -> None:
        while not self.closing:
            try:
                self.bases = await self._handle.facts.remote()
                break
            except Exception as error:  # a replica that died while it loaded; Ray starts another
                log.warning("replica not ready", extra={"fields": {"error": type(error).__name__}})
                await asyncio.sleep(1.0)
        self._workers[0].ready = True
        log.info("fleet ready", extra={"fields": {"least": self._fleet.least, "most": self._fleet.most}})
        self._pump()

    def pids(self) -> list[int]:
        """None: replicas may be on other machines."""
        return []

    async def stop(self) -> None:
        """Finish what is being drawn, within the grace; then take the deployment down."""
        workers, self.closing = self._workers, True
        while len(self.waiting):
            _, ticket = self.waiting.pop({})
            self._end(ticket, Failure(ticket.drawing.id, "closing", "the server is shutting down; try again"))
        if self._drawn:
            await asyncio.wait(self._drawn.values(), timeout=self.settings.grace)
        for ticket in list(workers[0].tickets.values()) if workers else ():
            self._end(ticket, Failure(ticket.drawing.id, "closing", "the server is shutting down; try again"))
        for task in self._tasks:
            task.cancel()
        self._workers = []
        await asyncio.to_thread(self._take_down)

    def _take_down(self) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):  # a cluster that is gone
            serve.delete(NAME)
        if self._began_ray:
            ray.shutdown()

    # what the outbox is given

    def begin(self, drawing: Drawing) -> None:
        task = self._loop.create_task(self._draw(drawing))
        self._drawn[drawing.id] = task
        task.add_done_callback(lambda _: self._drawn.pop(drawing.id, None))

    def give_up(self, id: str) -> None:
        if id in self._drawn:
            self._drawn[id].cancel()

    async def _draw(self, drawing: Drawing) -> None:
        worker = self._workers[0]
        ticket = worker.tickets[drawing.id]
        outcome: Picture | Failure | None = None
        try:
            async for outcome in self._handle.options(stream=True).draw.remote(drawing):
                if isinstance(outcome, Failure) and outcome.kind in ("closing", "cancelled"):
                    raise ConnectionError(outcome.message)  # of a replica that ends: another draws it
                self._hear(worker, outcome)
            if outcome is None or (isinstance(outcome, Picture) and outcome.step < outcome.steps):
                raise ConnectionError("the replica ended before the picture")
        except Exception as error:
            self._lost(worker, ticket, error)

    def _lost(self, worker: _Worker, ticket: Ticket, error: Exception) -> None:
        """A replica died, or was taken down, with this drawing: it is drawn again, ahead of what waits."""
        if worker.tickets.pop(ticket.drawing.id, None) is None:
            return  # answered, or given up
        log.warning("drawing lost", extra={"fields": {"error": type(error).__name__, "attempt": ticket.attempts + 1}})
        self._observe("restarted", 1)
        self.restarts += 1
        ticket.attempts += 1
        ticket.worker = None
        if ticket.attempts >= ATTEMPTS:
            self._end(ticket, Failure(ticket.drawing.id, "internal", "the picture could not be drawn: its replica ended each time"))
            return
        self.waiting.push_back(ticket.key, ticket)
        self._pump()


@dataclasses.dataclass
class _Outbox:
    """Where `Pool` puts what a worker is to do."""

    pool: RayPool

    def put(self, message: Drawing | Cancel | None) -> None:
        if isinstance(message, Drawing):
            self.pool.begin(message)
        elif isinstance(message, Cancel):
            self.pool.give_up(message.id)
