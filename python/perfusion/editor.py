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
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import perfusion_kernels
from perfusion.base import cross_attention_layers, layer_width

__all__ = ["Edit", "Editor", "Tables", "make_edit"]


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
    scales the whole edit of a concept: 0 leaves the row as it is. key_rows: row -> [T, D], the encodings that give the
    keys of rows under the global lock. Everything is computed in float32 and returned in the encodings' dtype.
    """
    original = encodings[rows]
    gates, components = perfusion_kernels.concept_gates(original, tables.targets, tables.metric_targets, index, bias, temperature)
    slots = index.clamp(min=0).long()
    gates, components = gates * strength[:, None], components * strength[:, None]
    value_rows = original.float() - torch.einsum("rtj,rjd->rtd", components, tables.targets[slots])
    locked, key_updates = gates, None
    if tables.unlocked is not None:
        free = tables.unlocked[slots][:, None] & (index >= 0)[:, None]
        locked = gates * ~free
        key_updates = torch.einsum("rtj,rjo->rto", gates * free, tables.key_outputs[slots])
    key_rows_local = value_rows + torch.einsum("rtj,rjd->rtd", locked, tables.superclasses[slots])
    for place, row in enumerate(rows.tolist()) if key_rows else ():
        if row in key_rows:
            key_rows_local = key_rows_local.index_copy(0, torch.tensor([place], device=rows.device), key_rows[row][None].to(key_rows_local))
    return Edit(
        rows,
        encodings.index_copy(0, rows, key_rows_local.to(encodings.dtype)),
        encodings.index_copy(0, rows, value_rows.to(encodings.dtype)),
        torch.einsum("rtj,rjo->rto", gates, tables.value_outputs[slots]).to(encodings.dtype),
        None if key_updates is None else key_updates.to(encodings.dtype),
        gates,
    )


class Editor:
    """Hooks on one UNet, from `install` to `remove`. `edit_of(encodings)` says what an unseen tensor needs, or None."""

    def __init__(self, unet: torch.nn.Module, edit_of: Callable[[Tensor], Edit | None]):
        self.unet, self.edit_of = unet, edit_of
        self._by_input: Any = WeakTensorKeyDictionary()  # the pipeline's tensor -> (version, Edit or None)
        self._by_edited: Any = WeakTensorKeyDictionary()  # the exchanged input -> Edit
        self._handles: list[Any] = []

    def install(self) -> None:
        end = 0
        for layer in cross_attention_layers(self.unet).values():
            columns = slice(end, end := end + layer_width(layer))
            for kind in ("key", "value"):
                linear = layer.to_k if kind == "key" else layer.to_v
                linear = getattr(linear, "base_layer", linear)
                self._handles.append(linear.register_forward_pre_hook(functools.partial(self._exchange, kind)))
                self._handles.append(linear.register_forward_hook(functools.partial(self._update, kind, columns)))
        self._handles.append(self.unet.register_forward_pre_hook(self._begin, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Compute every edit anew: concepts or their settings have changed."""
        self._by_input.clear()
        self._by_edited.clear()

    def use(self, encodings: Tensor, edit: Edit) -> None:
        """Say what a tensor needs instead of asking `edit_of`; training does."""
        self._by_input[encodings] = (_version(encodings), edit)
        self._by_edited[edit.key_encodings] = edit
        self._by_edited[edit.value_encodings] = edit

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        encodings = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        # an inference tensor counts no versions, so a change in place would go unseen
        if isinstance(encodings, Tensor) and encodings.is_inference() and encodings in self._by_input:
            del self._by_input[encodings]

    @torch.compiler.disable
    def _find(self, encodings: Tensor) -> Edit | None:
        version, edit = self._by_input.get(encodings, (None, None))
        if version is None or version != _version(encodings):
            edit = self.edit_of(encodings)
            self._by_input[encodings] = (_version(encodings), edit)
            if edit is not None:
                self.use(encodings, edit)
        return edit

    def _exchange(self, kind: str, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        edit = self._find(args[0])
        if edit is None:
            return None
        return (edit.key_encodings if kind == "key" else edit.value_encodings, *args[1:])

    def _update(self, kind: str, columns: slice, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        edit = self._by_edited.get(args[0])
        updates = None if edit is None else edit.key_updates if kind == "key" else edit.value_updates
        if updates is None:
            return None
        return output.index_add(0, edit.rows.to(output.device), updates[..., columns].to(output))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
