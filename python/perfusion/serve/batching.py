"""`Batcher`: rows that join and leave between denoising steps, each with concepts, settings and a scheduler of its own.

A step is one forward of one base model, over the rows of one size. What a row reads of its prompt, the keys and values of all
cross-attention layers, is made for that row alone, before it joins; so nothing in a batch depends on who else is in it but the
order of the library's sums. Prompts are encoded and pictures decoded beside the steps, in a thread of their own. It touches the
text encoders and the VAE only; what concerns the UNet or its concepts is done between two steps (`Batcher.between_steps`).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import io
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from perfusion.concept_store import ConceptStore, ConceptUnavailable, StoreFull
from perfusion.engine import GivenRows, engine_of
from perfusion.errors import UnsupportedPipeline
from perfusion.handle import attach
from perfusion.prompts import Mention
from perfusion.regions import key_regions, query_regions
from perfusion.requests import Request, RowRequest
from perfusion.serve.drawing import ConceptUse, Drawing, Failure, Picture
from perfusion.settings import SETTINGS

__all__ = ["Batcher", "StepReport"]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step: the base model, how many pictures were in it of how many that could be, and its seconds.

    hits, misses: how often a concept that a row wanted was loaded already, and was not, since the start. ids: of the drawings.
    """

    model: str
    rows: int
    capacity: int
    seconds: float
    hits: int
    misses: int
    ids: tuple[str, ...]


@dataclasses.dataclass(eq=False)
class Row:
    """A drawing in progress.

    encodings [k, T, D], keys and values [k, T, O]: of the prompt, and behind it, under guidance, of the negative prompt; k is 1 or 2.
    latents [1, C, h, w]. timesteps: what is left of them begins at `step`.
    """

    drawing: Drawing
    base: Base
    encodings: Tensor
    requests: dict[int, RowRequest]
    keys: Tensor
    values: Tensor
    scheduled: bool
    conditions: dict[str, Tensor]
    scheduler: Any
    timesteps: Tensor
    generator: torch.Generator
    latents: Tensor
    extra: dict[str, Any]
    noise: Tensor | None = None
    image_latents: Tensor | None = None
    mask: Tensor | None = None
    previews: frozenset[int] = frozenset()
    step: int = 0
    written_at: int = 0  # the step whose settings the keys and values have

    @property
    def count(self) -> int:
        return len(self.encodings)


class Base:
    """A base model: its pipeline, the store of its concepts, by the digests of their files, and what makes rows of drawings."""

    def __init__(self, name: str, pipe: Any, capacity: int, read: Callable[[str], bytes]):
        if getattr(pipe, "unet", None) is None:
            raise UnsupportedPipeline(
                f"serve: model {name!r} is a {type(pipe).__name__}; the server steps models around a UNet (Stable Diffusion 1.x, 2.x, XL). "
                "Draw with others through perfusion.attach."
            )
        self.name, self.pipe = name, pipe
        pipe.safety_checker = None
        self.store = ConceptStore.of(pipe, capacity=capacity, read=read)
        self.handle = attach(pipe, capacity=1, store=self.store)
        self.engine = engine_of(pipe.unet)
        self.device, self.dtype = torch.device(pipe._execution_device), pipe.unet.dtype
        self.wanted = 0  # concepts, by drawings so far
        self._last: Any = None

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height of the model's own pictures."""
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.pipe.vae_scale_factor, height * self.pipe.vae_scale_factor

    @property
    def multiple(self) -> int:
        """What sides of pictures are multiples of."""
        return self.pipe.vae_scale_factor * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)

    @property
    def misses(self) -> int:
        """How often a concept had to be read from its file."""
        return self.store.loads

    @property
    def hits(self) -> int:
        """How often a concept that a drawing wanted was there already."""
        return max(0, self.wanted - self.store.loads)

    # a row, beside the steps

    @torch.no_grad()
    def encode(self, drawing: Drawing) -> tuple[Tensor, dict[str, Tensor]]:
        """Encodings [k, T, D] of a prompt and its negative one, and what XL's UNet is given beside them."""
        guided = drawing.guidance_scale != 1
        names = {use.name: use.digest for use in drawing.concepts}
        self.wanted += len(names)
        for digest in names.values():
            if digest not in self.store:
                self.store.register(digest, digest)
        options: dict[str, Any] = dict(names=names, gate=drawing.gate, key_lock=drawing.key_lock)
        for key in SETTINGS:
            given = {use.name: getattr(use, key) for use in drawing.concepts}
            common = getattr(drawing, key)
            options[key] = {name: common if value is None else value for name, value in given.items()}
            options[key] = {name: value for name, value in options[key].items() if value is not None} or None
        options["regions"] = {use.name: torch.from_numpy(use.region).float() / 255 for use in drawing.concepts if use.region is not None}
        prompt = Request(drawing.prompt, **options)
        # without one XL's pipeline has encodings of its own
        negative = [Request(drawing.negative_prompt, **{**options, "regions": None})] if drawing.negative_prompt else None
        encoded = self.pipe.encode_prompt(
            [prompt], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided, negative_prompt=negative
        )
        encodings = torch.cat([encoded[0], encoded[1]]) if guided else encoded[0]
        if len(encoded) < 4:
            return encodings, {}
        pooled = torch.cat([encoded[2], encoded[3]]) if guided else encoded[2]
        size = (drawing.height, drawing.width)
        projection = self.pipe.text_encoder_2.config.projection_dim
        times = self.pipe._get_add_time_ids(size, (0, 0), size, dtype=encodings.dtype, text_encoder_projection_dim=projection)
        return encodings, {"text_embeds": pooled, "time_ids": times.to(self.device).repeat(len(pooled), 1)}

    @torch.no_grad()
    def begin(self, drawing: Drawing) -> dict[str, Any]:
        """The parts of a row that no concept concerns: scheduler, timesteps, latents, as diffusers' own pipelines make them."""
        pipe = self.pipe
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(drawing.steps)  # on the host: no step waits for the device to read one
        timesteps = scheduler.timesteps
        generator = torch.Generator("cpu").manual_seed(drawing.seed)
        found: dict[str, Any] = {"extra": pipe.prepare_extra_step_kwargs(generator, 0.0)}
        factor = pipe.vae_scale_factor
        shape = (1, pipe.unet.config.in_channels, drawing.height // factor, drawing.width // factor)

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.dtype).to(self.device)

        if drawing.image is None:
            found["latents"] = noise() * scheduler.init_noise_sigma
        else:
            kept = max(drawing.steps - min(int(drawing.steps * drawing.image_strength), drawing.steps), 0)
            start = min(kept * scheduler.order, len(timesteps) - 1)
            timesteps = timesteps[start:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(start)
            image = torch.from_numpy(drawing.image).permute(2, 0, 1)[None].to(self.device, self.dtype) / 127.5 - 1
            posterior = pipe.vae.encode(image.to(pipe.vae.dtype))
            sampled = posterior.latent_dist.sample(generator) if hasattr(posterior, "latent_dist") else posterior.latents
            encoded = sampled.to(self.dtype) * pipe.vae.config.scaling_factor
            added = noise()
            found |= {"noise": added, "image_latents": encoded, "latents": scheduler.add_noise(encoded, added, timesteps[:1])}
            if drawing.mask is not None:
                mask = torch.from_numpy(drawing.mask)[None, None].float() / 255
                mask = torch.nn.functional.interpolate(mask, shape[-2:], mode="area") > 0.5
                found["mask"] = mask.to(self.device, self.dtype)
        steps = len(timesteps)
        wanted = min(drawing.previews, steps - 1)
        previews = frozenset(steps * (number + 1) // (wanted + 1) for number in range(wanted))
        return found | {"scheduler": scheduler, "timesteps": timesteps, "generator": generator, "previews": previews}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Image.Image:
        """The picture of latents [1, C, h, w]."""
        vae, config = self.pipe.vae, self.pipe.vae.config
        latents = latents.to(vae.dtype)
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, deviation = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (config.latents_mean, config.latents_std))
            latents = latents * deviation / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        return self.pipe.image_processor.postprocess(vae.decode(latents).sample.float(), output_type="pil")[0]

    # steps

    @torch.no_grad()
    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the UNet says of each row [k, C, h, w] at the row's own timestep; one forward."""
        for row in rows:
            if row.scheduled and row.written_at != row.step:
                row.keys, row.values = self.engine.keys_values(row.encodings, row.step)
                row.written_at = row.step
        batch = tuple(map(id, rows)), tuple(row.written_at for row in rows)
        if self._last is None or self._last[0] != batch:
            self.engine.give(self._given(rows))
            encodings = torch.cat([row.encodings for row in rows])
            conditions = {key: torch.cat([row.conditions[key] for row in rows]) for key in rows[0].conditions}
            self._last = batch, encodings, conditions, tuple(rows)  # the rows too: an id is of this row while it lives
        _, encodings, conditions, _ = self._last
        times = [row.timesteps[row.step] for row in rows]
        inputs = [row.scheduler.scale_model_input(row.latents, time).expand(row.count, -1, -1, -1) for row, time in zip(rows, times)]
        timesteps = torch.stack([time for row, time in zip(rows, times) for _ in range(row.count)]).to(self.device)
        noise = self.pipe.unet(
            torch.cat(inputs).to(self.dtype), timesteps, encoder_hidden_states=encodings, added_cond_kwargs=conditions or None
        ).sample
        return list(noise.split([row.count for row in rows]))

    def _given(self, rows: Sequence[Row]) -> GivenRows:
        requests, first = {}, 0
        for row in rows:
            requests |= {first + number: request for number, request in row.requests.items()}
            first += row.count
        given = GivenRows(torch.cat([row.keys for row in rows]), torch.cat([row.values for row in rows]))
        if any(region is not None for request in requests.values() for region in request.regions):
            size = tuple(rows[0].latents.shape[-2:])
            given.query_regions = query_regions(requests, first, size, self.device)
            given.key_regions = key_regions(requests, (first, rows[0].encodings.shape[1]), self.device)
        return given

    def advance(self, row: Row, noise: Tensor) -> Tensor:
        """One step of a row's own scheduler; returns the latents to show of it."""
        if row.count == 2:
            plain = noise[1:]
            noise = plain + row.drawing.guidance_scale * (noise[:1] - plain)
        time = row.timesteps[row.step]
        result = row.scheduler.step(noise, time, row.latents, **row.extra)
        row.latents = result.prev_sample
        row.step += 1
        if row.mask is not None:
            kept = row.image_latents
            if row.step < len(row.timesteps):
                kept = row.scheduler.add_noise(kept, row.noise, row.timesteps[row.step : row.step + 1])
            row.latents = torch.where(row.mask > 0, row.latents, kept)
        shown = getattr(result, "pred_original_sample", None)
        return row.latents if shown is None else shown


class Batcher:
    """Draws drawings. `submit` and `cancel` from any thread; `step` from one, again and again.

    bases: name -> pipeline, not attached; each is attached from here on. read_concept: digest -> the bytes of a concept's file; what
    it raises may be shown to who asked. It is called by a thread beside the steps.
    report: called with each Picture, Failure and StepReport, from several threads. rows: pictures in one forward at most.
    capacity: concepts loaded at once in each base. split_by_concept: never mix concepts in a forward, as other engines do; to compare.
    """

    def __init__(
        self,
        bases: dict[str, Any],
        read_concept: Callable[[str], bytes],
        report: Callable[[Any], None],
        *,
        rows: int = 16,
        capacity: int = 64,
        split_by_concept: bool = False,
        side: concurrent.futures.Executor | None = None,
    ):
        self.bases = {name: Base(name, pipe, capacity, read_concept) for name, pipe in bases.items()}
        self.rows, self.split_by_concept = rows, split_by_concept
        self._report = report
        self._side = side or concurrent.futures.ThreadPoolExecutor(1, "text-and-pictures")
        self._between: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]] | None] = queue.SimpleQueue()
        self._groups: collections.OrderedDict[Hashable, list[Row]] = collections.OrderedDict()  # batch key -> rows, next turn first
        self._waiting: collections.deque[Row] = collections.deque()
        self._limits: dict[Hashable, int] = {}  # batch key -> rows that memory has room for, where that was found out
        self._live: set[str] = set()
        self._preparing: set[str] = set()  # whose prompts wait, or are being encoded
        # on a CPU both sides share the processors, and a row more in a step costs less than a step of its own
        self._gathers = all(base.device.type == "cpu" for base in self.bases.values())
        self._stepping: int | None = None

    # from any thread

    def submit(self, drawing: Drawing) -> None:
        """Begin a drawing. Its pictures and failures are reported, in no particular order among drawings."""
        self._live.add(drawing.id)
        self._preparing.add(drawing.id)
        self._side.submit(self._prepare, drawing)

    def cancel(self, id: str) -> None:
        """Stop a drawing before the next step; nothing more is reported of it."""
        self._live.discard(id)
        self._between.put(None)

    def between_steps(self, action: Callable[[], Any]) -> Any:
        """The result of an action that is done between two steps."""
        if threading.get_ident() == self._stepping:
            return action()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._between.put((action, future))
        return future.result()

    @property
    def working(self) -> int:
        """How many drawings are begun and not over."""
        return len(self._live)

    # the stepping thread

    def step(self, timeout: float | None = 0.0) -> bool:
        """What is to be done between steps, then one step, if there is a row: whether there was. timeout: how long to wait for work."""
        self._stepping = threading.get_ident()
        self._do_between(0.0 if self._groups or self._waiting else timeout)
        self._leave()
        self._join()
        while self._gathers and self._preparing and len(self._waiting) + sum(map(len, self._groups.values())) < self.rows:
            self._do_between(None)  # whoever is prepared says so
            self._leave()
            self._join()
        if not self._groups:
            return False
        key = next(iter(self._groups))
        self._groups.move_to_end(key)
        rows = self._groups[key][: self._limits.get(key, self.rows)]
        base, started = rows[0].base, time.perf_counter()
        ids = tuple(row.drawing.id for row in rows)
        self._run(key, rows)
        self._report(StepReport(base.name, len(rows), self.rows, time.perf_counter() - started, base.hits, base.misses, ids))
        return True

    def _do_between(self, timeout: float | None) -> None:
        try:
            item = self._between.get(timeout is None or timeout > 0, timeout)
            while True:
                if item is not None:
                    action, future = item
                    try:
                        future.set_result(action())
                    except BaseException as error:
                        future.set_exception(error)
                item = self._between.get_nowait()
        except queue.Empty:
            pass

    def _key(self, row: Row) -> Hashable:
        drawing = row.drawing
        concepts = tuple(sorted(use.digest for use in drawing.concepts)) if self.split_by_concept else ()
        return drawing.model, drawing.height, drawing.width, concepts

    def _join(self) -> None:
        for _ in range(len(self._waiting)):
            row = self._waiting.popleft()
            key = self._key(row)
            if row.drawing.id not in self._live:
                continue
            if len(self._groups.get(key, ())) < self._limits.get(key, self.rows):
                self._groups.setdefault(key, []).append(row)
            else:
                self._waiting.append(row)

    def _leave(self) -> None:
        """Rows that were cancelled or are done go."""
        for key in list(self._groups):
            rows = self._groups[key]
            rows[:] = [row for row in rows if row.drawing.id in self._live]
            if not rows:
                del self._groups[key]

    def _run(self, key: Hashable, rows: Sequence[Row]) -> None:
        """One step of some rows. Where memory does not suffice, of half of them at a time from now on."""
        base = rows[0].base
        try:
            noise = base.forward(rows)
        except (torch.OutOfMemoryError, MemoryError):
            base._last = None
            if base.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(rows) == 1:
                self._fail(rows[0].drawing, "memory", "the device has no memory for a picture of this size; ask for a smaller one")
                return
            half = len(rows) // 2
            self._limits[key] = max(1, half)
            self._run(key, rows[:half])
            self._run(key, rows[half:])
            return
        except Exception as error:
            base._last = None
            if len(rows) == 1:
                self._fail(rows[0].drawing, "internal", f"{type(error).__name__}: {error}")
                return
            for row in rows:  # whose fault it is shows when each is alone
                self._run(key, [row])
            return
        for row, each in zip(rows, noise):
            try:
                shown = base.advance(row, each)
            except Exception as error:
                self._fail(row.drawing, "internal", f"{type(error).__name__}: {error}")
                continue
            if row.step == len(row.timesteps):
                self._side.submit(self._finish, row, row.latents, row.step)
                self._remove(key, row)
            elif row.step in row.previews:
                self._side.submit(self._finish, row, shown, row.step)

    def _remove(self, key: Hashable, row: Row) -> None:
        self._groups[key].remove(row)
        if not self._groups[key]:
            del self._groups[key]

    # beside the steps

    def _prepare(self, drawing: Drawing) -> None:
        base = self.bases[drawing.model]
        try:
            if drawing.id not in self._live:
                return
            encodings, conditions = base.encode(drawing)
            requests = base.handle.rows_of(encodings)
            parts = base.begin(drawing)
            scheduled = any(_is_schedule(mention) for request in requests.values() for mention in request.mentions)
            # the engine holds a concept's place while the encodings live that it was asked with: a view of them is gone at once
            asked = encodings if scheduled else encodings.view_as(encodings)
            keys, values = self.between_steps(functools.partial(base.engine.keys_values, asked))
            row = Row(
                drawing=drawing, base=base, encodings=encodings, requests=requests, keys=keys, values=values, scheduled=scheduled,
                conditions=conditions, **parts,
            )  # fmt: skip
            self._waiting.append(row)
        except BaseException as error:
            self._fail(drawing, *_explained(error, drawing.concepts))
        finally:
            self._preparing.discard(drawing.id)
            self._between.put(None)

    def _finish(self, row: Row, latents: Tensor, step: int) -> None:
        drawing = row.drawing
        if drawing.id not in self._live:
            return
        last = step == len(row.timesteps)
        try:
            picture = Picture(drawing.id, encode_picture(row.base.decode(latents), drawing), step, len(row.timesteps))
        except BaseException as error:
            self._fail(drawing, *_explained(error, ()))
            return
        if last:
            self._live.discard(drawing.id)
        self._report(picture)

    def _fail(self, drawing: Drawing, kind: str, message: str) -> None:
        if drawing.id in self._live:
            self._live.discard(drawing.id)
            self._report(Failure(drawing.id, kind, message))


def _is_schedule(mention: Mention) -> bool:
    return any(isinstance(getattr(mention, key), Sequence) or callable(getattr(mention, key)) for key in SETTINGS)


def _explained(error: BaseException, concepts: Sequence[ConceptUse]) -> tuple[str, str]:
    """Kind and message of a failure, with concepts called as the prompt does."""
    message = str(error)
    for use in concepts:
        message = message.replace(use.digest, use.name)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, StoreFull)):
        return "memory", "the device has no memory for this picture; ask for a smaller one, or later"
    if isinstance(error, ConceptUnavailable):
        return "conflict", message
    if isinstance(error, ValueError):
        return "invalid", message
    return "internal", f"{type(error).__name__}: {message}"


def encode_picture(image: Image.Image, drawing: Drawing) -> bytes:
    """The file of a picture, as the drawing wants it."""
    file = io.BytesIO()
    # of PNG's levels 4 takes half the time of the usual 6 and 1 % more bytes
    options = {"png": {"compress_level": 4}, "jpeg": {"quality": drawing.quality}, "webp": {"quality": drawing.quality}}[drawing.format]
    image.save(file, drawing.format, **options)
    return file.getvalue()

