"""Training jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Path, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from perfusion.serve.concepts import NameTaken, QuotaReached
from perfusion.serve.errors import ApiError
from perfusion.serve.images import BadPicture, read_picture
from perfusion.serve.jobs import OVER, shown
from perfusion.serve.keys import Principal
from perfusion.serve.routes.access import Namespace, ServerOf, Trainer
from perfusion.serve.routes.drawings import model_of
from perfusion.serve.routes.openai import event
from perfusion.serve.server import Server

router = APIRouter(prefix="/v1", tags=["training"])

Id = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
Rate = Form(gt=0, le=1, allow_inf_nan=False)


@router.post("/concepts/train", status_code=202)
async def train(
    server: ServerOf, principal: Trainer, namespace: Namespace,
    pictures: Annotated[list[UploadFile], File(max_length=32)],
    name: Annotated[str, Form(max_length=32)],
    superclass: Annotated[str, Form(min_length=1, max_length=64)],
    masks: Annotated[list[UploadFile] | None, File(max_length=32)] = None,
    captions: Annotated[list[str] | None, Form(max_length=32)] = None,
    model: Annotated[str | None, Form(max_length=128)] = None,
    steps: Annotated[int, Form(ge=1, le=5000)] = 400,
    batch_size: Annotated[int, Form(ge=1, le=64)] = 16,
    learning_rate: Annotated[float, Rate] = 0.03,
    word_learning_rate: Annotated[float, Rate] = 0.006,
    flip: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = 0.5,
    seed: Annotated[int, Form(ge=0, le=2**63 - 1)] = 0,
    preview_every: Annotated[int, Form(ge=0, le=5000)] = 100,
    license: Annotated[str, Form(max_length=64)] = "",
    author: Annotated[str, Form(max_length=64)] = "",
) -> Any:  # fmt: skip
    """Learn a concept from pictures."""
    if not server.settings.train:
        raise ApiError(403, "this server takes no training jobs", code="training_off")
    base = model_of(server, model)
    settings = dict(
        name=name, superclass=superclass, steps=steps, batch_size=batch_size, learning_rate=learning_rate, flip=flip, seed=seed,
        word_learning_rate=word_learning_rate, validation_every=preview_every, checkpoint_every=25, license=license, author=author,
    )  # fmt: skip
    read = [await _images(server, param, files) for param, files in (("pictures", pictures), ("masks", masks or []))]
    quota = server.settings.concepts if principal.concepts is None else principal.concepts
    if await run_in_threadpool(server.library.count, namespace) >= quota:
        raise ApiError(429, f"you have {quota} concepts, which is your quota; delete one first", code="quota", retry_after=3600)
    try:
        row = await run_in_threadpool(server.jobs.create, namespace, base, settings, *read, captions or [])
    except NameTaken as error:
        raise ApiError(409, str(error), param="name", code="name_taken") from None
    except QuotaReached as error:
        raise ApiError(429, str(error), code="quota", retry_after=60) from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    server.jobs.wake()
    return shown(row)


async def _images(server: Server, param: str, files: list[UploadFile]) -> list[Any]:
    images = []
    for number, file in enumerate(files):
        try:
            images.append(await run_in_threadpool(read_picture, await file.read(), 16 * server.settings.pixels))
        except BadPicture as error:
            raise ApiError(400, f"{param}: number {number} cannot be read: {error}", param=param) from None
    return images


def _row(server: Server, principal: Principal, id: str) -> dict[str, Any]:
    row = server.jobs.find(None if "admin" in principal.scopes else principal.name, id)
    if row is None:
        raise ApiError(404, "you have no such job", code="job_not_found")
    return row


@router.get("/jobs")
def listed(server: ServerOf, principal: Trainer, namespace: Namespace) -> Any:
    """The jobs of the namespace, the newest first."""
    return {"object": "list", "data": [shown(row) for row in server.jobs.list(namespace)]}


@router.get("/jobs/{id}")
def inspect(server: ServerOf, principal: Trainer, id: Id) -> Any:
    """One job."""
    return shown(_row(server, principal, id))


@router.get("/jobs/{id}/events", responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}})
async def events(server: ServerOf, principal: Trainer, id: Id) -> StreamingResponse:
    """What happens in a job, as it happens."""
    await run_in_threadpool(_row, server, principal, id)

    async def stream() -> AsyncIterator[str]:
        async for kind, data in server.jobs.events(id):
            yield event(kind, data) if kind else ": \n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@router.post("/jobs/{id}/cancel")
def cancel(server: ServerOf, principal: Trainer, id: Id) -> Any:
    """Stop a job; its checkpoint is kept. Nothing happens to one that is over."""
    _row(server, principal, id)
    server.jobs.cancel(id)
    return shown(_row(server, principal, id))


@router.post("/jobs/{id}/resume")
async def resume(server: ServerOf, principal: Trainer, id: Id) -> Any:
    """Go on with a job that was cancelled or failed."""
    row = await run_in_threadpool(_row, server, principal, id)
    if not await run_in_threadpool(server.jobs.resume, id):
        raise ApiError(409, f"the job is {row['status']}; only one that was cancelled or failed goes on", code="status")
    server.jobs.wake()
    return shown(await run_in_threadpool(_row, server, principal, id))


@router.delete("/jobs/{id}")
def delete(server: ServerOf, principal: Trainer, id: Id) -> Any:
    """Forget a job; one that waits or runs is cancelled first."""
    row = _row(server, principal, id)
    if row["status"] not in OVER:
        server.jobs.cancel(id)
    server.jobs.remove(id)
    return {"id": id, "object": "job", "deleted": True}
