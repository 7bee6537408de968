"""`attach` and `detach`: one pipeline object learns to read `<name>` in prompts, and forgets it again without a trace."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.base import Base, UnsupportedPipeline, describe_base
from perfusion.concept import Concept, check_name
from perfusion.editor import Edit, Editor, Tables, make_edit
from perfusion.prompts import check_settings
from perfusion.text import TextHook, Word, single_token, text_encoders
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
    cannot be edited; a second attach to the same pipeline is refused.
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

    pipe: the pipeline; base: its Base. Not safe for use from several threads, as pipelines are not.
    """

    def __init__(self, pipe: Any, capacity: int):
        if hasattr(pipe.unet, "_orig_mod"):
            raise UnsupportedPipeline("the UNet is already compiled, and hooks added after torch.compile do nothing: attach first, compile then.")
        self.base: Base = describe_base(pipe)
        self.pipe = pipe
        self._bank = ConceptBank(capacity, self.base.encoding_dim, self.base.outputs)
        self._loaded: dict[str, LoadedConcept] = {}
        self._text = TextHook(pipe, self._loaded)
        self._editor = Editor(pipe.unet, self._edit_of)
        self.enabled = True
        self._text.install()
        self._editor.install()
        setattr(pipe, _MARK, self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        if getattr(self.pipe, _MARK, None) is self:
            self.detach()

    def __repr__(self) -> str:
        return f"<perfusion handle of {type(self.pipe).__name__}: {', '.join(map('<{}>'.format, self._loaded)) or 'no concepts'}>"

    def detach(self) -> None:
        """Remove every hook from the pipeline. The handle cannot be used again."""
        self._editor.remove()
        self._text.remove()
        delattr(self.pipe, _MARK)

    def load(self, concept: str | os.PathLike[str] | Concept, name: str | None = None) -> str:
        """Make a concept usable as `<name>`; returns the name, by default the concept's own.

        concept: a file or a Concept. ValueError when it was made for another base (both are named), when the name is
        taken, when no place is free, or when the file cannot be trusted (ConceptFileError).
        """
        concept = concept if isinstance(concept, Concept) else Concept.load(concept)
        name = concept.name if name is None else name
        check_name(name)
        reason = concept.base.mismatch(self.base)
        if reason is not None:
            raise ValueError(f"concept {concept.name!r} cannot be used with this pipeline: {reason}")
        if name in self._loaded:
            raise ValueError(f"a concept <{name}> is loaded already; unload it, or load this one under another name=.")
        for tokenizer, _ in text_encoders(self.pipe):
            single_token(tokenizer, concept.superclass)
        others = {loaded.concept.covariance for loaded in self._loaded.values()} - {concept.covariance}
        if others:
            warnings.warn(
                f"<{name}> was learned with another covariance than {', '.join(map('<{}>'.format, self._loaded))}: "
                "in one prompt they combine only approximately.",
                stacklevel=2,
            )
        self._bank.add(
            name,
            target=concept.target,
            metric_target=concept.metric_target,
            superclass=concept.superclass_encoding,
            value_output=concept.value_outputs,
        )
        self._loaded[name] = LoadedConcept(concept, 1.0, concept.bias, concept.temperature)
        self._changed()
        return name

    def unload(self, name: str) -> None:
        """Forget a concept and free its place."""
        self._require(name)
        self._bank.remove(name)
        self._text.forget(name)
        del self._loaded[name]
        self._changed()

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
        more, lower strengthens it. temperature: how sharply the gate opens. key_lock: "local" or "global"; this one and
        strength act on prompts encoded from now on.
        """
        loaded = self._require(name)
        check_settings(f"<{name}>", strength=strength, bias=bias, temperature=temperature)
        if key_lock not in (None, "local", "global"):
            raise ValueError(f'<{name}>: key_lock must be "local" or "global", got {key_lock!r}')
        for field, value in {"strength": strength, "bias": bias, "temperature": temperature, "key_lock": key_lock}.items():
            if value is not None:
                setattr(loaded, field, value)
        self._changed()

    def concepts(self) -> dict[str, LoadedConcept]:
        """What is loaded, by name. A copy: change settings by `set`."""
        return {name: dataclasses.replace(loaded) for name, loaded in self._loaded.items()}

    def disable(self) -> None:
        """Leave every edit out until `enable`: `<name>` then reads as its superclass word with the learned embedding."""
        self.enabled = False
        self._changed()

    def enable(self) -> None:
        self.enabled = True
        self._changed()

    def _require(self, name: str) -> LoadedConcept:
        if name not in self._loaded:
            known = ", ".join(sorted(self._loaded)) or "none"
            raise KeyError(f"no concept named {name!r} is loaded; loaded are: {known}")
        return self._loaded[name]

    def _changed(self) -> None:
        self._editor.forget()

    def _edit_of(self, encodings: Tensor) -> Edit | None:
        edits = self._text.rows_of(encodings) if self.enabled else {}
        if not edits:
            return None
        device, mentions = encodings.device, [edit.mentions for edit in edits.values()]
        index = self._bank.index([[mention.name for mention in row] for row in mentions]).to(device)

        def column(field: str, empty: float) -> Tensor:
            values = [[getattr(m, field) if getattr(m, field) is not None else getattr(self._loaded[m.name], field) for m in row] for row in mentions]
            return torch.tensor([row + [empty] * (index.shape[1] - len(row)) for row in values], dtype=torch.float32, device=device)

        return make_edit(
            encodings,
            torch.tensor(list(edits), device=device),
            self._tables(device),
            index,
            column("bias", 0.0),
            column("temperature", 1.0),
            column("strength", 0.0),
            {row: edit.key_encoding for row, edit in edits.items() if edit.key_encoding is not None},
        )

    def _tables(self, device: torch.device) -> Tables:
        bank = self._bank
        free = {bank.slot(name): loaded.concept for name, loaded in self._loaded.items() if loaded.concept.key_outputs is not None}
        tables = Tables(*(table.to(device) for table in (bank.targets, bank.metric_targets, bank.superclasses, bank.value_outputs)))
        if free:
            tables.unlocked = torch.zeros(bank.capacity, dtype=torch.bool, device=device)
            tables.key_outputs = torch.zeros_like(tables.value_outputs)
            for slot, concept in free.items():
                tables.unlocked[slot] = True
                tables.key_outputs[slot] = concept.key_outputs.to(tables.key_outputs)
        return tables
