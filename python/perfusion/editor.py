"""The image side of the hook: forward hooks on `to_k` and `to_v` of every cross-attention layer.

The edit of a layer is (arXiv 2305.01644, eq. 3 and 4; DESIGN.md, "What the hook computes")

    K = W_K (e - Aᵀa + Σ_j g_j s_j)         one edited encoding serves the keys of all layers: the key lock
    V = W_V (e - Aᵀa) + Σ_j g_j o*_V,j      one edited encoding for the values, and an update of the outputs per layer

so a pre-hook exchanges the layer's input and a hook adds the update. Weights are never read: LoRA, offloading and
quantised storage stay in charge of them. What does not change from layer to layer and from step to step is computed once
per encoding: a layer looks it up by the identity of the tensor object that it is given. Training, which knows what comes,
holds one edit for a whole step (`Editor.hold`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import perfusion_kernels
from perfusion.base import UnsupportedPipeline, cross_attention_layers, layer_width

__all__ = ["Edit", "EditedEncodings", "Editor", "Projected", "Tables", "edit_encodings", "make_edit"]

# Processors that never call to_k and to_v, or that give the layer more than text
REFUSED = {"Fused": "Call unet.unfuse_qkv_projections() first.", "IPAdapter": "Call pipe.unload_ip_adapter() first."}


@dataclasses.dataclass
class Tables:
    """The concepts of a set of rows: S concepts in a bank's layout.

    targets, metric_targets, superclasses [S, D]; value_outputs [S, O]; key_outputs [S, O] of the concepts whose keys were
    trained without the lock, and unlocked [S] bool saying which those are, or None for neither.
    """

    targets: Tensor
    metric_targets: Tensor
    superclasses: Tensor
    value_outputs: Tensor
    key_outputs: Tensor | None = None
    unlocked: Tensor | None = None


@dataclasses.dataclass(eq=False)
class Edit:
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


def make_edit(
    encodings: Tensor,
    rows: Tensor,
    tables: Tables,
    index: Tensor,
    bias: Tensor,
    temperature: Tensor,
    strength: Tensor,
    key_rows: dict[int, Tensor] | None = None,
) -> Edit:
    """Compute the edit of `rows` [r] of encodings [R, T, D], differentiable in the encodings and the tables' outputs.

    index, bias, temperature, strength: as in `edit_encodings`, of the rows alone. key_rows: row -> [T, D] for some of
    `rows`, the encodings that give all keys of a row under the global lock. Returned in the encodings' dtype.
    """
    dtype = encodings.dtype
    edited = edit_encodings(encodings[rows], tables, index, bias, temperature, strength)
    keys, key_updates = edited.keys, None
    with torch.autocast(encodings.device.type, enabled=False):
        value_updates = _spread(edited.gates, tables.value_outputs, index).to(dtype)
        if edited.key_gates is not None:
            key_updates = _spread(edited.key_gates, tables.key_outputs, index).to(dtype)
        if key_rows:
            places = torch.tensor([rows.tolist().index(row) for row in key_rows], device=rows.device)
            keys = keys.index_copy(0, places, torch.stack(list(key_rows.values())).to(keys))
            key_updates = None if key_updates is None else key_updates.index_fill(0, places, 0)
    return Edit(
        rows,
        encodings.index_copy(0, rows, keys.to(dtype)),
        encodings.index_copy(0, rows, edited.values.to(dtype)),
        value_updates,
        key_updates,
        edited.gates,
    )


@dataclasses.dataclass(eq=False)
class EditedEncodings:
    """What `to_k` and `to_v` are to read, and the gates that open the outputs added to what they give.

    keys, values [r, T, D]; gates [r, T, J] of the value outputs; key_gates [r, T, J] of the key outputs, or None under the
    key lock. All float32 at least.
    """

    keys: Tensor
    values: Tensor
    gates: Tensor
    key_gates: Tensor | None


def edit_encodings(
    encodings: Tensor, tables: Tables, index: Tensor, bias: Tensor, temperature: Tensor, strength: Tensor
) -> EditedEncodings:
    """The part of an edit that all layers share, of encodings [r, T, D], each row with its concepts.

    index [r, J] int32 names the concepts of each row, -1 for none; bias, temperature, strength [r, J] float32. Strength
    scales the whole edit of a concept: 0 leaves the row as it is. Computed in at least float32, under autocast too. The
    concepts of a row must be independent; `ConceptBank.index` refuses others.
    """
    wide = torch.promote_types(encodings.dtype, torch.float32)
    with torch.autocast(encodings.device.type, enabled=False):
        metric = (tables.targets, tables.metric_targets)
        gates, components = perfusion_kernels.concept_gates(encodings, *metric, index, bias, temperature)
        # both are 0 where index is -1
        gates, components = (gates * strength[:, None]).to(wide), (components * strength[:, None]).to(wide)
        values = encodings.to(wide) - _spread(components, tables.targets, index)
        locked, key_gates = gates, None
        if tables.unlocked is not None:
            unlocked = tables.unlocked[index.clamp(min=0).long()][:, None]
            locked, key_gates = gates.masked_fill(unlocked, 0), gates.masked_fill(~unlocked, 0)
        return EditedEncodings(values + _spread(locked, tables.superclasses, index), values, gates, key_gates)


def _spread(coefficients: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Σ_j coefficients[r, T, j] · table[index[r, j]]: [r, T, n]."""
    return torch.einsum("rtj,rjn->rtn", coefficients, table[index.clamp(min=0).long()].to(coefficients.dtype))


@dataclasses.dataclass(eq=False)
class Projected:
    """Keys and values [R, T, O] of all layers, side by side, in place of what the layers would compute."""

    keys: Tensor
    values: Tensor


@dataclasses.dataclass(eq=False)
class _Update:
    """One projection under an Edit: its input [R, T, D], and what to add to rows [r] of its output [r, T, d], if anything."""

    encodings: Tensor
    rows: Tensor
    updates: Tensor | None

    def reads(self, given: Tensor) -> Tensor:
        return self.encodings

    def gives(self, output: Tensor) -> Tensor | None:
        return None if self.updates is None else output.index_add(0, self.rows.to(output.device), self.updates.to(output))


@dataclasses.dataclass(eq=False)
class _Result:
    """One projection under a Projected: it reads no rows, so it computes nothing, and gives what is ready [R, T, d]."""

    output: Tensor

    def reads(self, given: Tensor) -> Tensor:
        return given[:0]

    def gives(self, output: Tensor) -> Tensor:
        return self.output


class Editor:
    """Hooks on one UNet, from `install` to `remove`. `edit_of(encodings)` says what an unseen tensor needs, or None."""

    def __init__(self, unet: torch.nn.Module, edit_of: Callable[[Tensor], Edit | None]):
        self.unet, self.edit_of = unet, edit_of
        self.held = False
        self._layers = cross_attention_layers(unet)
        self._projections: list[_Projection] = []  # to_k and to_v of the first layer, of the second, ...
        self._edits: Any = WeakTensorKeyDictionary()  # the pipeline's tensor -> (its stamp, Edit or None, the projections' parts)
        self._handles: list[Any] = []

    def install(self) -> None:
        for layer in self._layers.values():
            for kind in ("to_k", "to_v"):
                self._projections.append(_Projection(self, len(self._projections), layer, kind))
        for projection in self._projections:
            projection.follow()
        self._handles = [self.unet.register_forward_pre_hook(self._begin, with_kwargs=True), self.unet.register_forward_hook(self._end)]

    def remove(self) -> None:
        for each in (*self._projections, *self._handles):
            each.remove()
        self._projections, self._handles = [], []
        self.forget()

    def forget(self) -> None:
        """Compute every edit anew: concepts or their settings have changed."""
        self._edits.clear()

    def use(self, encodings: Tensor, edit: Edit | None) -> None:
        """Say what a tensor object needs, as long as it lives and stays as it is, instead of asking `edit_of`."""
        self._edits[encodings] = (_stamp(encodings), edit, self._parts(edit))

    @contextlib.contextmanager
    def hold(self, edit: Edit | Projected) -> Iterator[None]:
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
        if self.held:
            return
        encodings, parts = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None), None
        if isinstance(encodings, Tensor):
            known = self._edits.get(encodings)
            if known is not None and not _unchanged(encodings, known[0]):
                del self._edits[encodings]
            parts = self.find(encodings)
            if any(part is not None for part in parts):
                self._check_processors()
        self._show(parts)

    @torch.compiler.disable
    def _end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.held:
            self._show(None)

    def _show(self, parts: Sequence[_Update | _Result | None] | None) -> None:
        """Give every projection its part, or none."""
        for projection, part in zip(self._projections, parts or [None] * len(self._projections)):
            if parts is not None:
                projection.follow()
            projection.now = part

    def _parts(self, edit: Edit | Projected | None) -> tuple[_Update | _Result | None, ...]:
        if edit is None:
            return (None,) * len(self._projections)
        widths = [layer_width(layer) for layer in self._layers.values()]

        def columns(table: Tensor | None) -> Sequence[Tensor | None]:
            # split, not sliced: a slice's gradient is a table of zeros around its columns, which adds up over many layers
            return [None] * len(widths) if table is None else table.split(widths, -1)

        if isinstance(edit, Projected):
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


class _Projection:
    """The hooks on one `to_k` or `to_v`, which is number `place` of all."""

    def __init__(self, editor: Editor, place: int, layer: torch.nn.Module, kind: str):
        self.editor, self.place, self.layer, self.kind = editor, place, layer, kind
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
        return self.editor.find(encodings)[self.place] if self.handles else None

    def told(self) -> bool:
        """Whether `now` says it. Looking up by identity breaks a compiled graph, but with gradients a checkpointed layer runs again
        after its forward has ended, and unless the step is held nothing else knows what it is to read."""
        return self.editor.held or (torch.compiler.is_compiling() and not torch.is_grad_enabled())

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
