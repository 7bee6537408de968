"""`attach` and `detach`: one pipeline object learns to read `<name>` in prompts, and forgets it again without a trace."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.base import Base, UnsupportedPipeline, describe_base
from perfusion.concept import Concept, check_name
from perfusion.editor import Edit, Editor, Tables, make_edit
from perfusion.errors import advise
from perfusion.prompts import Mention, check_settings
from perfusion.text import TextHook, added_tokens, single_token, text_encoders
from perfusion_kernels import ConceptBank

__all__ = ["Handle", "LoadedConcept", "attach", "detach"]

_MARK = "_perfusion_handle"


@dataclasses.dataclass
class LoadedConcept:
    """A concept in a pipeline and how it is set: strength 0 to 4, the gate's bias and temperature, and the key lock.

    `key_lock="local"` takes keys from the edit; `"global"` from the same prompt with the superclass word in place (both:
    arXiv 2305.01644, section 4).
    """

    concept: Concept
    strength: float
    bias: float
    temperature: float
    key_lock: str = "local"

    @property
    def superclass(self) -> str:
        return self.concept.superclass

    @property
    def embeddings(self) -> Sequence[Tensor]:
        return self.concept.word_embeddings

    @property
    def global_lock(self) -> bool:
        return self.key_lock == "global"


def attach(pipe: Any, *, capacity: int = 64) -> Handle:
    """Let a diffusers pipeline use concepts; returns the Handle that loads and sets them.

    pipe: any pipeline around a `UNet2DConditionModel` of the Stable Diffusion 1.x, 2.x or XL family. capacity: how many
    concepts can be loaded at once. Prompts without concepts give bit-identical images. UnsupportedPipeline names what
    cannot be edited; RuntimeError refuses a second attach to the same pipeline. A failed attach changes nothing.

    Pipelines that share a UNet (`from_pipe`) are attached one by one: each reads the concepts of its own handle.
    """
    if getattr(pipe, _MARK, None) is not None:
        raise RuntimeError("perfusion is already attached to this pipeline; use that handle, or perfusion.detach(pipe) first.")
    return Handle(pipe, capacity)


def detach(pipe: Any) -> None:
    """Undo `attach`: every hook is gone and every method is the pipeline's own again."""
    handle = getattr(pipe, _MARK, None)
    if handle is None:
        raise RuntimeError("perfusion is not attached to this pipeline.")
    handle.detach()


class Handle:
    """The concepts of one pipeline. A context manager: leaving it detaches.

    pipe: the pipeline; base: its Base; enabled: see `disable`. Not safe for use from several threads, as pipelines are not.
    """

    def __init__(self, pipe: Any, capacity: int):
        self.base: Base = describe_base(pipe)
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in pipe.unet.modules()):
            raise UnsupportedPipeline("the UNet is compiled already, and would not see the hooks: attach first, compile then.")
        self.pipe = pipe
        self._bank = ConceptBank(capacity, self.base.encoding_dim, self.base.outputs)
        self._loaded: dict[str, LoadedConcept] = {}
        self._text = TextHook(pipe, self._loaded)
        self._editor = Editor(pipe.unet, self._edit_of)
        self._text.install()
        self._editor.install()
        setattr(pipe, _MARK, self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._attached:
            self.detach()

    def __repr__(self) -> str:
        state = "" if self._attached else "detached "
        return f"<{state}perfusion handle of {type(self.pipe).__name__}: {', '.join(map('<{}>'.format, self._loaded)) or 'no concepts'}>"

    def detach(self) -> None:
        """Remove every hook from the pipeline. The handle cannot be used again."""
        self._require_attached()
        self._editor.remove()
        self._text.remove()
        delattr(self.pipe, _MARK)

    def load(self, concept: str | os.PathLike[str] | Concept, name: str | None = None) -> str:
        """Make a concept usable as `<name>`; returns the name, by default the concept's own.

        concept: a file or a Concept. ValueError when it was made for another base (both are named), when the name is
        taken, when no place is free, or when the file cannot be trusted (ConceptFileError). A failed load changes nothing.
        """
        self._require_attached()
        concept = concept if isinstance(concept, Concept) else Concept.load(concept)
        name = concept.name if name is None else name
        check_name(name)
        reason = concept.base.mismatch(self.base)
        if reason is not None:
            raise ValueError(f"concept {concept.name!r} cannot be used with this pipeline: {reason}")
        if name in self._loaded:
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
        for tokenizer, _ in text_encoders(self.pipe):
            single_token(tokenizer, concept.superclass)
        self._warn_about_covariance(name, concept)
        self._bank.add(
            name,
            target=concept.target,
            metric_target=concept.metric_target,
            superclass=concept.superclass_encoding,
            value_output=concept.value_outputs,
        )
        self._loaded[name] = LoadedConcept(concept, 1.0, concept.bias, concept.temperature)
        return name

    def unload(self, name: str) -> None:
        """Forget a concept and free its place. Encodings that were made with it are no longer edited."""
        self._require(name)
        self._bank.remove(name)
        self._text.forget(name)
        del self._loaded[name]
        self._editor.forget()

    def set(
        self,
        name: str,
        *,
        strength: float | None = None,
        bias: float | None = None,
        temperature: float | None = None,
        key_lock: str | None = None,
    ) -> None:
        """Change how a concept acts; what is not given stays. A prompt's own settings go before these.

        strength: 1 as learned, 0 the plain superclass, up to 4. bias: higher weakens the concept and follows the prompt
        more, lower strengthens it. temperature: how sharply the gate opens. key_lock: "local" or "global"; a prompt in which
        any concept has the global one takes all its keys so. Bias and temperature act at once, also on prompts that are
        encoded already; strength and key_lock on prompts encoded from now on. ValueError, and no change, when a value is
        out of range.
        """
        loaded = self._require(name)
        check_settings(f"<{name}>", strength=strength, bias=bias, temperature=temperature)
        if key_lock not in (None, "local", "global"):
            raise ValueError(f'<{name}>: key_lock must be "local" or "global", got {key_lock!r}')
        for field, value in {"strength": strength, "bias": bias, "temperature": temperature, "key_lock": key_lock}.items():
            if value is not None:
                setattr(loaded, field, value)
        self._editor.forget()

    def concepts(self) -> dict[str, LoadedConcept]:
        """What is loaded, by name. A copy: change settings by `set`."""
        return {name: dataclasses.replace(loaded) for name, loaded in self._loaded.items()}

    def check(self, prompts: Sequence[str]) -> None:
        """Raises what drawing any of the prompts would raise for its concepts, their settings and their places; draws nothing."""
        self._require_attached()
        tokens = added_tokens(self.pipe)
        for prompt in prompts:
            self._require_apart([self._text.check(prompt, tokens)])

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
        self._text.enabled = enabled
        self._editor.forget()

    @property
    def _attached(self) -> bool:
        return getattr(self.pipe, _MARK, None) is self

    def _require_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("this handle is detached; perfusion.attach(pipe) gives a new one.")

    def _require(self, name: str) -> LoadedConcept:
        self._require_attached()
        if name not in self._loaded:
            known = ", ".join(sorted(self._loaded)) or "none"
            raise ValueError(f"no concept named {name!r} is loaded; loaded are: {known}")
        return self._loaded[name]

    def _warn_about_covariance(self, name: str, concept: Concept) -> None:
        others = [other for other, loaded in self._loaded.items() if "" != loaded.concept.covariance != concept.covariance != ""]
        if others:
            warnings.warn(
                f"<{name}> was learned with another covariance than {', '.join(map('<{}>'.format, others))}: "
                "in one prompt they combine only approximately.",
                stacklevel=3,
            )

    def _require_apart(self, rows: Sequence[Sequence[Mention]]) -> None:
        """Refuses concepts that cannot share a prompt."""
        try:
            self._bank.index([[mention.name for mention in row] for row in rows])
        except ValueError as error:
            raise ValueError(f"{str(error).removeprefix('ConceptBank: ')}. Write only one of them in a prompt.") from None

    def _edit_of(self, encodings: Tensor) -> Edit | None:
        edits = self._text.rows_of(encodings) if self.enabled else {}
        if not edits:
            return None
        device, rows = encodings.device, [edit.mentions for edit in edits.values()]
        self._require_apart(rows)
        names = list(dict.fromkeys(mention.name for row in rows for mention in row))
        width = max(map(len, rows))

        def table(value_of: Callable[[Mention], float], empty: float, dtype: torch.dtype = torch.float32) -> Tensor:
            values = [[value_of(mention) for mention in row] + [empty] * (width - len(row)) for row in rows]
            return torch.tensor(values, dtype=dtype, device=device)

        def setting(field: str) -> Callable[[Mention], float]:
            return lambda mention: getattr(self._loaded[mention.name] if getattr(mention, field) is None else mention, field)

        return make_edit(
            encodings,
            torch.tensor(list(edits), device=device),
            self._tables(names, device),
            table(lambda mention: names.index(mention.name), -1, torch.int32),
            table(setting("bias"), 0.0),
            table(setting("temperature"), 1.0),
            table(setting("strength"), 0.0),
            {row: edit.key_encoding for row, edit in edits.items() if edit.key_encoding is not None},
        )

    def _tables(self, names: list[str], device: torch.device) -> Tables:
        """The tables of the named concepts alone: a bank may hold many that this prompt does not use."""
        bank, slots = self._bank, [self._bank.slot(name) for name in names]
        tables = Tables(*(table[slots].to(device) for table in (bank.targets, bank.metric_targets, bank.superclasses, bank.value_outputs)))
        keys = [self._loaded[name].concept.key_outputs for name in names]
        if any(key is not None for key in keys):
            tables.unlocked = torch.tensor([key is not None for key in keys], device=device)
            tables.key_outputs = torch.zeros_like(tables.value_outputs)
            for row, key in zip(tables.key_outputs, keys):
                if key is not None:
                    row.copy_(key)
        return tables

