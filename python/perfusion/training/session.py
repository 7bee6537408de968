"""One training in progress: the learned vectors, the step, and the concept they make.

Everything random in a step comes from a generator seeded with (seed, step), so a run that is continued from a checkpoint
draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from perfusion.base import Base, UnsupportedPipeline, cross_attention_layers, denoiser, text_encoders
from perfusion.base.dense import embedding_rows
from perfusion.batched_projection import BatchedProjection, obstacle
from perfusion.concept import Concept
from perfusion.covariance import Covariance
from perfusion.edit import RowSettings, Tables
from perfusion.errors import few
from perfusion.loaded_concept import LoadedConcept
from perfusion.masks import masked_loss
from perfusion.projection_hooks import HookEdit, ProjectionHooks, hook_edit
from perfusion.prompts import PromptError, quoted
from perfusion.text import TextHook, superclass_tokens
from perfusion.training.conditioning import beside_text, encode, noise_of
from perfusion.training.data import Picture, digest, encode_pictures
from perfusion.training.offloading import Offloaded, tiled
from perfusion.training_config import TrainingConfig

__all__ = ["Measures", "TrainingSession"]

HALF_SCALE = 1024.0  # the loss is scaled where activations are float16; AdamW does not see a constant factor


class _Said(logging.Filter):
    """A context in which a pipeline does not say anew, at every step, that a caption was cut: it was said once."""

    def __init__(self, pipe: Any):
        super().__init__()
        owner = next((kind for kind in type(pipe).__mro__ if "encode_prompt" in vars(kind)), type(pipe))
        self.logger = logging.getLogger(owner.__module__)

    def filter(self, record: logging.LogRecord) -> bool:
        return "was truncated because" not in str(record.msg)

    def __enter__(self) -> None:
        self.logger.addFilter(self)

    def __exit__(self, *exception: Any) -> None:
        self.logger.removeFilter(self)


@dataclasses.dataclass
class Measures:
    """What one step reports: see the training log in DESIGN.md. Gates are means over the batch."""

    loss: float
    gradient_norm: float
    gate_on_word: float
    gate_off_word: float
    superclass_cosine: float


@dataclasses.dataclass
class _Batch:
    """What a step draws: captions [R], latents and noise [R, C, h, w], timesteps [R], and masks [R, h, w] or None."""

    captions: list[str]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    mask: Tensor | None

    def split(self, size: int) -> list[_Batch]:
        """The same rows in parts of at most `size`."""
        starts = range(0, len(self.captions), size)
        return [
            _Batch(
                self.captions[i : i + size], self.latents[i : i + size], self.noise[i : i + size], self.timesteps[i : i + size],
                None if self.mask is None else self.mask[i : i + size],
            )
            for i in starts
        ]  # fmt: skip


class TrainingSession:
    """A context in which a pipeline's `<name>` is learned; leaving it gives the pipeline back as it was, whatever happened.

    value_outputs, key_outputs [O] float32 (keys: None under the lock) and `words`, one [width] float32 per text encoder, are
    what is trained, from `start_values` and `start_words`; `target` [D] is i*, the running mean of the word's encoding;
    `superclass_encoding` [D] is s; `inference` is the bias and temperature that pictures are drawn with and the concept keeps.
    `obstacle` says why the layers' projections are called one by one, or is None: then they are two products a step.
    """

    def __init__(self, pipe: Any, base: Base, config: TrainingConfig, covariance: Covariance, pictures: list[Picture]):
        self.pipe, self.base, self.config, self.covariance, self.pictures = pipe, base, config, covariance, pictures
        self.device = torch.device(pipe._execution_device)
        self._said = _Said(pipe)
        self._texts = Offloaded([encoder for _, encoder in text_encoders(pipe)] if config.low_memory else [], self.device)
        self._vae = Offloaded([pipe.vae] if config.low_memory else [], self.device)
        self.noise_scheduler = _noise_scheduler(pipe)
        self._groups = [
            (group, encode_pictures(pipe, [pictures[i] for i in group], tiled=config.low_memory)) for group in _by_shape(pictures)
        ]
        self.latents = self._groups[0][1]  # of all pictures, unless `config.buckets`
        self.captions = [[_named(caption, config.name) for caption in picture.captions] for picture in pictures]
        self.step = 0
        ids = [superclass_tokens(tokenizer, config.superclass)[-1] for tokenizer, _ in text_encoders(pipe)]
        embeddings = [embedding_rows(encoder.get_input_embeddings(), [i])[0] for (_, encoder), i in zip(text_encoders(pipe), ids)]
        self.words = [torch.nn.Parameter(row.to(self.device, torch.float32, copy=True)) for row in embeddings]
        self.start_words = [word.detach().clone() for word in self.words]
        self.inference = config.inference_bias, config.inference_temperature
        self._text = TextHook(pipe, {config.name: LoadedConcept(config.superclass, self.words)})
        self._model = denoiser(pipe)
        self._masks: dict[str, Tensor] = {}  # caption -> [T], where the denoiser reads a mask
        self._hooks = ProjectionHooks(self._model, self._sampling_edit)

    def __enter__(self) -> TrainingSession:
        with contextlib.ExitStack() as undo:
            self._freeze(undo)
            undo.enter_context(self._said)
            undo.callback(self._text.remove)
            self._text.install()
            self._start()
            undo.callback(self._hooks.remove)
            self._hooks.install()
            # after the hooks, which compiled code would not see otherwise; the pipeline keeps its own
            self._unet = torch.compile(self._model, fullgraph=True) if self.config.compile else self._model
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()

    def _freeze(self, undo: contextlib.ExitStack) -> None:
        unet = self._model
        models = [unet, self.pipe.vae, *(encoder for _, encoder in text_encoders(self.pipe))]
        required = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
        modes = [(module, module.training) for model in models for module in model.modules()]

        def restore() -> None:
            for parameter, value in required:
                parameter.requires_grad_(value)
            for module, value in modes:
                module.training = value

        undo.callback(restore)
        for offloaded in (self._texts, self._vae):
            undo.enter_context(offloaded)
        if self.config.low_memory:
            undo.enter_context(tiled(self.pipe.vae))
        for model in models:
            model.requires_grad_(False).eval()
        if self.config.checkpointing and not unet.is_gradient_checkpointing:
            undo.callback(unet.disable_gradient_checkpointing)
            unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def _start(self) -> None:
        """Every learned vector begins at its superclass; layers are called, not read, so LoRA and offloading stay in charge."""
        self.obstacle = obstacle(self._model)
        self._batched = BatchedProjection(self._model) if self.obstacle is None else None
        captions = sorted({caption for captions in self.captions for caption in captions})
        self._places = dict(zip(captions, self._find_places(captions)))
        encodings = self._text_of(self._read(captions))
        s = _pick(encodings, self._places_of(captions)).float().mean(0)
        self.superclass_encoding, self.target = s, s.clone()

        def outputs(kind: str) -> torch.nn.Parameter:
            called = [getattr(layer, kind)(at) for layer in cross_attention_layers(self._model).values()]
            return torch.nn.Parameter(torch.cat([(each[0] - each[1]).float() for each in called]))  # a bias is no part of W s

        at = torch.stack([s, torch.zeros_like(s)]).to(encodings)

        self.value_outputs = outputs("to_v")
        self.start_values = self.value_outputs.detach().clone()
        self.key_outputs = None if self.config.key_lock else outputs("to_k")
        trained = [tensor for tensor in (self.value_outputs, self.key_outputs) if tensor is not None]
        self.optimizer = torch.optim.AdamW(
            [{"params": trained, "lr": self.config.learning_rate}, {"params": self.words, "lr": self.config.word_learning_rate}],
            weight_decay=0.0,  # 0.01 would shrink o*_V by a tenth in a run
        )

    # one step

    @torch.enable_grad()
    def train_step(self) -> Measures:
        """One optimiser step over `batch_size` draws of picture, mirror image, caption, noise and timestep.

        The UNet's gradients are gathered in float32 at the outputs of the text encoders, and go on to the word from there, once a
        step. Where `config.micro_batch` is smaller than the batch, parts of it add up to the same step in the memory of a part.
        """
        batch = self._draw()
        captions, rows = self._distinct(batch.captions)
        parts = batch.split(self.config.rows)
        again = self.config.low_memory or len(parts) > 1  # read the text twice, and have nothing of it in memory in between
        with torch.set_grad_enabled(not again):
            read = self._read(captions)
        with torch.no_grad():
            self._move_target(self._text_of(read)[rows, self._places_of(batch.captions)])
        gathered = [each.detach().float().requires_grad_() for each in read]
        self.optimizer.zero_grad()
        measured = []
        for part in parts:
            places = [captions.index(caption) for caption in self._distinct(part.captions)[0]]
            read_of_part = [each[places].to(read[0].dtype) for each in gathered]
            measured.append(self._learn_from(part, read_of_part, len(part.captions) / len(batch.captions)))
        gradients = [each.grad for each in gathered]
        if again:
            with self._texts.here():
                for start in range(0, len(captions), self.config.rows):
                    piece = slice(start, start + self.config.rows)
                    _backward(self._read(captions[piece]), [each if each is None else each[piece] for each in gradients])
        else:
            _backward(read, gradients)
        loss, on, off = (sum(values) for values in zip(*measured))
        norm = self._optimise(loss)
        self.step += 1
        return self._measure(loss, norm, on, off)

    def _learn_from(self, batch: _Batch, read: list[Tensor], share: float) -> tuple[float, float, float]:
        """Add the gradient of some rows, which are `share` of the step. Returns their share of the loss and of the two mean gates.

        read: what the text encoders gave for their distinct captions, as `_read` has it.
        """
        rows, places = self._distinct(batch.captions)[1], self._places_of(batch.captions)
        noisy = self.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).to(read[0].dtype)
        text = read[0][rows].detach()  # gradients flow through the edit
        arguments = self._arguments(batch, [text, *(each[rows] for each in read[1:])])
        with self._editing(self._text_of(read), rows) as gates:  # to the end of the backward: a checkpointed layer runs again in there
            prediction = noise_of(self._unet(noisy, **arguments, return_dict=False)[0], noisy.shape[1])
            loss = masked_loss(prediction, self._goal(batch.latents, batch.noise, batch.timesteps), batch.mask).mean() * share
            (loss * self._loss_scale).backward()
        on, off = self._mean_gates(gates, places)
        return loss.item(), on * share, off * share

    def _draw(self) -> _Batch:
        batch = self.config.batch_size
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed} {self.step}".encode()))
        group, stored = self._groups[0]
        if len(self._groups) > 1:  # pictures of one shape make a step, each shape as often as it has pictures
            point = torch.rand((), generator=generator).item() * len(self.pictures)
            for group, stored in self._groups:
                point -= len(group)
                if point < 0:
                    break
        pictures = torch.randint(len(group), (batch,), generator=generator)
        mirrored = (torch.rand(batch, generator=generator) < self.config.flip).long()
        picks = torch.rand(batch, generator=generator).tolist()
        captions = [self.captions[group[p]][int(pick * len(self.captions[group[p]]))] for p, pick in zip(pictures.tolist(), picks)]
        latents = stored.mean[pictures, mirrored]
        if stored.std is not None:
            latents = latents + stored.std[pictures, mirrored] * torch.randn(latents.shape, generator=generator).to(latents)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(self.noise_scheduler.config.num_train_timesteps, (batch,), generator=generator).to(self.device)
        return _Batch(captions, latents, noise, timesteps, None if stored.mask is None else stored.mask[pictures, mirrored])

    def _distinct(self, captions: list[str]) -> tuple[list[str], Tensor]:
        """Each caption once, and which of them every row has: text is encoded and projected once, however often it was drawn."""
        distinct = sorted(set(captions))
        return distinct, torch.tensor([distinct.index(caption) for caption in captions], device=self.device)

    @contextlib.contextmanager
    def _editing(
        self, encodings: Tensor, rows: Tensor, bias: float | None = None, temperature: float | None = None
    ) -> Iterator[Tensor]:
        """Inside the `with` the layers follow the edit of encodings[rows], whatever they are given. Gives the gates [R, T, 1]."""
        bias = self.config.bias if bias is None else bias
        temperature = self.config.temperature if temperature is None else temperature
        if self._batched is None:
            edit = self._edit(encodings[rows], torch.arange(len(rows), device=self.device), bias, temperature)
            gates = edit.gates
        else:
            edit, gates = self._batched.project(encodings, rows, *self._setting(len(encodings), bias, temperature))
            gates = gates[rows]
        with self._hooks.hold(edit):
            yield gates

    def _read(self, captions: list[str]) -> list[Tensor]:
        """What the text encoders give for captions: encodings [n, T, D'] and, where the denoiser reads it, pooled text [n, P]."""
        with self._texts.here():
            read, mask = encode(self.pipe, captions, self.device)
        if mask is not None:
            self._masks.update(zip(captions, mask))
        return read

    def _text_of(self, read: list[Tensor]) -> Tensor:
        """What the cross-attention layers read [n, T, D] of it: there i*, s and the edit live."""
        return self._hooks.call.text(read[0])

    def _arguments(self, batch: _Batch, read: list[Tensor]) -> dict[str, Any]:
        """What the denoiser reads beside noisy latents, row by row: `read` of each row, and what its kind asks for."""
        size = tuple(side * self.pipe.vae_scale_factor for side in batch.latents.shape[-2:])
        found = {"timestep": batch.timesteps, "encoder_hidden_states": read[0], **beside_text(self._model, read, size)}
        if self._masks:
            found["encoder_attention_mask"] = torch.stack([self._masks[caption] for caption in batch.captions])
        return found

    def _find_places(self, captions: list[str]) -> list[int]:
        """Which token of each caption is the concept's, as the text encoders read it: textual inversions may be several tokens before it.

        ValueError where two text encoders read it at different places: their encodings of one token lie side by side.
        """
        found, cut = [], []
        for caption in captions:
            files = few([picture.path for picture, own in zip(self.pictures, self.captions) if caption in own], 3)
            try:
                places = {self._text.read_at(number, caption)[0] for number in range(len(text_encoders(self.pipe)))}
            except PromptError as error:
                raise PromptError(f"images: caption of {files}: {error}") from None
            if len(places) > 1:
                raise ValueError(
                    f"images: caption {quoted(caption)} of {files}: a textual inversion in it has more vectors for one text encoder than "
                    "for the other, so that the two read the words behind it at different places. Leave it out of the captions."
                )
            found += places
            if self._text.overlong(caption):
                cut.append(f"{quoted(caption)} of {files}")
        if cut:
            warnings.warn(
                f"images: captions are longer than a text encoder of this model reads, and their ends count for nothing: "
                f"{few(cut, 3, '; ')}. Shorter ones say more.",
                stacklevel=5,
            )
        return found

    def _places_of(self, captions: list[str]) -> Tensor:
        """Which token of each caption is the concept's word [n]."""
        return torch.tensor([self._places[caption] for caption in captions], device=self.device)

    def _move_target(self, encodings: Tensor) -> None:
        # once per optimiser step, outside the layers: gradient checkpointing runs those twice
        self.target = torch.lerp(encodings.detach().float().mean(0), self.target, self.config.ema_decay)

    @torch.no_grad()
    def settled_target(self) -> Tensor:
        """i* [D] of the word as it is now: the mean encoding at it over all training captions, as s is of the superclass word.

        The running mean lags behind the word. Where C⁻¹ is small along i* the lag is large in the component at the concept's own word,
        whose excess over 1 would be taken from the values of every picture (docs/fidelity.md, "The target input").
        """
        captions = sorted(self._places)
        return _pick(self._text_of(self._read(captions)), self._places_of(captions)).float().mean(0)

    def _edit(self, encodings: Tensor, rows: Tensor, bias: float, temperature: float) -> HookEdit:
        return hook_edit(encodings, rows, *self._setting(len(rows), bias, temperature))

    def _setting(self, count: int, bias: float, temperature: float) -> tuple[Tables, RowSettings]:
        """The tables with this concept alone, and the settings of `count` rows that have it."""
        tables = Tables(
            self.target[None],
            self.covariance.metric_targets(self.target[None]),
            self.superclass_encoding[None],
            self.value_outputs[None],
            None if self.key_outputs is None else self.key_outputs[None],
            None if self.key_outputs is None else torch.ones(1, dtype=torch.bool, device=self.device),
        )
        whole = torch.ones(count, 1, device=self.device)
        index = torch.zeros(count, 1, dtype=torch.int32, device=self.device)
        return tables, RowSettings(index, whole * bias, whole * temperature, whole)

    def _goal(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model predicts."""
        kind = self.noise_scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return {"epsilon": noise, "sample": latents}[kind]

    @property
    def _loss_scale(self) -> float:
        return HALF_SCALE if self._model.dtype == torch.float16 else 1.0

    def _optimise(self, loss: float) -> float:
        """Move the learned vectors by their gradients, whose norm is returned."""
        scale, trained = self._loss_scale, list(self._trained().values())
        for parameter in trained:
            parameter.grad.div_(scale)
        norm = torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in trained])).item()
        if not math.isfinite(norm + loss):
            raise ValueError(
                f"training: the loss or its gradient is not finite at step {self.step + 1} (loss {loss:g}, gradient {norm:g}). "
                "Use float32 or bfloat16 instead of float16, or a smaller learning rate."
            )
        self.optimizer.step()
        return norm

    @staticmethod
    @torch.no_grad()
    def _mean_gates(gates: Tensor, places: Tensor) -> tuple[float, float]:
        """Mean gate [R, T, 1] on the concept's word and off it."""
        gates = gates[..., 0]
        on = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, places[:, None], True)
        return gates[on].mean().item(), gates[~on].mean().item()

    def _measure(self, loss: float, norm: float, on: float, off: float) -> Measures:
        cosine = torch.cosine_similarity(self.target, self.superclass_encoding, dim=0)
        return Measures(loss, norm, on, off, cosine.item())

    # what it makes

    def _sampling_edit(self, encodings: Tensor) -> HookEdit | None:
        """The edit of encodings that the pipeline made while pictures are sampled."""
        rows = self._text.rows_of(encodings)
        if not rows:
            return None
        text = self._hooks.call.text(encodings)
        return self._edit(text, torch.tensor(list(rows), device=self.device), *self.inference)

    @torch.no_grad()
    def sample(self, prompts: list[str], steps: int) -> list[Any]:
        """PIL images of prompts with "{}" in them, drawn by the pipeline as its user would, one by one, the same seeds each time."""
        self._hooks.forget()
        scheduler, target = self.pipe.scheduler, self.target
        # PixArt draws in one of the shapes it knows for its own sizes, and the model's square is one of these
        binned = "use_resolution_binning" in inspect.signature(type(self.pipe).__call__).parameters
        unbinned = {"use_resolution_binning": False} if binned else {}
        self.pipe.scheduler = type(scheduler).from_config(scheduler.config)  # its own one would remember the last run
        self.target = self.settled_target()
        try:
            with self._texts.here(), self._vae.here():
                return [
                    self.pipe(
                        _named(prompt, self.config.name),
                        num_inference_steps=steps,
                        generator=torch.Generator().manual_seed(self.config.seed + number),
                        **unbinned,
                    ).images[0]
                    for number, prompt in enumerate(prompts)
                ]
        finally:
            self.pipe.scheduler, self.target = scheduler, target

    def check_prompts(self) -> None:
        """ValueError, before anything is learned, for a validation prompt that could not be drawn."""
        for prompt in self.config.validation_prompts:
            try:
                self._text.check(_named(prompt, self.config.name))
            except ValueError as error:
                raise ValueError(f"training: validation_prompts: {error}") from None

    def concept(self) -> Concept:
        """The concept as it is now, its target input that of the word as it is now."""
        config, target = self.config, _copy(self.settled_target())
        return Concept(
            name=config.name,
            superclass=config.superclass,
            base=self.base,
            value_outputs=_copy(self.value_outputs),
            target=target,
            metric_target=self.covariance.metric_targets(target),
            superclass_encoding=_copy(self.superclass_encoding),
            word_embeddings=tuple(_copy(word) for word in self.words),
            key_outputs=None if self.key_outputs is None else _copy(self.key_outputs),
            bias=self.inference[0],
            temperature=self.inference[1],
            covariance=self.covariance.fingerprint,
            recipe=self._recipe(),
            license=config.license,
            author=config.author,
        )

    def _recipe(self) -> dict[str, Any]:
        """What is worth knowing of a training in the few bytes that a concept file has for it."""
        config, short = self.config, lambda number: float(f"{number:.4g}")
        return {
            "steps": config.steps,
            "batch": config.batch_size,
            "lr": short(config.learning_rate),
            "word_lr": short(config.word_learning_rate),
            "bias": short(config.bias),
            "temperature": short(config.temperature),
            "pictures": len(self.pictures),
            "resolution": round(math.sqrt(self.pictures[0].pixels[0].numel())),
            "seed": config.seed,
        }

    # going on later

    def facts(self) -> dict[str, Any]:
        """Every setting and input that a run and its exact continuation share, as JSON values."""
        model = hashlib.sha256(f"{self.base} {self.base.text_encoder} {self._model.dtype}".encode()).hexdigest()[:16]
        inputs = {"model": model, "covariance": self.covariance.fingerprint, "pictures": digest(self.pictures)}
        return {**self.config.lasting(), **inputs}

    def state(self) -> dict[str, Tensor]:
        """A copy of all that the next step depends on, as named tensors on the CPU."""
        tensors = {"target": self.target, "superclass_encoding": self.superclass_encoding, **self._trained()}
        for name, parameter in self._trained().items():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return {name: _copy(tensor).contiguous() for name, tensor in tensors.items()}

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave after `step` steps. ValueError, and no change, when it is of another model."""
        expected = {"target": self.target, "superclass_encoding": self.superclass_encoding, **self._trained()}
        for name, tensor in expected.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ValueError(f"the checkpoint does not fit this training: {name} must be of shape {list(tensor.shape)}.")
        self.step = step
        self.target, self.superclass_encoding = (tensors[name].to(self.device) for name in ("target", "superclass_encoding"))
        for name, parameter in self._trained().items():
            parameter.data.copy_(tensors[name])
            moments = {
                key.split(".")[1]: value for key, value in tensors.items() if key.startswith("adam.") and key.split(".", 2)[2] == name
            }
            # AdamW counts its steps on the CPU
            self.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(self.device, copy=True) for key, value in moments.items()
            }

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        keys = {} if self.key_outputs is None else {"key_outputs": self.key_outputs}
        return {"value_outputs": self.value_outputs, **keys, **{f"word.{number}": word for number, word in enumerate(self.words)}}


def _by_shape(pictures: list[Picture]) -> list[list[int]]:
    """Numbers of the pictures of each shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        groups.setdefault(tuple(picture.pixels.shape), []).append(number)
    return list(groups.values())


def _named(caption: str, name: str) -> str:
    return caption.replace("{}", f"<{name}>")


def _backward(outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Send gradients on to what the outputs were made of; None for an output that nothing read."""
    wanted = [(output, gradient) for output, gradient in zip(outputs, gradients) if gradient is not None and output.requires_grad]
    torch.autograd.backward([output for output, _ in wanted], [gradient.to(output.dtype) for output, gradient in wanted])


def _pick(encodings: Tensor, places: Tensor) -> Tensor:
    """One token [n, D] of each row of encodings [n, T, D]."""
    return encodings[torch.arange(len(places), device=places.device), places]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _noise_scheduler(pipe: Any) -> DDPMScheduler:
    """The noise that the model was trained with. The pipeline's own scheduler may count it otherwise, as Euler's sigmas do."""
    config = pipe.scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config or kind not in ("epsilon", "v_prediction", "sample"):
        name, why = (
            type(pipe.scheduler).__name__,
            "it has no beta_schedule" if "beta_schedule" not in config else f"prediction_type={kind!r}",
        )
        raise UnsupportedPipeline(
            f"training does not know the noise of {name} ({why}). Supported are schedulers with a beta_schedule and "
            "prediction_type epsilon, v_prediction or sample."
        )
    return DDPMScheduler.from_config(config)
