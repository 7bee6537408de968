"""The part of A1111's web API that programs use: txt2img, img2img, progress, models."""

from __future__ import annotations

import base64
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from perfusion.serve.errors import ApiError
from perfusion.serve.images import BadPicture, from_base64, mask_of, read_picture, rgb_of
from perfusion.serve.routes.access import Drawer, Namespace, ServerOf
from perfusion.serve.routes.drawings import PictureFields, make, model_of, outcomes, size_of
from perfusion.serve.server import Server

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])


class Overrides(BaseModel):
    """Of A1111's `override_settings`: which model draws."""

    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: str | None = Field(None, max_length=128)


class TextToImage(BaseModel):
    """The fields that are read; the many others of A1111 are passed over."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field("", max_length=4000)
    negative_prompt: str = Field("", max_length=4000)
    seed: int = Field(-1, ge=-1, le=2**62)
    steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=30, allow_inf_nan=False)
    width: int | None = Field(None, ge=8, le=16384)
    height: int | None = Field(None, ge=8, le=16384)
    batch_size: int = Field(1, ge=1, le=10)
    n_iter: int = Field(1, ge=1, le=10)
    override_settings: Overrides = Field(default_factory=lambda: Overrides())


class ImageToImage(TextToImage):
    init_images: list[str] = Field(min_length=1, max_length=1)
    denoising_strength: float = Field(0.75, ge=0, le=1, allow_inf_nan=False)
    mask: str | None = None


@router.post("/txt2img")
async def txt2img(request: Request, server: ServerOf, principal: Drawer, namespace: Namespace, body: TextToImage) -> Any:
    """Draw pictures of a prompt."""
    return await _draw(request, server, principal.name, namespace, body, {})


@router.post("/img2img")
async def img2img(request: Request, server: ServerOf, principal: Drawer, namespace: Namespace, body: ImageToImage) -> Any:
    """Draw pictures from one that is given."""
    width, height = _size(server, body)
    image = rgb_of(await _picture(server, "init_images", body.init_images[0]), width, height)
    more: dict[str, Any] = {"image": image, "image_strength": body.denoising_strength}
    if body.mask is not None:
        more["mask"] = mask_of(await _picture(server, "mask", body.mask), width, height)
    return await _draw(request, server, principal.name, namespace, body, more)


async def _picture(server: Server, param: str, text: str) -> Any:
    try:
        return await run_in_threadpool(read_picture, from_base64(text, server.settings.body), server.settings.pixels)
    except BadPicture as error:
        raise ApiError(400, f"{param}: the picture cannot be read: {error}", param=param) from None


def _size(server: Server, body: TextToImage) -> tuple[int, int]:
    model = model_of(server, body.override_settings.sd_model_checkpoint)
    facts = server.pool.bases[model]
    return size_of(server, model, f"{body.width or facts.width}x{body.height or facts.height}")


async def _draw(request: Request, server: Server, key: str, namespace: str, body: TextToImage, more: dict[str, Any]) -> Any:
    if body.batch_size * body.n_iter > 10:
        raise ApiError(400, "batch_size times n_iter must be at most 10", param="n_iter")
    width, height = _size(server, body)
    fields = PictureFields(
        prompt=body.prompt or " ", negative_prompt=body.negative_prompt, n=body.batch_size * body.n_iter, steps=body.steps,
        seed=None if body.seed == -1 else body.seed, guidance_scale=body.cfg_scale, model=body.override_settings.sd_model_checkpoint,
    )  # fmt: skip
    drawings = await run_in_threadpool(make, server, namespace, fields, width=width, height=height, **more)
    pictures = await outcomes(request, server, key, drawings)
    seeds = [drawing.seed for drawing in drawings]
    info = {
        "prompt": body.prompt, "negative_prompt": body.negative_prompt, "seed": seeds[0], "all_seeds": seeds, "width": width,
        "height": height, "steps": drawings[0].steps, "cfg_scale": drawings[0].guidance_scale, "sd_model_name": drawings[0].model,
    }  # fmt: skip
    images = [base64.b64encode(picture.data).decode() for picture in pictures]
    return {"images": images, "parameters": body.model_dump(), "info": json.dumps(info)}


@router.get("/progress")
async def progress(server: ServerOf, principal: Drawer) -> Any:
    """Of what the key is having drawn: the share of steps that are done."""
    tickets = server.pool.tickets(principal.name)
    done, total = (sum(each) for each in zip(*((ticket.step, ticket.drawing.steps) for ticket in tickets))) if tickets else (0, 0)
    state = {"job_count": len(tickets), "sampling_step": done, "sampling_steps": total, "skipped": False, "interrupted": False}
    return {"progress": done / total if total else 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}


@router.get("/sd-models")
async def sd_models(server: ServerOf, principal: Drawer) -> Any:
    """The bases."""
    return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name} for name in server.pool.bases]
