"""From what a request says to `Drawing`s, and from outcomes to what a client is told. All picture APIs go this way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import numpy
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from perfusion.families import family_by_id
from perfusion.prompts import PromptError, parse_prompt
from perfusion.serve.drawing import ConceptUse, Drawing, Failure, Picture
from perfusion.serve.errors import ApiError
from perfusion.serve.images import BadPicture, from_base64, mask_of, read_picture
from perfusion.serve.pool import Busy, Ticket
from perfusion.serve.server import Server
from perfusion.settings import BIAS, STRENGTH, TEMPERATURE, Setting

__all__ = ["ConceptField", "PictureFields", "begin", "outcome", "outcomes", "size_of", "suited_to"]

log = logging.getLogger("perfusion.serve")

MOST_CONCEPTS = 8
MASK_SIDE = 64  # regions are as fine as the latents of a picture, at most
_TAG = re.compile(r"<(?:perfusion:)?([A-Za-z0-9][\w-]{0,31})(?::[^<>|]*)?(?:\|[^<>]*)?>")  # as `perfusion.prompts` reads them
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def _schedule(setting: Setting) -> Any:
    number = Annotated[float, Field(ge=setting.low, le=setting.high, allow_inf_nan=False)]
    return Annotated[number | Annotated[list[number], Field(min_length=1, max_length=1000)] | None, Field(description=setting.help)]


Strength, Beta, Tau = (_schedule(setting) for setting in (STRENGTH, BIAS, TEMPERATURE))
Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Region(Strict):
    """Where in the picture a concept acts: a box in parts of it, left, top, right, bottom, or a mask, a PNG in base64."""

    box: tuple[Part, Part, Part, Part] | None = None
    mask: str | None = None


class ConceptField(Strict):
    """A concept of the prompt and its settings."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w-]{0,31}$")
    concept: str | None = Field(None, pattern="^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")
    strength: Strength = None
    beta: Beta = None
    tau: Tau = None
    region: Region | None = None


class PictureFields(Strict):
    """What all ways to a picture share."""

    prompt: str = Field(min_length=1, max_length=4000)
    model: str | None = Field(None, max_length=128)
    n: int = Field(1, ge=1, le=10)
    size: str | None = Field(None, max_length=16, description="WIDTHxHEIGHT, or auto")
    negative_prompt: str = Field("", max_length=4000)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    steps: int | None = Field(None, ge=1, description="by default what suits the model, or as many as the server allows")
    guidance_scale: float | None = Field(None, ge=0, le=30, allow_inf_nan=False, description="by default what suits the model")
    strength: Strength = None
    beta: Beta = None
    tau: Tau = None
    gate: str | None = Field(None, pattern="^(similarity|word)$")
    key_lock: str | None = Field(None, pattern="^(local|global)$")
    concepts: list[ConceptField] = Field(default_factory=list, max_length=MOST_CONCEPTS)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, values: Any) -> Any:
        """As OpenAI's API has it."""
        return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values


def size_of(server: Server, model: str, text: str | None, fallback: tuple[int, int] | None = None) -> tuple[int, int]:
    """Width and height that a request asks for. ApiError where they break a rule."""
    facts = server.pool.bases[model]
    if text in (None, "auto"):
        width, height = fallback or (facts.width, facts.height)
    else:
        found = _SIZE.fullmatch(text)
        if found is None:
            raise ApiError(400, f"size must be WIDTHxHEIGHT, such as {facts.width}x{facts.height}, or auto", param="size")
        width, height = int(found[1]), int(found[2])
    if width % facts.multiple or height % facts.multiple:
        raise ApiError(400, f"size: sides must be multiples of {facts.multiple}, got {width}x{height}", param="size")
    if width * height > server.settings.pixels:
        raise ApiError(400, f"size: a picture has at most {server.settings.pixels} pixels, got {width}x{height}", param="size")
    return width, height


def model_of(server: Server, name: str | None) -> str:
    """The base that a request means. ApiError."""
    if not server.pool.bases:
        raise ApiError(503, "the server is starting; its models are being loaded", code="not_ready", retry_after=5)
    if name is None:
        return next(iter(server.settings.models))
    base = name.partition(":")[0]
    if base not in server.pool.bases:
        raise ApiError(404, f"there is no model {name!r}; there are {', '.join(server.pool.bases)}", param="model", code="model_not_found")
    return base


def suited_to(server: Server, model: str) -> dict[str, Any]:
    """`steps` and `guidance_scale` of a request that leaves them out."""
    family = family_by_id(server.pool.bases[model].base.family)
    return {"steps": min(family.steps, server.settings.most_steps), "guidance_scale": family.guidance_scale}


def make(server: Server, namespace: str, fields: PictureFields, **more: Any) -> list[Drawing]:
    """The drawings of a request, one per picture. Looks into the database: call it from a thread. more: further fields of them."""
    model = model_of(server, fields.model)
    if "width" not in more:
        more["width"], more["height"] = size_of(server, model, fields.size)
    suited = suited_to(server, model)
    steps = suited["steps"] if fields.steps is None else fields.steps
    guidance_scale = suited["guidance_scale"] if fields.guidance_scale is None else fields.guidance_scale
    if steps > server.settings.most_steps:
        raise ApiError(400, f"steps must be at most {server.settings.most_steps}, got {steps}", param="steps")
    room = min(server.settings.queue, server.settings.queue_per_key)
    if fields.n > room:
        raise ApiError(400, f"n: at most {room} pictures of a key may wait, so no more are taken at once, got {fields.n}", param="n")
    seed = secrets.randbelow(2**31) if fields.seed is None else fields.seed
    if seed + fields.n - 1 >= 2**63:
        raise ApiError(400, "seed: seeds of several pictures count up, and pass 2^63 - 1", param="seed")
    uses = _concepts(server, namespace, fields)
    if server.settings.log_prompts:
        asked = {"namespace": namespace, "prompt": fields.prompt, "negative_prompt": fields.negative_prompt, "seed": seed}
        log.info("drawing", extra={"fields": asked})
    return [
        Drawing(
            id=uuid.uuid4().hex, model=model, prompt=fields.prompt, negative_prompt=fields.negative_prompt, seed=seed + number,
            steps=steps, guidance_scale=guidance_scale, concepts=uses, strength=_plain(fields.strength),
            bias=_plain(fields.beta), temperature=_plain(fields.tau), gate=fields.gate, key_lock=fields.key_lock, **more,
        )
        for number in range(fields.n)
    ]  # fmt: skip


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _concepts(server: Server, namespace: str, fields: PictureFields) -> tuple[ConceptUse, ...]:
    """The concepts that the prompts name, found in the namespace. ApiError for one that is not there."""
    listed: dict[str, ConceptField] = {}
    for number, each in enumerate(fields.concepts):
        if each.name.lower() in listed:
            raise ApiError(400, f"concepts: {each.name!r} is listed twice", param=f"concepts.{number}.name")
        listed[each.name.lower()] = each
    texts = (fields.prompt, fields.negative_prompt)
    named = list(dict.fromkeys(name.lower() for text in texts for name in _TAG.findall(text)))
    unnamed = [name for name in listed if name not in named]
    if unnamed:
        raise ApiError(400, f"concepts: the prompt does not name <{unnamed[0]}>", param="concepts")
    if len(named) > MOST_CONCEPTS:
        raise ApiError(400, f"a prompt may name {MOST_CONCEPTS} concepts, and this one names {len(named)}", param="prompt")
    stored = {name: (listed[name].concept or name).lower() if name in listed else name for name in named}
    rows = server.library.find(namespace, set(stored.values()))
    for name, concept in stored.items():
        if concept not in rows:
            some = [row["name"] for row in server.library.list(namespace, 10)]
            yours = f"yours are {', '.join(some)}" + (", …" if len(some) == 10 else "") if some else "you have none"
            message = f"you have no concept named {concept!r}, which <{name}> asks for; {yours}"
            raise ApiError(404, message, param="prompt", code="concept_not_found")
    try:
        for text in texts:
            parse_prompt(text, {name: rows[concept]["superclass"] for name, concept in stored.items()})
    except PromptError as error:
        raise ApiError(400, str(error), param="prompt") from None
    uses, places = [], list(listed)
    for name, concept in stored.items():
        given = listed.get(name, ConceptField(name=name))
        region = None if given.region is None else _region(server, given.region, places.index(name))
        settings = dict(strength=_plain(given.strength), bias=_plain(given.beta), temperature=_plain(given.tau), region=region)
        uses.append(ConceptUse(name, rows[concept]["digest"], **settings))
    return tuple(uses)


def _region(server: Server, region: Region, number: int) -> numpy.ndarray:
    param = f"concepts.{number}.region"
    if (region.box is None) == (region.mask is None):
        raise ApiError(400, "region: give either a box or a mask", param=param)
    if region.box is None:
        try:
            image = read_picture(from_base64(region.mask, server.settings.body), server.settings.pixels)
        except BadPicture as error:
            raise ApiError(400, f"region: the mask cannot be read: {error}", param=param) from None
        return mask_of(image, MASK_SIDE, MASK_SIDE)
    left, top, right, bottom = (round(part * MASK_SIDE) for part in region.box)
    if left >= right or top >= bottom:
        raise ApiError(400, "region: a box is left, top, right, bottom, and this one is empty", param=param)
    mask = numpy.zeros((MASK_SIDE, MASK_SIDE), numpy.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def begin(server: Server, key: str, drawings: Sequence[Drawing]) -> list[Ticket]:
    """Hand drawings to the workers. ApiError where there is no room."""
    if server.pool.closing:
        raise ApiError(503, "the server is shutting down; try again", code="closing", retry_after=5)
    if not server.pool.bases:
        raise ApiError(503, "the server is starting; its models are being loaded", code="not_ready", retry_after=5)
    try:
        return server.pool.submit(key, list(drawings))
    except Busy as error:
        raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from None


def outcome(server: Server, result: Picture | Failure) -> Picture:
    """The picture, or the ApiError that says why there is none."""
    if isinstance(result, Picture):
        return result
    if result.kind == "invalid":
        raise ApiError(400, result.message, param="prompt")
    if result.kind == "conflict":
        raise ApiError(409, result.message, param="prompt", code="damaged_concept")
    if result.kind == "memory":
        raise ApiError(400, result.message, param="size", code="out_of_memory")
    if result.kind in ("timeout", "closing"):
        raise ApiError(503, result.message, code=result.kind, retry_after=5)
    raise ApiError(503, result.message, code="worker", retry_after=1)


@contextlib.asynccontextmanager
async def tickets_of(server: Server, key: str, drawings: Sequence[Drawing]) -> AsyncIterator[list[Ticket]]:
    """Tickets, cancelled on the way out where nobody waits for them any more."""
    tickets = begin(server, key, drawings)
    try:
        yield tickets
    finally:
        for ticket in tickets:
            server.pool.cancel(ticket)


async def outcomes(request: Request, server: Server, key: str, drawings: Sequence[Drawing]) -> list[Picture]:
    """All pictures; none is drawn on once the client is gone."""
    async with tickets_of(server, key, drawings) as tickets:
        gone = asyncio.create_task(_gone(request))
        try:
            for ticket in tickets:
                await asyncio.wait([ticket.result, gone], return_when=asyncio.FIRST_COMPLETED)
                if not ticket.result.done():
                    raise ApiError(499, "the client closed the connection", code="closed")
            return [outcome(server, ticket.result.result()) for ticket in tickets]
        finally:
            gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
