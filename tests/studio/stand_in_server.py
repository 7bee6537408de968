"""A server that answers as docs/server.md says, at once and without a model: what the page is tested against.

Pictures are flat colours that tell the request: the seed is the hue, strength is how strong the colour is, β how dark. Every request is kept in `seen`.
"""

from __future__ import annotations

import asyncio
import base64
import colorsys
import io
import json
import threading
import time
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, ImageDraw

FACTS = {
    "object": "concept",
    "namespace": "local",
    "models": ["toybox"],
    "family": "sd1",
    "beta": 0.7,
    "tau": 0.1,
    "license": None,
    "author": "A. Author",
}


BASES = ({"id": "toybox", "steps": 24, "guidance_scale": 2.5}, {"id": "large", "steps": 40, "guidance_scale": 6.0})


class Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", retry: int | None = None):
        super().__init__(message)
        self.status, self.kind, self.retry = status, kind, retry


def png_of(request: dict[str, Any], part: float = 1.0) -> str:
    strength = request.get("strength", 1.0)
    colour = colorsys.hsv_to_rgb((request.get("seed", 0) * 0.37) % 1, min(1.0, 0.2 + 0.4 * strength), 1 - 0.5 * request.get("beta", 0.3))
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 96, round(96 * part)), tuple(round(255 * value) for value in colour))
    for use, fill in zip(request.get("concepts", []), ("#d9480f", "#1c7ed6")):
        region = use.get("region", {})
        if "box" in region:
            draw.rectangle([96 * value for value in region["box"]], fill)
        elif "mask" in region:
            mask = Image.open(io.BytesIO(base64.b64decode(region["mask"]))).convert("L").resize((96, 96))
            image.paste(fill, mask=mask)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def event(kind: str, **data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


class StandIn:
    """`address` once started. key: what requests must carry, None for nothing. refuse: answers the next drawing with this.

    pause: seconds between events. held: a picture's events wait, each, until `go_on` is called.
    """

    def __init__(self, key: str | None = None, pause: float = 0.02):
        self.key, self.pause, self.refuse, self.held = key, pause, None, False
        self.let_go = threading.Semaphore(0)
        self.seen: list[tuple[str, Any]] = []
        self.concepts = {name: self.concept(name, name) for name in ("teddy", "teapot")}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.cancelled = threading.Event()
        self.server = uvicorn.Server(uvicorn.Config(self.app(), host="127.0.0.1", port=0, log_level="error"))

    def __enter__(self) -> StandIn:
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(60)

    def go_on(self) -> None:
        self.let_go.release()

    async def wait(self) -> None:
        await asyncio.sleep(self.pause)
        while self.held and not self.let_go.acquire(blocking=False):
            await asyncio.sleep(0.02)

    @staticmethod
    def concept(name: str, superclass: str) -> dict[str, Any]:
        return {
            **FACTS,
            "name": name,
            "superclass": superclass,
            "id": f"{len(name):064x}",
            "bytes": len(name) * 1000,
            "created": 1_700_000_000,
        }

    def app(self) -> FastAPI:
        def checked(request: Request) -> None:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                raise Refusal(401, "no key was given that this server knows", "authentication_error")

        app = FastAPI(dependencies=[Depends(checked)])

        @app.exception_handler(Refusal)
        async def refused(_: Request, error: Refusal) -> JSONResponse:
            headers = {"Retry-After": str(error.retry)} if error.retry else {}
            body = {"error": {"message": str(error), "type": error.kind, "param": None, "code": None}}
            return JSONResponse(body, error.status, headers)

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"object": "model", "kind": "base", "size": "96x96", **base} for base in BASES]}

        @app.get("/v1/concepts")
        def concepts() -> dict[str, Any]:
            return {"object": "list", "data": list(self.concepts.values())}

        @app.post("/v1/concepts", status_code=201)
        async def upload(file: UploadFile = File(), name: str | None = Form(None)) -> dict[str, Any]:
            if not (await file.read()).startswith(b"concept"):
                raise Refusal(400, "the file is not a Perfusion concept: its header cannot be read")
            name = name or file.filename.removesuffix(".safetensors")
            self.concepts[name] = self.concept(name, "thing")
            return self.concepts[name]

        def found(name: str) -> dict[str, Any]:
            if name not in self.concepts:
                raise Refusal(404, f"there is no concept {name!r}", "not_found_error")
            return self.concepts[name]

        @app.post("/v1/concepts/train", status_code=202)
        async def train(request: Request) -> dict[str, Any]:
            form = await request.form()
            sent = {"pictures": [], "masks": []}  # no comprehension: Python 3.10 has no asynchronous ones within others
            for name, files in sent.items():
                for file in form.getlist(name):
                    files.append(await file.read())
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            self.seen.append(("train", {**fields, **sent}))
            if fields["name"] in self.concepts:
                raise Refusal(409, f"the name {fields['name']!r} is taken", "conflict_error")
            id = f"job-{len(self.jobs)}"
            steps = int(fields["steps"])
            self.jobs[id] = {"id": id, "object": "job", "name": fields["name"], "superclass": fields["superclass"], "status": "queued", "step": 0,
                             "steps": steps, "loss": None, "error": None, "preview_every": int(fields["preview_every"])}  # fmt: skip
            return self.jobs[id]

        @app.get("/v1/jobs")
        def jobs() -> dict[str, Any]:
            return {"object": "list", "data": list(self.jobs.values())}

        @app.get("/v1/jobs/{id}/events")
        def events(id: str) -> StreamingResponse:
            job = self.jobs[id]

            def stream() -> Any:
                job["status"] = "running"
                yield ": there\n\n"
                for step in range(10, job["steps"] + 1, 10):
                    if job["status"] == "cancelled":
                        yield event("cancelled", **job)
                        return
                    time.sleep(self.pause)
                    job.update(step=step, loss=1 / step)
                    yield event("progress", step=step, steps=job["steps"], loss=job["loss"])
                    if job["preview_every"] and step % job["preview_every"] == 0:
                        yield event("preview", step=step, b64_json=png_of({"seed": step}))
                job["status"] = "succeeded"
                self.concepts[job["name"]] = self.concept(job["name"], job["superclass"])
                yield event("succeeded", **job)

            return StreamingResponse(stream(), media_type="text/event-stream")

        @app.post("/v1/jobs/{id}/{action}")
        def act(id: str, action: str) -> dict[str, Any]:
            self.jobs[id]["status"] = {"cancel": "cancelled", "resume": "queued"}[action]
            return self.jobs[id]

        @app.get("/v1/concepts/{name}")
        def one(name: str) -> dict[str, Any]:
            return found(name)

        @app.get("/v1/concepts/{name}/file")
        def file(name: str) -> Response:
            return Response(b"concept " + found(name)["name"].encode(), media_type="application/octet-stream")

        @app.delete("/v1/concepts/{name}")
        def delete(name: str) -> dict[str, Any]:
            return {"id": self.concepts.pop(found(name)["name"])["id"], "object": "concept", "deleted": True}

        @app.post("/v1/images/generations")
        async def generate(request: Request) -> Any:
            wanted = await request.json()
            self.seen.append(("draw", wanted))
            if self.refuse is not None:
                refusal, self.refuse = self.refuse, None
                raise refusal
            if not wanted.get("stream"):
                pictures = [
                    {"b64_json": png_of({**wanted, "seed": wanted["seed"] + n}), "seed": wanted["seed"] + n}
                    for n in range(wanted.get("n", 1))
                ]
                return {"created": 1, "data": pictures}

            async def stream() -> Any:
                try:
                    for n in range(wanted.get("partial_images", 0)):
                        await self.wait()
                        step = (n + 1) * wanted["steps"] // 4
                        yield event("image_generation.partial_image", b64_json=png_of(wanted, (n + 1) / 4), partial_image_index=n, step=step,
                                    steps=wanted["steps"])  # fmt: skip
                    await self.wait()
                    yield event("image_generation.completed", b64_json=png_of(wanted), seed=wanted["seed"])
                except (asyncio.CancelledError, GeneratorExit):  # who asked has gone away
                    self.cancelled.set()
                    raise

            return StreamingResponse(stream(), media_type="text/event-stream")

        return app
