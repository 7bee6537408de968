"""`create_app`: the FastAPI application of a server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException

import perfusion
from perfusion.serve.errors import ApiError, error_response, field_at
from perfusion.serve.guard import Guard
from perfusion.serve.routes import concepts, jobs, openai, operations, sdapi
from perfusion.serve.server import Server
from perfusion.serve.settings import Settings

__all__ = ["create_app"]

log = logging.getLogger("perfusion.serve")


def create_app(settings: Settings, **parts: Any) -> FastAPI:
    """An ASGI application: its lifespan starts and ends the workers. `app.state.server` is its Server, which is made with `parts`."""
    server = Server(settings, **parts)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server.running():
            yield

    app = FastAPI(title="perfusion", version=perfusion.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    for module in (openai, concepts, jobs, operations, sdapi):
        app.include_router(module.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in (OSError, OperationalError):
        app.add_exception_handler(kind, _storage)
    app.add_exception_handler(DataError, _not_kept)
    app.add_exception_handler(Exception, _unexpected)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guard, settings=settings, metrics=server.metrics)
    return app


async def _api_error(request: Request, error: ApiError) -> Any:
    if error.status in (429, 401, 403):
        request.app.state.server.metrics.refused.labels(error.code or str(error.status)).inc()
    return error_response(error)


async def _invalid(request: Request, error: RequestValidationError) -> Any:
    """FastAPI's 422, as OpenAI's clients read it."""
    first = error.errors()[0]
    where = field_at([part for part in first["loc"] if part not in ("body", "query", "path", "header")])
    if first["type"] == "json_invalid":
        where, message = None, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    elif where is None and not request.headers.get("content-type", "").startswith("application/json"):
        message = "the body is not taken for JSON; send it with the header Content-Type: application/json"
    elif first["type"] == "extra_forbidden":
        message = f"there is no field {where!r}"
    else:
        message = f"{where}: {first['msg']}" if where else first["msg"]
    return error_response(ApiError(400, message, param=where))


async def _http(request: Request, error: HTTPException) -> Any:
    status = 400 if error.status_code == 422 else error.status_code
    response = error_response(ApiError(status, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _storage(request: Request, error: Exception) -> Any:
    log.error("storage", extra={"fields": {"error": type(error).__name__, "reason": getattr(error, "strerror", None)}})
    message = "the server's disk or database does not answer, or is full"
    return error_response(ApiError(503, message, code="storage", retry_after=30))


async def _not_kept(request: Request, error: Exception) -> Any:
    """PostgreSQL refuses what SQLite takes: a text with a zero character, a number beyond its column."""
    return error_response(ApiError(400, "a value of this request is none that the server's database can hold"))


async def _unexpected(request: Request, error: Exception) -> Any:
    log.error("unexpected", exc_info=error)
    return error_response(ApiError(500, "something unexpected happened; the server's log says more"))
