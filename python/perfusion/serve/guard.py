"""`Guard`: what every request passes before a route sees it: its size, the patience with slow senders, and where it may come from."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from perfusion.serve.errors import ApiError, error_response
from perfusion.serve.metrics import Metrics
from perfusion.serve.settings import Settings

__all__ = ["Guard"]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PATIENCE = 30.0  # seconds without a byte of a request's body

log = logging.getLogger("perfusion.serve.access")

Message = MutableMapping[str, Any]


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, read, complete = time.monotonic(), 0, 0, False
        refused: ApiError | None = None
        answered = False

        async def limited() -> Message:
            nonlocal read, complete, refused
            if complete:
                return await receive()  # what comes now is the end of the connection
            try:
                message = await asyncio.wait_for(receive(), PATIENCE)
            except asyncio.TimeoutError:
                refused = ApiError(408, "the request's body did not come in time", code="timeout")
                raise refused from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self.settings.body:
                refused = self._too_large()
                raise refused
            return message

        async def noted(message: Message) -> None:
            nonlocal status, answered
            if answered:
                return
            if refused is not None and not status:  # whoever read the body made another error of it
                answered, status = True, refused.status
                await error_response(refused)(scope, receive, send)
                return
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, limited, noted)
        except ApiError as error:  # raised here, or while the body was read
            if not status:
                refused = None
                await error_response(error)(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status or 499).inc()
            log.info(
                "request",
                extra={
                    "fields": {
                        "method": scope["method"], "route": route, "status": status or 499,
                        "milliseconds": round(1000 * (time.monotonic() - started)), "key": scope.get("perfusion.key"),
                    }
                },
            )  # fmt: skip

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request may have {self.settings.body} bytes at most", code="too_large")

    def _check(self, scope: Message) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get(b"content-length", "")
        if length.isdigit() and int(length) > self.settings.body:
            raise self._too_large()
        host = headers.get(b"host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if (self.settings.loopback or self.settings.hosts) and name not in (*LOOPBACK, *self.settings.hosts):
            raise ApiError(403, "this server does not answer to that host name; start it with --allow-host NAME", code="host")
        origin = headers.get(b"origin")
        if origin and origin not in self.settings.origins and "*" not in self.settings.origins and urlsplit(origin).netloc != host:
            raise ApiError(403, "pages of other sites may not call this server; start it with --origin SITE", code="origin")
