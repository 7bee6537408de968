"""`attach` and `detach`: one pipeline object learns to read `<name>` in prompts, and forgets it again without a trace."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from perfusion.base import Base, denoiser, describe_base, project_text, text_encoders
from perfusion.base.parts import plain_module
from perfusion.client_concepts import ClientConcepts, HeldConcepts
from perfusion.concept import Concept
from perfusion.concept_store import ConceptStore
from perfusion.engine import engine_of
from perfusion.errors import UnsupportedPipeline, advise
from perfusion.loaded_concept import LoadedConcept, Schedule
from perfusion.requests import RowRequest, check_schedule
from perfusion.settings import GATES, KEY_LOCKS, one_of
from perfusion.text import TextHook, added_tokens
from perfusion.wrapped_method import WrappedMethod

__all__ = ["Handle", "LoadedConcept", "attach", "detach"]

# A token that nobody knows is taken for a concept's from these on: the similarity c(e), and the cosine with the concept's target. On
# toybox own words have at least .68 and .74; plain superclass words c up to .30, other words any c and a cosine up to .36
# (bench/recognition.py). No number here decides what is drawn: it only warns.
DOUBT, DIRECTION = 0.5, 0.55

_MARK = "_perfusion_handle"


def seeming(concept: Concept, words: Tensor) -> float:
    """The largest similarity c(e) of tokens [..., D] that point where the concept's target does; 0 where none does."""
    near = cosine_similarity(words.float(), concept.target.to(words.device).float(), dim=-1) > DIRECTION
    return float(concept.similarity(words)[near].amax()) if near.any() else 0.0


def attach(
    pipe: Any, *, capacity: int = 64, exact: bool = False, graphs: bool = False, store: ConceptStore | None = None
) -> Handle:
    """Let a diffusers pipeline use concepts; returns the Handle that loads and sets them.

    pipe: any pipeline that docs/pipelines.md lists, or one of that shape. capacity: how many concepts can be loaded at once.
    Batches without concepts give bit-identical images. In a batch with concepts, rows without one agree with the plain pipeline
    up to rounding; exact=True keeps their bits, by a slower path. graphs: the UNet's forward is recorded as a CUDA graph per
    form and shapes of its arguments, replayed for all prompts and concepts; without CUDA it says so, and the UNet runs as it is.
    store: concepts that `Request.names` reach by id, see `ConceptStore`. UnsupportedPipeline names what cannot be edited;
    RuntimeError refuses a second attach to the same pipeline. A failed attach changes nothing.

    Pipelines that share a UNet (`from_pipe`) are attached one by one: each reads the concepts of its own handle. A pipeline
    without text encoders is given encodings, which `Handle.bind` explains.

    Threads whose pipelines share a UNet, a text encoder or a tokenizer wait for each other, and what one loads or sets acts from the
    next forward on. A pipeline that is not attached does not wait: give it a tokenizer of its own (`copy.deepcopy(pipe.tokenizer)`), as
    a tokenizer keeps padding and truncation in itself, with perfusion or without.
    """
    if getattr(pipe, _MARK, None) is not None:
        raise RuntimeError("perfusion is already attached to this pipeline; use that handle, or perfusion.detach(pipe) first.")
    return Handle(pipe, capacity, exact=exact, graphs=graphs, store=store)


def detach(pipe: Any) -> None:
    """Undo `attach`: every hook is gone and every method is the pipeline's own again."""
    handle = getattr(pipe, _MARK, None)
    if handle is None:
        raise RuntimeError("perfusion is not attached to this pipeline.")
    handle.detach()


class Handle:
    """The concepts of one pipeline. A context manager: leaving it detaches.

    pipe: the pipeline; base: its Base; enabled: see `disable`; exact: see `attach`.

    Kernels that meet a slot or an index out of range read nothing for it and note it on the device, where no call can raise. RuntimeError
    tells of it before the UNet's next forward, or at the end of the pipeline's call, whichever comes first after the device has met it:
    at both the note is read and nothing waits for the device. Concepts and settings stay, and the handle goes on: keys, values and
    indices are written anew. `perfusion_kernels.check_device(device)` waits and asks at once, as after latents, for which no call waits.
    """

    def __init__(
        self, pipe: Any, capacity: int, *, exact: bool = False, graphs: bool = False, store: ConceptStore | None = None
    ):
        self.base: Base = describe_base(pipe, text_required=False)
        self.pipe, self.exact = pipe, exact
        if exact and self.compiled():
            raise UnsupportedPipeline("the UNet is compiled already, and exact=True needs hooks in it: attach first, compile then.")
        self._concepts = ClientConcepts(self.base, capacity, store)
        self._doubted: set[str] = set()
        self._text = TextHook(pipe, self._concepts, self._begin_prompt)
        self._encoders = text_encoders(pipe, required=False)
        self._engine = engine_of(plain_module(denoiser(pipe)))
        self._end = WrappedMethod(pipe, "maybe_free_model_hooks") if callable(getattr(pipe, "maybe_free_model_hooks", None)) else None
        self._text.install()
        if self._end is not None:
            self._end.wrap(self._ending)
        self._engine.add(self)
        if graphs:
            self._engine.use_graphs()
        setattr(pipe, _MARK, self)

    def __deepcopy__(self, memo: Any) -> Handle:
        raise RuntimeError("a pipeline with perfusion attached cannot be copied: detach, copy, and attach to both.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a pipeline with perfusion attached cannot be pickled: detach first, and attach where it is loaded.")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._attached:
            self.detach()

    def __repr__(self) -> str:
        state = "" if self._attached else "detached "
        return f"<{state}perfusion handle of {type(self.pipe).__name__}: {', '.join(map('<{}>'.format, self._concepts)) or 'no concepts'}>"

    def detach(self) -> None:
        """Remove every hook from the pipeline. The handle cannot be used again."""
        self._require_attached()
        self._engine.remove(self)
        self._text.remove()
        if self._end is not None:
            self._end.unwrap()
        delattr(self.pipe, _MARK)

    def load(self, concept: str | os.PathLike[str] | Concept, name: str | None = None) -> str:
        """Make a concept usable as `<name>`; returns the name, by default the concept's own.

        concept: a file, an id on the Hugging Face hub ("user/concept", "user/concept@revision") or a Concept. ValueError when it
        was made for another base (both are named), when the name is
        taken, when no place is free, or when the file cannot be trusted (ConceptFileError). A failed load changes nothing.
        """
        self._require_attached()
        name = self._concepts.load(concept, name, "pipeline", self._check)
        self._doubted.discard(name)
        self._engine.follow()
        return name

    def _check(self, name: str, concept: Concept) -> None:
        """What a concept must pass beside what every client asks of it."""
        if self._concepts.is_loaded(name):
            raise advise(
                ValueError(f"a concept <{name}> is loaded already."),
                python="Unload it, or load this one under another name=.",
                command="Give this one another name with --concept NAME=FILE.",
            )
        if f"<{name}>" in {token.lower() for token in added_tokens(self.pipe)}:
            raise advise(
                ValueError(f"the tokenizer has a word <{name}> of its own (a textual inversion)."),
                python="Load this concept under another name=.",
                command="Give this concept another name with --concept NAME=FILE.",
            )
        self._text.learn(name, concept.superclass)
        self._warn_about_covariance(name, concept)

    def unload(self, name: str) -> None:
        """Forget a concept and free its place. Encodings that were made with it are no longer edited."""
        self._require(name)
        with self._engine.between_forwards:
            self._concepts.unload(name)
            self._text.forget(name)
            self._engine.forget()
            self._engine.follow()

    def set(
        self,
        name: str,
        *,
        strength: Schedule | None = None,
        bias: Schedule | None = None,
        temperature: Schedule | None = None,
        key_lock: str | None = None,
        gate: str | None = None,
    ) -> None:
        """Change how a concept acts; what is not given stays. A prompt's own settings go before these.

        strength: 1 as learned, 0 the plain superclass, up to 4. bias: higher weakens the concept and follows the prompt
        more, lower strengthens it. temperature: how sharply the gate opens. Each is a number, a list with one number a step,
        the last of which holds on, or a function of the step, which counts from 0; under a schedule of strength the word's
        embedding is the concept's own. key_lock: "local" or "global"; a prompt in which any concept has the global one takes all
        its keys so. gate: "similarity", as published, or "word": at the concept's own word at least 0.7, at other concepts'
        words 0. Bias and temperature act at once, also on prompts that are
        encoded already; strength and key_lock on prompts encoded from now on. ValueError, and no change, when a value is
        out of range.
        """
        loaded = self._require(name)
        given = {"strength": strength, "bias": bias, "temperature": temperature}
        for key, value in given.items():
            if value is not None:
                check_schedule(f"<{name}>", key, value)
        for key, value, allowed in (("key_lock", key_lock, KEY_LOCKS), ("gate", gate, GATES)):
            if value is not None and value not in allowed:
                raise ValueError(f"<{name}>: {key} must be {one_of(allowed)}, got {value!r}")
        with self._engine.between_forwards:
            for field, value in {**given, "key_lock": key_lock, "gate": gate}.items():
                if value is not None:
                    setattr(loaded, field, value)
            self._engine.forget()

    def concepts(self) -> dict[str, LoadedConcept]:
        """What is loaded, by name. A copy: change settings by `set`."""
        return {name: dataclasses.replace(loaded) for name, loaded in self._concepts.items()}

    def check(self, prompts: Sequence[str]) -> None:
        """Raises what drawing any of the prompts would raise for its concepts, their settings and their places; draws nothing."""
        self._require_attached()
        tokens = added_tokens(self.pipe)
        for prompt in prompts:
            self._concepts.begin_prompt()
            names = [mention.name for mention in self._text.check(prompt, tokens)]
            self.hold(names).require_independent([names])

    @property
    def enabled(self) -> bool:
        return self._text.enabled

    def disable(self) -> None:
        """Let every `<name>` read as its plain superclass word, and edit nothing, until `enable`."""
        self._enable(False)

    def enable(self) -> None:
        """Undo `disable`."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        self._require_attached()
        with self._engine.between_forwards:
            self._text.enabled = enabled
            self._engine.forget()
            self._engine.follow()

    def bind(self, encodings: Tensor, prompts: str | Sequence[str]) -> None:
        """Say with which prompts encodings were made that perfusion did not see made: weighted, joined, loaded from a file.

        encodings [R, T, D]: as the pipeline is going to be given them, so as its text encoders make them. prompts: one, or one for
        each row, with concepts as `<name>`, or a `Request`. Known encodings are recognised without it, also scaled, cast, saved
        and joined ones.
        ValueError says what does not fit.
        """
        self._require_attached()
        texts = [prompts] * len(encodings) if isinstance(prompts, str) else list(prompts)
        width = sum(self.base.text_widths)
        if encodings.dim() != 3 or encodings.shape[-1] != width or len(texts) != len(encodings):
            raise ValueError(
                f"bind: encodings must be [R, T, {width}] with one prompt for each of R rows, got "
                f"{list(encodings.shape)} and {len(texts)} prompts"
            )
        self._concepts.begin_prompt()
        self._text.bind(encodings, texts)
        self._engine.forget()

    def explain(self) -> list[str]:
        """What the UNet did in its last forward and why, and what stands in the way of something faster; a sentence each."""
        self._require_attached()
        return self._engine.explain()

    def layer_paths(self) -> dict[str, tuple[str, str]]:
        """layer -> the path that a concept takes in it, "slots" or "hooks", and why, in the words of `explain`; nothing need be drawn."""
        self._require_attached()
        return self._engine.layer_paths()

    def memory(self) -> dict[str, int]:
        """Bytes that are held for concepts: the bank, slots of keys and values, stacked weights, edits."""
        self._require_attached()
        return {"bank": self._concepts.nbytes(), **self._engine.memory()}

    def _ending(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What pipelines call last, when images are in host memory and the device has nothing left to do."""

        @functools.wraps(original)
        def maybe_free_model_hooks(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._attached:
                self._engine.check_device()
            return result

        return maybe_free_model_hooks

    def _begin_prompt(self) -> None:
        """A prompt is going to be encoded: nothing may have been exchanged since attach."""
        if plain_module(denoiser(self.pipe)) is not self._engine.unet:
            name = "unet" if getattr(self.pipe, "unet", None) is not None else "transformer"
            raise RuntimeError(f"pipe.{name} was exchanged after attach: perfusion.detach(pipe), and attach anew.")
        for tokenizer, encoder in text_encoders(self.pipe, required=False):
            if not any(tokenizer is old and plain_module(encoder) is plain_module(before) for old, before in self._encoders):
                raise RuntimeError("a text encoder or tokenizer was exchanged after attach: perfusion.detach(pipe), and attach anew.")
        self._concepts.begin_prompt()
        self._engine.begin_prompt(self)

    @property
    def _attached(self) -> bool:
        return getattr(self.pipe, _MARK, None) is self

    def _require_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("this handle is detached; perfusion.attach(pipe) gives a new one.")

    def _require(self, name: str) -> LoadedConcept:
        self._require_attached()
        return self._concepts.loaded(name)

    def _warn_about_covariance(self, name: str, concept: Concept) -> None:
        others = [other for other, loaded in self._concepts.items() if "" != loaded.concept.covariance != concept.covariance != ""]
        if others:
            warnings.warn(
                f"<{name}> was learned with another covariance than {', '.join(map('<{}>'.format, others))}: "
                "in one prompt they combine only approximately.",
                stacklevel=5,
            )

    # what the engine asks

    def has_concepts(self) -> bool:
        return bool(self._concepts) and self.enabled

    def compiled(self) -> bool:
        return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in denoiser(self.pipe).modules())

    def hold(self, names: Sequence[str]) -> HeldConcepts:
        return self._concepts.hold(names)

    def rows_of(self, encodings: Tensor) -> dict[int, RowRequest]:
        return self._text.rows_of(encodings)

    def doubt(self, encodings: Tensor, rows: Collection[int]) -> None:
        """Warn of rows that look as if they held a concept and are not known. Similarity alone cannot decide: it only warns."""
        unknown = [row for row in rows if not self._text.knows(encodings[row])]
        for name, loaded in self._concepts.items():
            if name in self._doubted or not unknown:
                continue
            words = project_text(self._engine.unet, encodings[unknown].detach())[:, 1:]  # most begin with a token that is always the same
            similarity = seeming(loaded.concept.to(encodings.device), words)
            if similarity > DOUBT:
                self._doubted.add(name)
                warnings.warn(
                    f"an encoding seems to hold <{name}> (similarity {similarity:.2f}), and perfusion does not know it: it is drawn "
                    "without the concept. Say with handle.bind(embeds, prompt) how it was made.",
                    stacklevel=2,
                )
