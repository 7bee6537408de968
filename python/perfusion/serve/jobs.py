"""`Jobs`: training jobs, one after another, each in a child process. What must survive is in the database and the job's folder."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from sqlalchemy import Engine, delete, func, insert, select, update

from perfusion.concept import check_name
from perfusion.files import write_bytes
from perfusion.serve import state, trainer
from perfusion.serve.concepts import Library, NameTaken, QuotaReached
from perfusion.serve.metrics import Metrics
from perfusion.serve.pool import Pool, processes
from perfusion.serve.settings import Settings
from perfusion.training import TrainingConfig

__all__ = ["Jobs"]

ATTEMPTS = 3  # of a job whose process ends unasked
POLL = 0.25  # seconds between looks at a running job's log
OVER = ("succeeded", "failed", "cancelled")

log = logging.getLogger("perfusion.serve")


class Jobs:
    """The jobs of this server. Methods without `async` wait for the disk: call them from a thread."""

    def __init__(self, settings: Settings, database: Engine, library: Library, pool: Pool, metrics: Metrics):
        self.settings, self._database, self._library, self._pool, self._metrics = settings, database, library, pool, metrics
        self._folder = settings.jobs_folder
        self._owner = ""
        self._wake = asyncio.Event()
        self._running: tuple[str, Any] | None = None  # id and process
        self._listeners: dict[str, set[asyncio.Queue[tuple[str, dict[str, Any]]]]] = {}
        self._task: asyncio.Task[None] | None = None

    # from the routes

    def create(
        self, namespace: str, model: str, settings: dict[str, Any],
        pictures: Sequence[Image.Image], masks: Sequence[Image.Image], captions: Sequence[str],
    ) -> dict[str, Any]:  # fmt: skip
        """Take a job. settings: fields of TrainingConfig. ValueError, NameTaken, QuotaReached; nothing is kept then."""
        name = settings["name"]
        check_name(name)
        TrainingConfig(**settings)
        if masks and len(masks) != len(pictures):
            raise ValueError(f"there must be a mask for each picture or none, got {len(masks)} masks for {len(pictures)} pictures")
        if captions and len(captions) != len(pictures):
            raise ValueError(f"there must be a caption for each picture or none, got {len(captions)} captions for {len(pictures)} pictures")
        table = state.jobs
        with self._database.connect() as connection:
            waiting = table.c.status.in_(["queued", "running"])
            taken = connection.execute(select(table.c.id).where(table.c.namespace == namespace, table.c.name == name, waiting)).first()
            count = connection.execute(select(func.count()).select_from(table).where(table.c.namespace == namespace, waiting)).scalar()
        if taken is not None or self._library.find(namespace, [name]):
            raise NameTaken(f"you have a concept or a job named {name!r} already; choose another name")
        if count >= self.settings.jobs:
            raise QuotaReached(f"{count} of your jobs wait or run, and more are not taken; wait for one, or cancel it")
        row = dict(
            id=uuid.uuid4().hex, namespace=namespace, name=name, model=model, settings=json.dumps(settings), status="queued",
            owner=self._owner, attempts=0, step=0, steps=settings["steps"], loss=None, error=None, created=time.time(),
        )  # fmt: skip
        folder = self._folder / row["id"]
        try:
            for number, picture in enumerate(pictures):
                stem = folder / "pictures" / f"{number:03d}"
                _save(picture.convert("RGBA" if picture.has_transparency_data else "RGB"), stem.with_suffix(".png"))
                if masks:
                    _save(masks[number].convert("L").resize(picture.size), stem.with_name(f"{stem.name}-masklabel.png"))
                if captions:
                    write_bytes(stem.with_suffix(".txt"), captions[number].encode("utf-8"))
            with self._database.begin() as connection:
                connection.execute(insert(table), row)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return row

    def find(self, namespace: str | None, id: str) -> dict[str, Any] | None:
        """A job of a namespace, or of any."""
        table = state.jobs
        with self._database.connect() as connection:
            row = connection.execute(select(table).where(table.c.id == id)).mappings().first()
        return None if row is None or namespace not in (None, row["namespace"]) else dict(row)

    def list(self, namespace: str) -> list[dict[str, Any]]:
        table = state.jobs
        with self._database.connect() as connection:
            query = select(table).where(table.c.namespace == namespace).order_by(table.c.created.desc()).limit(1000)
            return [dict(row) for row in connection.execute(query).mappings()]

    def cancel(self, id: str) -> None:
        """Stop a job that waits or runs; its checkpoint is kept."""
        self._change(id, ("queued", "running"), status="cancelled")

    def resume(self, id: str) -> bool:
        """Put a cancelled or failed job into the line again; whether it was one."""
        return self._change(id, ("cancelled", "failed"), status="queued", attempts=0, error=None)

    def remove(self, id: str) -> None:
        """Forget a job that is over, and what it has on the disk."""
        with self._database.begin() as connection:
            connection.execute(delete(state.jobs).where(state.jobs.c.id == id))
        shutil.rmtree(self._folder / id, ignore_errors=True)

    def wake(self) -> None:
        """There is something new to do. From the event loop."""
        self._wake.set()

    async def events(self, id: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(event, data) of a job, from its present state to its end, or the server's; ("", {}) now and then, to keep a connection."""
        queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self._listeners.setdefault(id, set()).add(queue)
        try:
            row = await asyncio.to_thread(self.find, None, id)
            if row is None:
                return
            if row["status"] in OVER:
                yield row["status"], shown(row)
                return
            yield "progress", {"step": row["step"], "steps": row["steps"], "loss": row["loss"]}
            quiet = 0.0
            while not self._pool.closing:
                try:
                    event, data = await asyncio.wait_for(queue.get(), 1.0)
                except asyncio.TimeoutError:
                    quiet += 1
                    if quiet >= 15:
                        quiet = 0
                        yield "", {}
                    continue
                yield event, data
                if event in OVER:
                    return
        finally:
            self._listeners[id].discard(queue)
            if not self._listeners[id]:
                del self._listeners[id]

    # the runner

    async def start(self) -> None:
        """Go on with what an earlier server of this folder left, and take new jobs."""
        self._owner = await asyncio.to_thread(_identity, self._folder)
        table = state.jobs

        def take_up() -> None:
            with self._database.begin() as connection:
                connection.execute(update(table).where(table.c.owner == self._owner, table.c.status == "running").values(status="queued"))

        await asyncio.to_thread(take_up)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the running job with a checkpoint; it goes on when the server starts again."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                if not self._pool.bases:  # until then no concept could be checked
                    await asyncio.sleep(POLL)
                    continue
                row = await asyncio.to_thread(self._next)
                if row is None:
                    await asyncio.wait_for(self._wake.wait(), 5)
                else:
                    await self._work(row)
            except asyncio.TimeoutError:
                pass
            except asyncio.CancelledError:
                raise
            except Exception:  # the database is away, the disk is full: a job waits for better times
                log.exception("jobs")
                await asyncio.sleep(1)

    def _next(self) -> dict[str, Any] | None:
        table = state.jobs
        with self._database.begin() as connection:
            query = select(table).where(table.c.owner == self._owner, table.c.status == "queued").order_by(table.c.created).limit(1)
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            connection.execute(
                update(table).where(table.c.id == row["id"]).values(status="running", attempts=row["attempts"] + 1)
            )
            return dict(row) | {"status": "running", "attempts": row["attempts"] + 1}

    async def _work(self, row: dict[str, Any]) -> None:
        id, folder = row["id"], self._folder / row["id"]
        here, there = processes().Pipe()
        device = self.settings.devices[0] if self.settings.devices else None
        process = processes().Process(
            target=trainer.run,
            args=(there, folder, self.settings.models.get(row["model"], row["model"]), device, json.loads(row["settings"])),
            daemon=True,
            name=f"perfusion-trainer-{id}",
        )
        try:
            await asyncio.to_thread(process.start)
            there.close()
            await self._follow(row, folder, process)
        finally:
            if process.is_alive():
                process.terminate()
                for _ in range(int(self.settings.grace / POLL)):
                    if not process.is_alive():
                        break
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(POLL)
                if process.is_alive():
                    process.kill()
            here.close()
        await self._conclude(row, folder, process.exitcode)

    async def _follow(self, row: dict[str, Any], folder: Path, process: Any) -> None:
        """Tell of the job's steps and previews until its process ends, which is told to when the job is cancelled."""
        id, told, shown_steps = row["id"], row["step"], set(_previews(folder))
        written = time.monotonic()
        while process.is_alive():
            await asyncio.sleep(POLL)
            line = await asyncio.to_thread(_last_line, folder / "output" / "log.jsonl")
            if line and line["step"] != told:
                told = line["step"]
                self._tell(id, "progress", {"step": told, "steps": row["steps"], "loss": line["loss"]})
                row |= {"step": told, "loss": line["loss"]}
            for step, path in _previews(folder).items():
                if step not in shown_steps:
                    shown_steps.add(step)
                    self._tell(id, "preview", {"step": step, "b64_json": await asyncio.to_thread(_base64, path)})
            now = await asyncio.to_thread(self.find, None, id)
            if now is None or now["status"] != "running":  # cancelled, and perhaps resumed already
                process.terminate()
            elif time.monotonic() - written > 1 and now["step"] != told:
                written = time.monotonic()
                await asyncio.to_thread(self._change, id, ("running",), step=told, loss=row["loss"])

    async def _conclude(self, row: dict[str, Any], folder: Path, code: int | None) -> None:
        id = row["id"]
        now = await asyncio.to_thread(self.find, None, id)
        if now is None:
            return
        if now["status"] == "queued":
            return
        if now["status"] == "cancelled":
            pass
        elif code == 0:
            await asyncio.to_thread(self._keep, row, folder)
        else:
            reason = await asyncio.to_thread(_read, folder / trainer.ERROR)
            if code != 2 and row["attempts"] < ATTEMPTS:
                log.warning("job interrupted", extra={"fields": {"job": id, "code": code}})
                await asyncio.to_thread(self._change, id, ("running",), status="queued", step=row["step"], loss=row["loss"])
                return
            error = reason or "the training process ended unexpectedly"
            await asyncio.to_thread(self._change, id, ("running",), status="failed", error=error, step=row["step"], loss=row["loss"])
        now = await asyncio.to_thread(self.find, None, id)
        if now is not None:
            self._metrics.jobs.labels(now["status"]).inc()
            self._tell(id, now["status"], shown(now))

    def _keep(self, row: dict[str, Any], folder: Path) -> None:
        """The concept that was learned becomes one of the namespace; pictures and checkpoints go."""
        try:
            data = (folder / "output" / f"{row['name']}.safetensors").read_bytes()
            bases = {name: facts.base for name, facts in self._pool.bases.items()}
            self._library.add(row["namespace"], row["name"], data, bases, 2**31)  # the quota was asked when the job was taken
        except NameTaken as error:
            self._change(row["id"], ("running",), status="failed", error=str(error))
            return
        self._change(row["id"], ("running",), status="succeeded", step=row["steps"], loss=row["loss"])
        shutil.rmtree(folder, ignore_errors=True)

    def _change(self, id: str, states: Sequence[str], **values: Any) -> bool:
        table = state.jobs
        with self._database.begin() as connection:
            return connection.execute(update(table).where(table.c.id == id, table.c.status.in_(list(states))).values(**values)).rowcount > 0

    def _tell(self, id: str, event: str, data: dict[str, Any]) -> None:
        for queue in self._listeners.get(id, ()):
            queue.put_nowait((event, data))


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A job as the API shows it."""
    keys = ("id", "namespace", "name", "model", "status", "step", "steps", "loss", "error")
    return {key: row[key] for key in keys} | {
        "object": "job", "created": int(row["created"]), "concept": row["name"] if row["status"] == "succeeded" else None,
    }  # fmt: skip


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _identity(folder: Path) -> str:
    """Who this server is among those on one database: a number that its folder keeps."""
    path = folder / "owner"
    if not path.is_file():
        write_bytes(path, uuid.uuid4().hex.encode())
    return path.read_text()


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a training's log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        return json.loads(lines[-1])
    except (OSError, IndexError, ValueError):
        return None


def _previews(folder: Path) -> dict[int, Path]:
    return {int(path.stem.removeprefix("step-")): path for path in sorted((folder / "output" / "validation").glob("step-*.png"))}


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[:1000]
    except OSError:
        return ""
