"""Running a server: `serve` until it is told to end, `running` for as long as a block lasts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from perfusion.serve.app import create_app
from perfusion.serve.settings import Settings

__all__ = ["running", "serve"]

CONNECTIONS = 4096  # at once; more are answered 503


log = logging.getLogger("perfusion.serve")


class _Http(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            host, port = server.sockets[0].getsockname()[:2]
            log.info("listening", extra={"fields": {"url": f"http://{host}:{port}"}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.config.app.state.server.drain()  # uvicorn waits until every request is answered
        super().handle_exit(sig, frame)


def _http(settings: Settings, app: Any) -> _Http:
    config = uvicorn.Config(
        app, settings.host, settings.port, log_config=None, access_log=False, server_header=False, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=round(settings.grace) + 1, h11_max_incomplete_event_size=64 * 2**10,
    )  # fmt: skip
    return _Http(config)


def serve(settings: Settings, **parts: Any) -> None:
    """Serve until Ctrl-C or SIGTERM; then what is being drawn is finished, and what waits is refused. parts: of `create_app`."""
    _http(settings, create_app(settings, **parts)).run()


@contextlib.contextmanager
def running(settings: Settings, *, timeout: float = 600.0, **parts: Any) -> Iterator[str]:
    """A server in a thread of this program, ready, and its address. Port 0 is a free one. TimeoutError where it is not ready in time."""
    listening = socket.create_server((settings.host, settings.port))
    settings = dataclasses.replace(settings, port=listening.getsockname()[1])
    app = create_app(settings, **parts)
    http = _http(settings, app)
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + timeout
        while not app.state.server.pool.ready:
            if time.monotonic() > until or not thread.is_alive():
                raise TimeoutError(f"the server was not ready in {timeout:g} s; its log says why")
            time.sleep(0.02)
        yield f"http://{settings.host}:{settings.port}"
    finally:
        app.state.server.drain()
        http.should_exit = True
        thread.join(settings.grace + 10)
        listening.close()
