"""Health, metrics and keys."""

from __future__ import annotations

import hmac
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from perfusion.serve.errors import ApiError
from perfusion.serve.routes.access import NAME, Admin, ServerOf
from perfusion.serve.routes.drawings import Strict

router = APIRouter(tags=["operations"])


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Any:
    """The process lives."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"description": "Not yet, or not any more"}})
async def ready(server: ServerOf) -> Any:
    """A worker has drawn its first picture and waits for more."""
    if not server.pool.ready:
        raise ApiError(503, "no worker is ready", code="not_ready", retry_after=5)
    return {"status": "ready", "models": list(server.pool.bases)}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(server: ServerOf, authorization: Annotated[str, Header()] = "") -> Response:
    """For Prometheus."""
    wanted = server.settings.metrics_key
    if wanted is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {wanted}".encode()):
        raise ApiError(401, "the metrics of this server have a key", code="invalid_api_key")
    text = server.metrics.text(len(server.pool.waiting), server.pool.drawing)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


class NewKey(Strict):
    name: str = Field(max_length=32)
    scopes: list[str] = Field(max_length=8)
    concepts: int | None = Field(None, ge=0, le=10**9)


@router.get("/v1/keys")
def keys(server: ServerOf, principal: Admin) -> Any:
    """Names and scopes; keys themselves are not kept."""
    return {"object": "list", "data": server.keys.list()}


@router.post("/v1/keys", status_code=201)
async def add(server: ServerOf, principal: Admin, body: NewKey) -> Any:
    """Make a key; it is shown this once."""
    try:
        key = await run_in_threadpool(server.keys.add, body.name, body.scopes, body.concepts)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    return {"object": "key", "name": body.name, "scopes": sorted(set(body.scopes)), "concepts": body.concepts, "key": key}


@router.delete("/v1/keys/{name}")
def revoke(server: ServerOf, principal: Admin, name: Annotated[str, Path(pattern=NAME)]) -> Any:
    """Revoke a key. Concepts of its namespace stay."""
    if not server.keys.revoke(name):
        raise ApiError(404, f"there is no key named {name!r}", code="key_not_found")
    return {"id": name, "object": "key", "deleted": True}
