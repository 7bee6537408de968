"""The compatibility path, and training: forward hooks on `to_k` and `to_v` of every cross-attention layer.

`edit.py` has the equations: all layers read one edited encoding for keys and one for values, and values get an update per layer,
so a pre-hook exchanges the layer's input and a hook adds the update. Weights are never read: LoRA, offloading and
quantised storage stay in charge of them. What does not change from layer to layer and from step to step is computed once
per encoding: a layer looks it up by the identity of the tensor object that it is given. Training, which knows what comes,
holds one edit for a whole step (`ProjectionHooks.hold`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfusion.base import UnsupportedPipeline, cross_attention_layers, layer_width
from perfusion.denoiser_call import DenoiserCall
from perfusion.edit import RowSettings, Tables, edit_encodings, spread

__all__ = ["HookEdit", "KeysValues", "ProjectionHooks", "hook_edit"]

# Processors that never call to_k and to_v
REFUSED = {"Fused": "Call unet.unfuse_qkv_projections() first."}


@dataclasses.dataclass(eq=False)
class HookEdit:
    """What the layers need for one batch of encodings [R, T, D], of which r rows hold concepts.

    rows [r] int64; key_encodings, value_encodings [R, T, D], equal to the encodings in all other rows; value_updates
    [r, T, O] and key_updates [r, T, O] or None, all layers side by side; gates [r, T, J], for the training log.
    """

    rows: Tensor
    key_encodings: Tensor
    value_encodings: Tensor
    value_updates: Tensor
    key_updates: Tensor | None
    gates: Tensor


def hook_edit(
    encodings: Tensor, rows: Tensor, tables: Tables, settings: RowSettings, key_rows: dict[int, Tensor] | None = None
) -> HookEdit:
    """The edit of `rows` [r] of encodings [R, T, D], differentiable in the encodings and the tables' outputs.

    settings: of the rows alone. key_rows: row -> [T, D] for some of `rows`, the encodings that give all keys of a row under the
    global lock. Returned in the encodings' dtype.
    """
    dtype, index = encodings.dtype, settings.index
    edited = edit_encodings(encodings[rows], tables, settings)
    keys, key_updates = edited.keys, None
    with torch.autocast(encodings.device.type, enabled=False):
        value_updates = spread(edited.gates, tables.value_outputs, index).to(dtype)
        if edited.key_gates is not None:
            key_updates = spread(edited.key_gates, tables.key_outputs, index).to(dtype)
        if key_rows:
            places = torch.tensor([rows.tolist().index(row) for row in key_rows], device=rows.device)
            keys = keys.index_copy(0, places, torch.stack([each.to(keys) for each in key_rows.values()]))
            key_updates = None if key_updates is None else key_updates.index_fill(0, places, 0)
    return HookEdit(
        rows,
        encodings.index_copy(0, rows, keys.to(dtype)),
        encodings.index_copy(0, rows, edited.values.to(dtype)),
        value_updates,
        key_updates,
        edited.gates,
    )


@dataclasses.dataclass(eq=False)
class KeysValues:
    """Keys and values [R, T, O] of all layers, side by side, in place of what the layers would compute."""

    keys: Tensor
    values: Tensor


@dataclasses.dataclass(eq=False)
class _Update:
    """One projection under an HookEdit: its input [R, T, D], and what to add to rows [r] of its output [r, T, d], if anything."""

    encodings: Tensor
    rows: Tensor
    updates: Tensor | None

    def reads(self, given: Tensor) -> Tensor:
        return self.encodings

    def gives(self, output: Tensor) -> Tensor | None:
        return None if self.updates is None else output.index_add(0, self.rows.to(output.device), self.updates.to(output))


@dataclasses.dataclass(eq=False)
class _Result:
    """One projection under a KeysValues: it reads no rows, so it computes nothing, and gives what is ready [R, T, d]."""

    output: Tensor

    def reads(self, given: Tensor) -> Tensor:
        return given[:0]

    def gives(self, output: Tensor) -> Tensor:
        return self.output


class ProjectionHooks:
    """Hooks on one UNet, from `install` to `remove`. `edit_of(encodings)` says what an unseen tensor needs, or None.

    driven: the UNet itself is not hooked; who owns the hooks calls `begin` and `end` around each forward.
    """

    def __init__(self, unet: torch.nn.Module, edit_of: Callable[[Tensor], HookEdit | None], *, driven: bool = False):
        self.unet, self.edit_of, self.driven = unet, edit_of, driven
        self.call = DenoiserCall(unet)
        self.held = False
        self.asleep = False  # whether the hooks do nothing
        self._layers = cross_attention_layers(unet)
        self._projections: list[Projection] = []  # to_k and to_v of the first layer, of the second, ...
        self._edits: Any = WeakTensorKeyDictionary()  # the pipeline's tensor -> (its stamp, HookEdit or None, the projections' parts)
        self._handles: list[Any] = []

    @property
    def installed(self) -> bool:
        return bool(self._projections)

    def install(self) -> None:
        for layer in self._layers.values():
            for kind in ("to_k", "to_v"):
                self._projections.append(Projection(self, len(self._projections), layer, kind))
        for projection in self._projections:
            projection.follow()
        if not self.driven:
            begin = self.unet.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._handles = [begin, self.unet.register_forward_hook(self._end)]

    def remove(self) -> None:
        for each in (*self._projections, *self._handles):
            each.remove()
        self._projections, self._handles = [], []
        self.forget()

    def forget(self) -> None:
        """Compute every edit anew: concepts or their settings have changed."""
        self._edits.clear()

    def use(self, encodings: Tensor, edit: HookEdit | None) -> None:
        """Say what a tensor object needs, as long as it lives and stays as it is, instead of asking `edit_of`."""
        self._edits[encodings] = (_stamp(encodings), edit, self._parts(edit))

    @contextlib.contextmanager
    def hold(self, edit: HookEdit | KeysValues) -> Iterator[None]:
        """Inside the `with`, all layers follow this edit, whatever they are given: one step of training, its backward included.

        Nothing is looked up, so a UNet that was compiled after `install` has no graph breaks, with gradients and gradient
        checkpointing too.
        """
        self._check_processors()
        self._show(self._parts(edit))
        self.held = True
        try:
            yield
        finally:
            self.held = False
            self._show(None)

    def find(self, encodings: Tensor) -> tuple[_Update | None, ...]:
        """What the projections need for a tensor object: what is known, or what `edit_of` says, once."""
        if encodings not in self._edits:
            self.use(encodings, self.edit_of(encodings))
        return self._edits[encodings][2]

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.held:
            self.begin(self.call.encodings(args, kwargs))

    def begin(self, encodings: Tensor | None) -> None:
        """A forward of the UNet with these encodings begins."""
        parts = None
        if encodings is not None:
            known = self._edits.get(encodings)
            if known is not None and not _unchanged(encodings, known[0]):
                del self._edits[encodings]
            parts = self.find(encodings)
            if any(part is not None for part in parts):
                self._check_processors()
        self._show(parts)

    @torch.compiler.disable
    def _end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.end()

    def end(self) -> None:
        """The forward has ended."""
        if not self.held:
            self._show(None)

    def _show(self, parts: Sequence[_Update | _Result | None] | None) -> None:
        """Give every projection its part, or none."""
        for projection, part in zip(self._projections, parts or [None] * len(self._projections)):
            if parts is not None:
                projection.follow()
            projection.now = part

    def _parts(self, edit: HookEdit | KeysValues | None) -> tuple[_Update | _Result | None, ...]:
        if edit is None:
            return (None,) * len(self._projections)
        widths = [layer_width(layer) for layer in self._layers.values()]

        def columns(table: Tensor | None) -> Sequence[Tensor | None]:
            # split, not sliced: a slice's gradient is a table of zeros around its columns, which adds up over many layers
            return [None] * len(widths) if table is None else table.split(widths, -1)

        if isinstance(edit, KeysValues):
            return tuple(_Result(output) for pair in zip(columns(edit.keys), columns(edit.values)) for output in pair)
        pairs = zip(columns(edit.key_updates), columns(edit.value_updates))
        inputs = edit.key_encodings, edit.value_encodings
        return tuple(_Update(each, edit.rows, updates) for pair in pairs for each, updates in zip(inputs, pair))

    def _check_processors(self) -> None:
        for name, layer in self._layers.items():
            processor = type(layer.processor).__name__
            for kind, advice in REFUSED.items():
                if kind in processor:
                    raise UnsupportedPipeline(f"concepts do not work with {processor}, which layer {name} was given after attach. {advice}")


class Projection:
    """The hooks on one `to_k` or `to_v`, which is number `place` of all."""

    def __init__(self, hooks: ProjectionHooks, place: int, layer: torch.nn.Module, kind: str):
        self.hooks, self.place, self.layer, self.kind = hooks, place, layer, kind
        self.module: torch.nn.Module | None = None
        self.handles: list[Any] = []
        self.now: _Update | _Result | None = None  # of the UNet's forward that is running, or of the step that is held
        self.pending: _Update | None = None  # between the two hooks

    def follow(self) -> None:
        """Hook the module that is the layer's projection now: LoRA puts one around it, and must read the edited input too."""
        module = getattr(self.layer, self.kind)
        if module is not self.module:
            self.remove()
            self.module = module
            self.handles = [module.register_forward_pre_hook(self.exchange), module.register_forward_hook(self.update)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        # code that was compiled with the hooks still runs them
        self.handles, self.module, self.now, self.pending = [], None, None, None

    @torch.compiler.disable
    def look_up(self, encodings: Tensor) -> _Update | None:
        return self.hooks.find(encodings)[self.place] if self.handles and not self.hooks.asleep else None

    def told(self) -> bool:
        """Whether `now` says it. Looking up by identity breaks a compiled graph, but with gradients a checkpointed layer runs again
        after its forward has ended, and unless the step is held nothing else knows what it is to read. Where the text is projected,
        the layers are given a tensor that nobody has seen."""
        return self.hooks.held or self.hooks.call.projects or (torch.compiler.is_compiling() and not torch.is_grad_enabled())

    def exchange(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.told():
            part = self.now
        else:
            self.pending = part = self.look_up(args[0])
        return None if part is None else (part.reads(args[0]), *args[1:])

    def update(self, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.told():
            part = self.now
        else:
            part, self.pending = self.pending, None
        return None if part is None else part.gives(output)


def _stamp(tensor: Tensor) -> int | Tensor:
    """What a later change in place is noticed by: an inference tensor counts no versions, so a copy."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, stamp: int | Tensor) -> bool:
    return torch.equal(tensor, stamp) if isinstance(stamp, Tensor) else tensor._version == stamp
