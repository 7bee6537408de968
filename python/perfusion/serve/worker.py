"""A worker: the child process that draws on one device. It is told by a pipe, and ends when the pipe does.

Messages to it: Drawing, Cancel, and None for the end. Messages from it: Ready once, then Picture, Failure and StepReport.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import warnings
from multiprocessing.connection import Connection
from typing import Any

from perfusion.serve.drawing import Drawing
from perfusion.serve.settings import Settings

__all__ = ["BaseFacts", "Cancel", "Ready", "run"]


@dataclasses.dataclass(frozen=True)
class Cancel:
    id: str


@dataclasses.dataclass(frozen=True)
class BaseFacts:
    """What a server must know of a base model. base: its `perfusion.base.Base`. width, height: of its own pictures, in pixels."""

    base: Any
    width: int
    height: int
    multiple: int


@dataclasses.dataclass(frozen=True)
class Ready:
    """The worker has loaded its models and drawn with each."""

    bases: dict[str, BaseFacts]


def run(connection: Connection, settings: Settings, device: str | None) -> None:
    """The whole life of a worker."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server ends it, by closing the pipe
    warnings.simplefilter("ignore")
    # here, for the server imports this module and runs no model
    import torch

    from perfusion.models import load_pipeline
    from perfusion.serve.batching import Batcher
    from perfusion.serve.store import Store

    sending = threading.Lock()

    def send(message: Any) -> None:
        with sending:
            try:
                connection.send(message)
            except OSError:
                os._exit(1)  # the server is gone

    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    pipes = {name: load_pipeline(model, device=device, dtype=dtype) for name, model in settings.models.items()}
    batcher = Batcher(
        pipes, Store(settings.store_url).get, send, rows=settings.rows, capacity=settings.capacity,
        split_by_concept=settings.split_by_concept,
    )  # fmt: skip
    send(Ready(warm_up(batcher)))

    def listen() -> None:
        try:
            while True:
                message = connection.recv()
                if message is None:
                    break
                batcher.cancel(message.id) if isinstance(message, Cancel) else batcher.submit(message)
        except (EOFError, OSError):
            pass  # the server is gone
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        batcher.step(timeout=None)


def warm_up(batcher: Any) -> dict[str, BaseFacts]:
    """Draw a picture with each base, and say what each is. Whatever stands in the way is raised."""
    reports: list[Any] = []
    report, batcher._report = batcher._report, reports.append
    facts = {}
    for name, base in batcher.bases.items():
        width, height = base.default_size
        drawing = Drawing(id="", model=name, prompt="a", width=width, height=height, seed=0, steps=2, guidance_scale=2.0)
        batcher.submit(drawing)
        while batcher.working:
            batcher.step(timeout=0.05)
        failed = next((each for each in reports if hasattr(each, "kind")), None)
        if failed is not None:
            raise RuntimeError(f"model {name!r} cannot draw: {failed.message}")
        facts[name] = BaseFacts(base.handle.base, width, height, base.multiple)
    batcher._report = report
    return facts
