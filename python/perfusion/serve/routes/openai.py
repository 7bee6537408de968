"""OpenAI's images API and list of models, with this project's fields beside theirs."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import Field, ValidationError
from pydantic_core import from_json

from perfusion.serve.concepts import shown
from perfusion.serve.drawing import Drawing, Picture
from perfusion.serve.errors import ApiError, field_at
from perfusion.serve.images import BadPicture, mask_of, read_picture, rgb_of
from perfusion.serve.routes.access import Drawer, Namespace, ServerOf
from perfusion.serve.routes.drawings import PictureFields, make, model_of, outcome, outcomes, size_of, suited_to, tickets_of
from perfusion.serve.server import Server

router = APIRouter(prefix="/v1", tags=["pictures"])

STREAM = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Pictures, or events of a stream"}}


class Generation(PictureFields):
    """`POST /v1/images/generations`."""

    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    response_format: Literal["b64_json"] | None = None
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    quality: Any = None
    style: Any = None
    background: Any = None
    moderation: Any = None
    user: Any = None
    input_fidelity: Any = None


@router.post("/images/generations", responses=STREAM)
async def generate(request: Request, server: ServerOf, principal: Drawer, namespace: Namespace, body: Generation) -> Any:
    """Draw pictures of a prompt."""
    drawings = await run_in_threadpool(make, server, namespace, body, **_output(body))
    return await _answer(request, server, principal.name, drawings, bool(body.stream))


def _output(body: Generation) -> dict[str, Any]:
    if body.stream and body.n != 1:
        raise ApiError(400, "n must be 1 where the picture is streamed", param="n")
    quality = 90 if body.output_compression is None else body.output_compression
    return {"format": body.output_format, "quality": quality, "previews": (body.partial_images or 0) if body.stream else 0}


async def _answer(request: Request, server: Server, key: str, drawings: list[Drawing], stream: bool) -> Any:
    if stream:
        events = _events(server, key, drawings[0])
        first = await anext(events)  # what refuses the request does so before an answer is begun
        return StreamingResponse(_chain(first, events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    pictures = await outcomes(request, server, key, drawings)
    first = drawings[0]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": _text(picture), "seed": drawing.seed} for drawing, picture in zip(drawings, pictures)],
        "size": f"{first.width}x{first.height}", "output_format": first.format, "model": first.model, "steps": first.steps,
    }  # fmt: skip


def _text(picture: Picture) -> str:
    return base64.b64encode(picture.data).decode()


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for each in rest:
        yield each


async def _events(server: Server, key: str, drawing: Drawing) -> AsyncIterator[str]:
    about = {
        "created_at": int(time.time()), "size": f"{drawing.width}x{drawing.height}", "output_format": drawing.format, "quality": "auto",
        "background": "opaque", "steps": drawing.steps, "seed": drawing.seed,
    }  # fmt: skip
    async with tickets_of(server, key, [drawing]) as (ticket,):
        yield ": accepted\n\n"
        index = 0
        while (picture := await ticket.shown.get()) is not None:
            kind = "image_generation.partial_image"
            yield event(kind, {**about, "b64_json": _text(picture), "partial_image_index": index, "step": picture.step})
            index += 1
        try:
            picture = outcome(server, ticket.result.result())
        except ApiError as error:
            yield event("error", error.body)
            return
        kind = "image_generation.completed"
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
        yield event(kind, {**about, "b64_json": _text(picture), "usage": usage})


def event(kind: str, data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


Images = Annotated[list[UploadFile], File(description="One picture.")]
Listed = Annotated[list[UploadFile], File(alias="image[]", description="The same, as clients send it that have a list of one.")]


def _one(images: list[UploadFile]) -> UploadFile:
    if len(images) != 1:
        raise ApiError(400, f"image: give one picture to draw from, got {len(images) or 'none'}", param="image")
    return images[0]


async def _picture(server: Server, param: str, file: UploadFile) -> Any:
    try:
        return await run_in_threadpool(read_picture, await file.read(), server.settings.pixels)
    except BadPicture as error:
        raise ApiError(400, f"{param}: the picture cannot be read: {error}", param=param) from None


async def form_fields(request: Request, kind: type[PictureFields], without: tuple[str, ...]) -> Any:
    """The text fields of a form as a model's fields; lists and objects come as JSON text. ApiError."""
    form = await request.form()
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name.removesuffix("[]") in without or not isinstance(value, str):
            continue
        values[name] = value
        if name in ("concepts", "strength", "beta", "tau"):
            try:
                values[name] = from_json(value)
            except ValueError:
                raise ApiError(400, f"{name}: not JSON text", param=name) from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = field_at(first["loc"])
        raise ApiError(400, f"{where}: {first['msg']}", param=where) from None


@router.post("/images/edits")
async def edit(
    request: Request, server: ServerOf, principal: Drawer, namespace: Namespace,
    prompt: Annotated[str, Form(min_length=1, max_length=4000)], image: Images = (), images: Listed = (),
    mask: Annotated[UploadFile | None, File()] = None, image_strength: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = 0.8,
) -> Any:  # fmt: skip
    """Draw a picture anew from one that is given: all of it, or where the mask is transparent."""
    body = await form_fields(request, Generation, ("image", "mask", "image_strength"))
    drawings = await _from_image(server, namespace, body, _one([*image, *images]), mask, image_strength)
    return await _answer(request, server, principal.name, drawings, bool(body.stream))


@router.post("/images/variations")
async def vary(
    request: Request, server: ServerOf, principal: Drawer, namespace: Namespace,
    image: Images = (), images: Listed = (), image_strength: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = 0.6,
) -> Any:  # fmt: skip
    """Draw pictures that are like one that is given."""

    class Variation(Generation):
        prompt: str = Field("a picture", min_length=1, max_length=4000)

    body = await form_fields(request, Variation, ("image", "image_strength"))
    drawings = await _from_image(server, namespace, body, _one([*image, *images]), None, image_strength)
    return await _answer(request, server, principal.name, drawings, False)


async def _from_image(
    server: Server, namespace: str, body: Generation, image: UploadFile, mask: UploadFile | None, image_strength: float
) -> list[Drawing]:
    model = model_of(server, body.model)
    width, height = size_of(server, model, body.size)
    picture = await _picture(server, "image", image)
    more: dict[str, Any] = {"image": rgb_of(picture, width, height), "image_strength": image_strength, "width": width, "height": height}
    if mask is not None:
        more["mask"] = mask_of(await _picture(server, "mask", mask), width, height, transparent=True)
    elif picture.has_transparency_data:
        more["mask"] = mask_of(picture, width, height, transparent=True)
    return await run_in_threadpool(make, server, namespace, body, **_output(body), **more)


@router.get("/models")
def models(server: ServerOf, principal: Drawer, namespace: Namespace) -> Any:
    """The bases, and the concepts of the namespace."""
    return {"object": "list", "data": _models(server, namespace)}


@router.get("/models/{model}")
def model(server: ServerOf, principal: Drawer, namespace: Namespace, model: str) -> Any:
    """One of them."""
    found = next((each for each in _models(server, namespace) if each["id"] == model), None)
    if found is None:
        raise ApiError(404, f"there is no model {model!r}", param="model", code="model_not_found")
    return found


def _models(server: Server, namespace: str) -> list[dict[str, Any]]:
    bases = [
        {
            "id": name, "object": "model", "created": 0, "owned_by": "perfusion", "kind": "base", "family": facts.base.family,
            "size": f"{facts.width}x{facts.height}", "multiple": facts.multiple, **suited_to(server, name),
        }
        for name, facts in server.pool.bases.items()
    ]  # fmt: skip
    concepts = [shown(row) for row in server.library.list(namespace)]
    return bases + [
        {
            "id": f"{base}:{each['name']}", "object": "model", "created": each["created"], "owned_by": namespace, "kind": "concept",
            "superclass": each["superclass"],
        }
        for each in concepts for base in each["models"]
    ]  # fmt: skip
