"""The image side of the hook: forward hooks on `to_k` and `to_v` of every cross-attention layer.

The edit of a layer is (arXiv 2305.01644, eq. 3 and 4; DESIGN.md, "What the hook computes")

    K = W_K (e - Aᵀa + Σ_j g_j s_j)         one edited encoding serves the keys of all layers: the key lock
    V = W_V (e - Aᵀa) + Σ_j g_j o*_V,j      one edited encoding for the values, and an update of the outputs per layer

so a pre-hook exchanges the layer's input and a hook adds the update. Weights are never read: LoRA, offloading and
quantised storage stay in charge of them. What does not change from layer to layer and from step to step is computed once
per encoding: a layer looks it up by the identity of the tensor object that it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import perfusion_kernels
from perfusion.base import UnsupportedPipeline, cross_attention_layers, layer_width

__all__ = ["Edit", "Editor", "Tables", "make_edit"]

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

    index [r, J] int32 names the concepts of each row, -1 for none; bias, temperature, strength [r, J] float32. Strength
    scales the whole edit of a concept: 0 leaves the row as it is. key_rows: row -> [T, D] for some of `rows`, the
    encodings that give all keys of a row under the global lock. Computed in at least float32, under autocast too, and
    returned in the encodings' dtype. The concepts of a row must be independent; `ConceptBank.index` refuses others.
    """
    dtype, wide = encodings.dtype, torch.promote_types(encodings.dtype, torch.float32)
    slots = index.clamp(min=0).long()
    with torch.autocast(encodings.device.type, enabled=False):
        original = encodings[rows]
        metric = (tables.targets, tables.metric_targets)
        gates, components = perfusion_kernels.concept_gates(original, *metric, index, bias, temperature)
        # both are 0 where index is -1
        gates, components = (gates * strength[:, None]).to(wide), (components * strength[:, None]).to(wide)

        def spread(coefficients: Tensor, table: Tensor) -> Tensor:
            return torch.einsum("rtj,rjn->rtn", coefficients, table[slots].to(wide))

        values = original.to(wide) - spread(components, tables.targets)
        value_updates = spread(gates, tables.value_outputs).to(dtype)
        locked, key_updates = gates, None
        if tables.unlocked is not None:
            unlocked = tables.unlocked[slots][:, None]
            locked = gates.masked_fill(unlocked, 0)
            key_updates = spread(gates.masked_fill(~unlocked, 0), tables.key_outputs).to(dtype)
        keys = values + spread(locked, tables.superclasses)
        if key_rows:
            places = torch.tensor([rows.tolist().index(row) for row in key_rows], device=rows.device)
            keys = keys.index_copy(0, places, torch.stack(list(key_rows.values())).to(keys))
            key_updates = None if key_updates is None else key_updates.index_fill(0, places, 0)
    return Edit(
        rows,
        encodings.index_copy(0, rows, keys.to(dtype)),
        encodings.index_copy(0, rows, values.to(dtype)),
        value_updates,
        key_updates,
        gates,
    )


@dataclasses.dataclass(eq=False)
class _Part:
    """What one projection needs of an Edit: its input [R, T, D], and what to add to rows [r] of its output [r, T, d], if anything."""

    encodings: Tensor
    rows: Tensor
    updates: Tensor | None


class Editor:
    """Hooks on one UNet, from `install` to `remove`. `edit_of(encodings)` says what an unseen tensor needs, or None."""

    def __init__(self, unet: torch.nn.Module, edit_of: Callable[[Tensor], Edit | None]):
        self.unet, self.edit_of = unet, edit_of
        self._layers = cross_attention_layers(unet)
        self._projections: list[_Projection] = []
        self._edits: Any = WeakTensorKeyDictionary()  # the pipeline's tensor -> (its stamp, Edit or None)
        self._handles: list[Any] = []

    def install(self) -> None:
        end = 0
        for layer in self._layers.values():
            columns = slice(end, end := end + layer_width(layer))
            self._projections += [_Projection(self, layer, kind, columns) for kind in ("key", "value")]
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
        """Say what a tensor object needs, as long as it lives and stays as it is, instead of asking `edit_of`; training does."""
        self._edits[encodings] = (_stamp(encodings), edit)

    def find(self, encodings: Tensor) -> Edit | None:
        """The edit of a tensor object: the one that is known, or what `edit_of` says, once."""
        known = self._edits.get(encodings)
        if known is None:
            self.use(encodings, edit := self.edit_of(encodings))
            return edit
        return known[1]

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        encodings = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        edit = None
        if isinstance(encodings, Tensor):
            known = self._edits.get(encodings)
            if known is not None and not _unchanged(encodings, known[0]):
                del self._edits[encodings]
            edit = self.find(encodings)
        if edit is not None:
            self._check_processors()
        for projection in self._projections:
            projection.follow()
            projection.now = projection.part_of(edit)

    @torch.compiler.disable
    def _end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for projection in self._projections:
            projection.now = None

    def _check_processors(self) -> None:
        for name, layer in self._layers.items():
            processor = type(layer.processor).__name__
            for kind, advice in REFUSED.items():
                if kind in processor:
                    raise UnsupportedPipeline(f"concepts do not work with {processor}, which layer {name} was given after attach. {advice}")


class _Projection:
    """The hooks on one `to_k` or `to_v`: `columns` of the edit's updates are this layer's."""

    def __init__(self, editor: Editor, layer: torch.nn.Module, kind: str, columns: slice):
        self.editor, self.layer, self.kind, self.columns = editor, layer, kind, columns
        self.module: torch.nn.Module | None = None
        self.handles: list[Any] = []
        self.now: _Part | None = None  # of the UNet's forward that is running
        self.pending: _Part | None = None  # between the two hooks

    def follow(self) -> None:
        """Hook the module that is the layer's projection now: LoRA puts one around it, and must read the edited input too."""
        module = self.layer.to_k if self.kind == "key" else self.layer.to_v
        if module is not self.module:
            self.remove()
            self.module = module
            self.handles = [module.register_forward_pre_hook(self.exchange), module.register_forward_hook(self.update)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        # code that was compiled with the hooks still runs them
        self.handles, self.module, self.now, self.pending = [], None, None, None

    def part_of(self, edit: Edit | None) -> _Part | None:
        if edit is None:
            return None
        key = self.kind == "key"
        updates = edit.key_updates if key else edit.value_updates
        updates = None if updates is None else updates[..., self.columns]
        return _Part(edit.key_encodings if key else edit.value_encodings, edit.rows, updates)

    @torch.compiler.disable
    def look_up(self, encodings: Tensor) -> _Part | None:
        return self.part_of(self.editor.find(encodings)) if self.handles else None

    def exchange(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # Looking up by identity breaks a compiled graph. With gradients there is no other way: a checkpointed layer runs
        # again after its forward has ended.
        compiled = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        self.pending = part = self.now if compiled else self.look_up(args[0])
        return None if part is None else (part.encodings, *args[1:])

    def update(self, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        part, self.pending = self.pending, None
        if part is None or part.updates is None:
            return None
        return output.index_add(0, part.rows.to(output.device), part.updates.to(output))


def _stamp(tensor: Tensor) -> int | Tensor:
    """What a later change in place is noticed by: an inference tensor counts no versions, so a copy."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, stamp: int | Tensor) -> bool:
    return torch.equal(tensor, stamp) if isinstance(stamp, Tensor) else tensor._version == stamp
