"""`Runtime`: an exported model that draws requests, every row of a batch with its own concepts."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perfusion.concept_fields import check_name
from perfusion.families import CUSTOM, FAMILIES, Family
from perfusion.files import user_path
from perfusion.prompts import PromptError, check_settings
from perfusion.runtime import manifest as facts
from perfusion.runtime.concept import Concept
from perfusion.runtime.encoding import Encoded, Line, TextSide
from perfusion.runtime.graphs import Graph, load_graphs
from perfusion.runtime.key_value import EditedRow, Use, dependent_concepts
from perfusion.runtime.manifest import ExportedFolderError, Manifest
from perfusion.runtime.noise import randn
from perfusion.runtime.schedulers import sampler
from perfusion.settings import GATES, KEY_LOCKS, SETTINGS, WORD_GATE_FLOOR

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Batch", "Loaded", "Request", "Runtime"]


@dataclasses.dataclass
class Loaded:
    """A concept and how it is set; `Runtime.set` says what the settings are."""

    concept: Concept
    strength: Any = 1.0
    bias: Any = None
    temperature: Any = None
    key_lock: str = KEY_LOCKS[0]
    gate: str = GATES[0]

    def __post_init__(self) -> None:
        self.bias = self.concept.bias if self.bias is None else self.bias
        self.temperature = self.concept.temperature if self.temperature is None else self.temperature

    @property
    def superclass(self) -> str:
        return self.concept.superclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One picture.

    prompt           names concepts as <name>, <name:0.8> or <name|bias=0.6,temperature=0.1>
    negative_prompt  what not to draw; None is the empty prompt, and for SDXL its encodings of zeros
    names            how the prompts call concepts -> the names under which they are loaded, so that two users may both write
                     <teddy>; other loaded concepts keep their names
    strength, bias, temperature   for all concepts of the prompts, or name -> value; each a number, one number per step, or a
                     function of the step. What the prompt's text sets goes before them, and they go before `Runtime.set`
    key_lock, gate   for all concepts of the prompts, as in `Runtime.set`
    guidance_scale   up to 1 switches guidance off; by default what suits the model
    seed             the picture's noise, that of torch.Generator("cpu").manual_seed(seed)
    latents          [C, h, w] instead of noise from the seed
    """

    prompt: str = dataclasses.field(kw_only=False)
    negative_prompt: str | None = ""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    strength: Any = None
    bias: Any = None
    temperature: Any = None
    key_lock: str | None = None
    gate: str | None = None
    guidance_scale: float | None = None
    seed: int = 0
    latents: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Requests ready for a UNet: rows R, those without the prompt first, for samplers and runtimes of one's own.

    picture [R]: whose latents a row reads; unguided and guided: the rows that predict without and with the prompt; text_embeds [R, P] and
    time_ids [R, 6], or None.
    """

    picture: np.ndarray
    unguided: dict[int, int]
    guided: list[int]
    text_embeds: np.ndarray | None
    time_ids: np.ndarray | None
    _rows: list[EditedRow]
    _row: np.ndarray
    _known: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    def keys_and_values(self, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """K and V [R, T, O] of a step; the same arrays as before where no setting follows a schedule."""
        if "constant" in self._known:
            return self._known["constant"]
        key, value = (np.stack(each)[self._row] for each in zip(*(row.at(step) for row in self._rows)))
        if not any(row.changes for row in self._rows):
            self._known["constant"] = key, value
        return key, value


class Runtime:
    """An exported model. Not safe for use from several threads.

    folder: what `perfusion export` wrote. graphs: functions in place of onnxruntime's, by name (`manifest.graphs`): arrays by input
    name in, arrays in order out. verify: hold every file against its SHA-256 first. providers, threads: for onnxruntime.

    ExportedFolderError when the folder is no export, is damaged, or needs a package that is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        graphs: Mapping[str, Graph] | None = None,
        verify: bool = True,
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
    ):
        folder = user_path(folder)
        self.manifest = Manifest.read(folder)
        _check_files(folder, self.manifest, verify)
        self.key_weight, self.value_weight, self.alphas_cumprod = _read_weights(folder / facts.WEIGHTS, self.manifest)
        given = dict(graphs or {})
        missing = [name for name in self.manifest.graphs if name not in given]
        self.graphs = given | (load_graphs(folder, self.manifest, missing, providers=providers, threads=threads) if missing else {})
        self.text = TextSide(folder, self.manifest, self.graphs)
        self._loaded: dict[str, Loaded] = {}

    # Concepts

    def load(self, concept: str | os.PathLike[str] | Concept, name: str | None = None) -> str:
        """Make a concept usable as `<name>`; returns the name, by default the concept's own. ValueError as `Handle.load`."""
        concept = concept if isinstance(concept, Concept) else Concept.load(concept)
        name = concept.name if name is None else name
        check_name(name)
        reason = concept.base.mismatch(self.manifest.base)
        if reason is not None:
            raise ValueError(f"concept {concept.name!r} cannot be used with this export: {reason}")
        if name in self._loaded:
            raise ValueError(f"a concept <{name}> is loaded already. Give this one another name.")
        if f"<{name}>" in {word.lower() for word in self.text.words}:
            raise ValueError(f"the tokenizer has a word <{name}> of its own (a textual inversion). Give this concept another name.")
        self.text.check_superclass(concept.superclass)
        others = [other for other, loaded in self._loaded.items() if "" != loaded.concept.covariance != concept.covariance != ""]
        if others:
            warnings.warn(
                f"<{name}> was learned with another covariance than {', '.join(map('<{}>'.format, others))}: "
                "in one prompt they combine only approximately.",
                stacklevel=2,
            )
        self._loaded[name] = Loaded(concept)
        return name

    def unload(self, name: str) -> None:
        del self._loaded[self._require(name)]

    def set(self, name: str, **settings: Any) -> None:
        """Change how a concept acts from now on; what is not given stays. A prompt's own settings go before these.

        strength: 1 as learned, 0 the plain superclass, up to 4. bias: higher weakens the concept, lower strengthens it.
        temperature: how sharply the gate opens. Each is a number, or a schedule: one number per step, or a function of the step.
        key_lock: "local" or "global". gate: "similarity" or "word" (DESIGN.md, "Gates by word").
        """
        self._loaded[self._require(name)] = _changed(name, self._loaded[name], settings)

    def concepts(self) -> dict[str, Loaded]:
        """What is loaded, by name. A copy."""
        return {name: dataclasses.replace(loaded) for name, loaded in self._loaded.items()}

    def _require(self, name: str) -> str:
        if name not in self._loaded:
            raise ValueError(f"no concept named {name!r} is loaded; loaded are: {', '.join(sorted(self._loaded)) or 'none'}")
        return name

    # Drawing

    def check(self, prompts: Sequence[str]) -> None:
        """Raises what drawing any of the prompts would raise for its concepts, their settings and places; draws nothing."""
        for prompt in prompts:
            line, _ = self._line(Request(prompt=prompt), prompt)
            for tokenizer in self.text.tokenizers:
                self.text.positions(line, tokenizer)

    def prepare(self, requests: Sequence[Request], *, height: int | None = None, width: int | None = None) -> Batch:
        """Encode the prompts of requests and edit their keys and values. Errors of a prompt are PromptErrors."""
        if not requests:
            raise ValueError("there must be at least one request")
        _, h, w = self.manifest.latent_shape(height, width)
        lines = [self._line(request, request.prompt) for request in requests]
        guided = [number for number, request in enumerate(requests) if self._guidance(request) > 1]
        negative = {number: self._line(requests[number], requests[number].negative_prompt or "") for number in guided}
        zeros = {number for number in negative if requests[number].negative_prompt is None and self.manifest.zero_negative}
        every = [*lines, *negative.values()]
        encoded = self.text.encode([*(line for line, _ in every), *(line.plain() for line, settings in every if _global(settings))])

        picture = [*negative, *range(len(requests))]
        jobs = [*negative.values(), *lines]
        rows: dict[Any, EditedRow] = {}  # the distinct ones
        keys, pooled = [], []
        for place, (number, (line, settings)) in enumerate(zip(picture, jobs)):
            one = encoded[line.key]
            if place < len(negative) and number in zeros:
                one = Encoded(np.zeros_like(one.encodings), np.zeros_like(one.pooled), {})
            key = (line.key, place < len(negative) and number in zeros, tuple(sorted((name, id(each)) for name, each in settings.items())))
            if key not in rows:
                rows[key] = self._edited(line, settings, one, encoded)
            keys.append(key)
            pooled.append(one.pooled)
        size = np.array([h, w, 0, 0, h, w], np.float32) * self.manifest.latent_scale  # original size, crop, target size
        added = self.manifest.pooled_width is not None
        return Batch(
            picture=np.array(picture),
            unguided={number: place for place, number in enumerate(negative)},
            guided=list(range(len(negative), len(picture))),
            text_embeds=np.stack(pooled) if added else None,
            time_ids=np.tile(size, (len(picture), 1)) if added else None,
            _rows=list(rows.values()),
            _row=np.array([list(rows).index(key) for key in keys]),
        )

    def generate(
        self,
        requests: Sequence[Request],
        *,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        progress: Callable[[int], None] = lambda step: None,
    ) -> list[Image.Image]:
        """One picture per request, drawn together; `decode` and `sample` are its two halves. steps: by default what suits the model."""
        from PIL import Image

        images = self.decode(self.sample(requests, steps=steps, height=height, width=width, progress=progress))
        return [Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)) for image in images]

    def sample(
        self,
        requests: Sequence[Request],
        *,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        progress: Callable[[int], None] = lambda step: None,
    ) -> np.ndarray:
        """The final latents [n, C, h, w] of requests. progress is called with the number of each finished step."""
        shape = self.manifest.latent_shape(height, width)
        noise = [_noise(request, shape) for request in requests]  # a wrong one is said before anything is computed
        scheduler = sampler(self.manifest.schedule, self.alphas_cumprod, self._family.steps if steps is None else steps)
        batch = self.prepare(requests, height=height, width=width)
        scales = np.array([self._guidance(request) for request in requests], np.float32)[:, None, None, None]
        latents = np.stack(noise) * np.float32(scheduler.initial_scale)
        added = {} if batch.text_embeds is None else {"text_embeds": batch.text_embeds, "time_ids": batch.time_ids}
        for step, timestep in enumerate(scheduler.timesteps):
            key, value = batch.keys_and_values(step)
            predicted = self._predict(
                sample=scheduler.scaled(latents, step)[batch.picture],
                timestep=np.full(len(batch.picture), timestep, np.float32),
                key=key,
                value=value,
                **added,
            )
            prediction = predicted[batch.guided]
            if batch.unguided:
                numbers, places = list(batch.unguided), list(batch.unguided.values())
                prediction[numbers] = predicted[places] + scales[numbers] * (prediction[numbers] - predicted[places])
            latents = scheduler.step(prediction, latents, step)
            progress(step + 1)
        return latents

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures [n, 3, H, W] from 0 to 1 of latents [n, C, h, w], one by one: a decoder takes the most memory of all."""
        return np.concatenate([np.asarray(self.graphs["image_decoder"](latents=each[None])[0], np.float32) for each in latents])

    def _predict(self, **arrays: np.ndarray) -> np.ndarray:
        rows = len(arrays["sample"])
        most = self.manifest.max_rows or rows
        parts = [{name: array[start : start + most] for name, array in arrays.items()} for start in range(0, rows, most)]
        return np.concatenate([self.graphs["unet"](**part)[0] for part in parts]).astype(np.float32)

    @property
    def _family(self) -> Family:
        return FAMILIES.get(self.manifest.base.family, CUSTOM)

    def _guidance(self, request: Request) -> float:
        scale = self._family.guidance_scale if request.guidance_scale is None else request.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= 100:
            raise ValueError(f"guidance_scale must be a number from 0 to 100, got {scale!r}")
        return float(scale)

    def _line(self, request: Request, text: str) -> tuple[Line, dict[str, Loaded]]:
        """A prompt of a request with the concepts that act in it, and how each is set."""
        known = self._loaded | {name: self._loaded[self._require(inside)] for name, inside in request.names.items()}
        _check_names(request, known)
        prompt = self.text.parse(text, {name: loaded.concept for name, loaded in known.items()})
        settings: dict[str, Loaded] = {}
        own: dict[str, dict[str, float]] = {}
        for mention in prompt.mentions:
            given = {key: getattr(mention, key) for key in SETTINGS if getattr(mention, key) is not None}
            if own.setdefault(mention.name, given) != given:
                raise PromptError(f"prompt {text!r}: <{mention.name}> is named twice with different settings; give them once or alike.")
            changes = {**_asked(request, mention.name), **given}
            settings[mention.name] = _changed(mention.name, known[mention.name], changes) if changes else known[mention.name]
        acting = {name: each for name, each in settings.items() if callable(each.strength) or np.ndim(each.strength) or each.strength}
        mentions = tuple(mention for mention in prompt.mentions if mention.name in acting)
        line = Line(
            dataclasses.replace(prompt, mentions=mentions),
            {name: each.concept for name, each in acting.items()},
            # under a schedule of strength the word's embedding is the concept's own
            {name: 1.0 if callable(each.strength) or np.ndim(each.strength) else each.strength for name, each in acting.items()},
        )
        _check_apart(text, line.concepts)
        return line, acting

    def _edited(self, line: Line, settings: Mapping[str, Loaded], one: Encoded, encoded: Mapping[Any, Encoded]) -> EditedRow:
        uses = [Use(each.concept, one.places.get(name, ()), each.strength, each.bias, each.temperature) for name, each in settings.items()]
        by_word = any(each.gate == "word" for each in settings.values())
        plain = encoded[line.plain().key].encodings if _global(settings) else None
        return EditedRow(one.encodings, self.key_weight, self.value_weight, uses, plain, WORD_GATE_FLOOR if by_word else None)


def _global(settings: Mapping[str, Loaded]) -> bool:
    return any(each.key_lock == "global" for each in settings.values())


def _asked(request: Request, name: str) -> dict[str, Any]:
    """What a request sets for a concept, by the name that its prompt uses."""
    given = {key: getattr(request, key) for key in (*SETTINGS, "key_lock", "gate")}
    each = {key: value.get(name) if isinstance(value, Mapping) else value for key, value in given.items()}
    return {key: value for key, value in each.items() if value is not None}


def _check_names(request: Request, known: Mapping[str, Any]) -> None:
    """PromptError if something is set for a name that no prompt could write here."""
    for key in (*SETTINGS, "key_lock", "gate"):
        value = getattr(request, key)
        unknown = [name for name in value if name not in known] if isinstance(value, Mapping) else []
        if unknown:
            there = ", ".join(f"<{name}>" for name in sorted(known)) or "none"
            raise PromptError(f"request {request.prompt!r} sets {key} for <{unknown[0]}>, which is no concept here; there are: {there}.")


def _noise(request: Request, shape: tuple[int, int, int]) -> np.ndarray:
    if request.latents is None:
        return randn(shape, request.seed)
    latents = np.asarray(request.latents, np.float32)
    if latents.shape != shape or not np.isfinite(latents).all():
        raise ValueError(f"latents must be finite numbers of shape {shape} for this size, got shape {latents.shape}")
    return latents


def _check_apart(text: str, concepts: Mapping[str, Concept]) -> None:
    chosen = list(concepts.values())
    if len(chosen) > 1:
        dependent = dependent_concepts(np.stack([each.target for each in chosen]), np.stack([each.metric_target for each in chosen]))
        if dependent:
            names = ", ".join(f"<{list(concepts)[place]}>" for place in dependent)
            raise PromptError(f"prompt {text!r}: {names} are nearly the same concept. Write only one of them in a prompt.")


def _changed(name: str, loaded: Loaded, settings: Mapping[str, Any]) -> Loaded:
    """With settings in place of its own; ValueError says which is out of range."""
    choices = {"key_lock": KEY_LOCKS, "gate": GATES}
    for key, value in settings.items():
        if key in choices:
            if value not in choices[key]:
                raise ValueError(f"<{name}>: {key} must be {' or '.join(map(repr, choices[key]))}, got {value!r}")
        elif key in SETTINGS:
            if not callable(value):
                values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
                if not len(values):
                    raise ValueError(f"<{name}>: a schedule of {key} must have at least one number")
                for each in values:
                    check_settings(f"<{name}>", **{key: each})
        elif key in ("region", "regions"):
            raise ValueError(f"<{name}>: regions need attention that reads masks, which an export does not have. Use a pipeline.")
        else:
            raise ValueError(f"<{name}>: there is no setting {key!r}; there are {', '.join(SETTINGS)}, key_lock and gate")
    return dataclasses.replace(loaded, **{key: _checked(name, key, each) if callable(each) else each for key, each in settings.items()})


def _checked(name: str, key: str, schedule: Callable[[int], Any]) -> Callable[[int], float]:
    """A function of the step that raises PromptError where it gives what the setting cannot be."""

    def at(step: int) -> float:
        value = schedule(step)
        check_settings(f"<{name}> at step {step}", **{key: value})
        return float(value)

    return at


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    needed = [facts.WEIGHTS, *(facts.tokenizer_file(number) for number in range(len(manifest.tokenizers)))]
    needed += [facts.graph_file(name, manifest.format) for name in manifest.graphs]
    optional = [f"{name}{ending}" for name in manifest.graphs for ending in (".onnx.data", ".aoti.pt2")]
    wrong = [name for name in needed if name not in manifest.files] + [name for name in manifest.files if name not in (*needed, *optional)]
    if wrong:
        raise ExportedFolderError(f"{folder / facts.MANIFEST}: files must name {', '.join(needed)}; {ascii(wrong[0])} does not fit.")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ExportedFolderError(f"{path} is missing. Copy the exported folder as a whole, or export the model again.")
        if verify and facts.digest(path) != expected:
            raise ExportedFolderError(
                f"{path} is not the file that this export wrote (its SHA-256 differs): it is damaged or belongs to another export. "
                "Copy the exported folder as a whole, or export the model again."
            )


def _read_weights(path: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    outputs, width = manifest.base.outputs, manifest.base.encoding_dim
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            wanted = {"key_weight": [outputs, width], "value_weight": [outputs, width]}
            steps = shapes.pop("alphas_cumprod", [])
            if shapes != wanted or len(steps) != 1 or not 0 < steps[0] <= 10**5:
                raise ExportedFolderError(
                    f"{path} must hold {wanted} and alphas_cumprod of 1 to 100,000 steps, by the manifest beside it, and holds {shapes}: "
                    "it belongs to another model. Export the model again."
                )
            key, value, alphas = (file.get_tensor(name) for name in ("key_weight", "value_weight", "alphas_cumprod"))
    except (SafetensorError, TypeError) as error:
        raise ExportedFolderError(f"{path} is no safetensors file that can be read ({error}). Export the model again.") from None
    floating = key.dtype in (np.float16, np.float32) and value.dtype == key.dtype and alphas.dtype == np.float32
    if not floating or not (np.isfinite(key).all() and np.isfinite(value).all() and (alphas > 0).all() and (alphas <= 1).all()):
        raise ExportedFolderError(f"{path} must hold finite float16 or float32 weights and alphas in (0, 1]. Export the model again.")
    return key, value, alphas
