"""Concepts: upload, list, inspect, download, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Path, Response, UploadFile
from fastapi.concurrency import run_in_threadpool

from perfusion.serve.concepts import MOST_BYTES, NameTaken, QuotaReached, shown
from perfusion.serve.errors import ApiError
from perfusion.serve.routes.access import NAME, Drawer, Namespace, ServerOf, Uploader
from perfusion.serve.server import Server
from perfusion.serve.store import DamagedFile

router = APIRouter(prefix="/v1/concepts", tags=["concepts"])

Name = Annotated[str, Path(pattern=NAME)]


@router.get("")
def listed(server: ServerOf, principal: Drawer, namespace: Namespace) -> Any:
    """The concepts of the namespace."""
    return {"object": "list", "data": [shown(row) for row in server.library.list(namespace)]}


@router.post("", status_code=201)
async def upload(
    server: ServerOf, principal: Uploader, namespace: Namespace,
    file: Annotated[UploadFile, File()], name: Annotated[str | None, Form(max_length=32)] = None,
) -> Any:  # fmt: skip
    """Keep a concept file, once it is checked."""
    bases = {model: facts.base for model, facts in server.pool.bases.items()}
    if not bases:
        raise ApiError(503, "the server is starting; its models are being loaded", code="not_ready", retry_after=5)
    data = await file.read(MOST_BYTES + 1)
    quota = server.settings.concepts if principal.concepts is None else principal.concepts
    try:
        row = await run_in_threadpool(server.library.add, namespace, name or None, data, bases, quota)
    except NameTaken as error:
        raise ApiError(409, str(error), param="name", code="name_taken") from None
    except QuotaReached as error:
        raise ApiError(429, str(error), code="quota", retry_after=3600) from None
    except ValueError as error:
        raise ApiError(400, str(error), param="file") from None
    return shown(row)


def _row(server: Server, namespace: str, name: str) -> dict[str, Any]:
    row = server.library.find(namespace, [name]).get(name)
    if row is None:
        raise ApiError(404, f"you have no concept named {name!r}", code="concept_not_found")
    return row


@router.get("/{name}")
def inspect(server: ServerOf, principal: Drawer, namespace: Namespace, name: Name) -> Any:
    """One concept."""
    return shown(_row(server, namespace, name))


@router.get("/{name}/file", response_class=Response, responses={200: {"content": {"application/octet-stream": {}}}})
def file(server: ServerOf, principal: Drawer, namespace: Namespace, name: Name) -> Any:
    """Its file."""
    try:
        data = server.library.store.get(_row(server, namespace, name)["digest"])
    except DamagedFile as error:
        raise ApiError(409, f"{name}: {error}", code="damaged_concept") from None
    headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.delete("/{name}")
async def delete(server: ServerOf, principal: Uploader, namespace: Namespace, name: Name) -> Any:
    """Forget a concept."""
    digest = await run_in_threadpool(server.library.remove, namespace, name)
    if digest is None:
        raise ApiError(404, f"you have no concept named {name!r}", code="concept_not_found")
    server.sweep_later(digest)
    return {"id": name, "object": "concept", "deleted": True}
