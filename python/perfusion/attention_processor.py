"""The fast path's attention processor: `to_q` and `to_out` as modules, and between them the operators on keys and values in slots."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.nn import Dropout

import perfusion_kernels

__all__ = ["AttentionState", "ConceptAttnProcessor"]

# what the layers do in a forward of the UNet
STOCK = "stock"  # the pipeline's own attention; the hooks on to_k and to_v edit it where there is an edit
SLOTS = "slots"  # attention to edited keys and values of a prompt
SCHEDULE = "schedule"  # attention to unedited ones, with an edit of this step as they are loaded
FUSED = "fused"  # projection of this step's encodings, edit and attention in one call


@dataclasses.dataclass(eq=False)
class AttentionState:
    """What all layers read; the engine writes it before each forward. Lists have one entry per layer.

    form: one of the four above. keys, values: [P, T, H, d]. slots [R] int32, or None where row r reads row r.
    gates, components [P, T, J], index [P, J] and the tables [S, H d]: of the forms that edit. query_regions: number of image
    tokens -> [R, N], and key_regions [R, T]: bit sets, or None.
    """

    form: str = STOCK
    keys: list[Tensor] = dataclasses.field(default_factory=list)
    values: list[Tensor] = dataclasses.field(default_factory=list)
    slots: Tensor | None = None
    gates: Tensor | None = None
    components: Tensor | None = None
    index: Tensor | None = None
    key_outputs: list[Tensor] = dataclasses.field(default_factory=list)
    key_targets: list[Tensor] = dataclasses.field(default_factory=list)
    value_outputs: list[Tensor] = dataclasses.field(default_factory=list)
    value_targets: list[Tensor] = dataclasses.field(default_factory=list)
    query_regions: dict[int, Tensor] | None = None
    key_regions: Tensor | None = None


class ConceptAttnProcessor:
    """Of one cross-attention layer. `stock` is the processor that it stands for, whose bits it has where there is no concept."""

    def __init__(self, stock: Any = None, state: AttentionState | None = None, layer: int = 0):
        self.stock, self.state, self.layer = stock, state or AttentionState(), layer
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.tables: tuple[Tensor, ...] = ()

    def follow(self) -> None:
        """Take this layer's part of the state, before a forward. Compiled code then has no layer's number in it: one graph for all."""
        state, layer = self.state, self.layer
        if state.form in (SLOTS, SCHEDULE):
            self.key, self.value = state.keys[layer], state.values[layer]
        if state.form in (SCHEDULE, FUSED):
            tables = state.key_outputs, state.key_targets, state.value_outputs, state.value_targets
            self.tables = tuple(each[layer] for each in tables)

    @property
    def __class__(self) -> type:
        """What the processor stands for: diffusers' `set_default_attn_processor` asks, and refuses classes that it does not know."""
        return ConceptAttnProcessor if self.stock is None else type(self.stock)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        state = self.state
        if state.form == STOCK:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # [R, N, H, d]
        if state.form == FUSED:
            result = perfusion_kernels.fused_edited_attention(
                query,
                encoder_hidden_states.to(query.dtype),
                attn.to_k.weight.to(query.dtype),
                attn.to_v.weight.to(query.dtype),
                state.gates,
                state.components,
                state.index,
                *self.tables,
            )
        elif state.form == SLOTS and state.slots is None and state.query_regions is None:
            result = perfusion_kernels.edited_attention(query, self.key, self.value)
        else:
            edit = {}
            if state.form == SCHEDULE:
                names = ("key_outputs", "key_targets", "value_outputs", "value_targets")
                edit = dict(gates=state.gates, components=state.components, index=state.index, **dict(zip(names, self.tables)))
            if state.query_regions is not None:
                edit |= dict(query_regions=state.query_regions[query.shape[1]], key_regions=state.key_regions)
            result = perfusion_kernels.edited_attention(query, self.key, self.value, slots=state.slots, **edit)
        project, dropout = attn.to_out
        hidden_states = project(result.flatten(2))
        return hidden_states if type(dropout) is Dropout and not dropout.training else dropout(hidden_states)
