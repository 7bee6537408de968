"""Keys and values of all cross-attention layers in one product each, for UNets whose layers are nothing but their weights.

All layers read the same encodings, so the weights of every `to_k` stand above one another as one matrix, and those of every
`to_v` as another. The edit of the values (DESIGN.md, H2) is then one `fused_edited_projection` for the whole model, forward
and backward, where hooks on the layers would make as many products and sums as there are layers, and read the encodings of
every row, while here rows that are equal are projected once. Weights are read, which is right only where a layer gives
W e and nothing else happens when it is called: `obstacle` says what does. Such layers are called, one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import perfusion_kernels
from perfusion.base import cross_attention_layers
from perfusion.editor import Projected, Tables, edit_encodings

__all__ = ["Hoist", "obstacle"]


def obstacle(unet: torch.nn.Module) -> str | None:
    """Why the layers of a UNet must be called, or None where reading their weights gives the same.

    LoRA and quantised layers are modules of other kinds, or weights of another kind of tensor; offloading and layer-wise
    casting are hooks, or a `forward` of the module's own.
    """
    first = None
    for name, layer in cross_attention_layers(unet).items():
        for kind in ("to_k", "to_v"):
            module = getattr(layer, kind)
            where = f"{kind} of {name}"
            if type(module) is not torch.nn.Linear:
                return f"{where} is a {type(module).__module__}.{type(module).__name__}"
            if module.bias is not None:
                return f"{where} has a bias"
            if "forward" in vars(module) or any(hooks for key, hooks in vars(module).items() if key.endswith("_hooks")):
                return f"{where} has hooks"
            weight = module.weight
            if type(weight) not in (torch.nn.Parameter, Tensor) or weight.is_meta or not weight.is_floating_point():
                return f"{where} has a weight that cannot be read"
            if weight.requires_grad:
                return f"{where} is trained"
            first = weight if first is None else first
            if (weight.dtype, weight.device) != (first.dtype, first.device):
                return f"{where} is {weight.dtype} on {weight.device}, and others are {first.dtype} on {first.device}"
    return None


class Hoist:
    """The weights [O, D] of all `to_k` and of all `to_v`, as copies: what changes in the UNet later is not seen."""

    def __init__(self, unet: torch.nn.Module):
        reason = obstacle(unet)
        if reason is not None:
            raise ValueError(f"Hoist: every to_k and to_v must be a frozen Linear without bias or hooks, but {reason}.")
        layers = cross_attention_layers(unet).values()
        self.key_weight = torch.cat([layer.to_k.weight.detach() for layer in layers])
        self.value_weight = torch.cat([layer.to_v.weight.detach() for layer in layers])

    def project(
        self, encodings: Tensor, rows: Tensor, tables: Tables, index: Tensor, bias: Tensor, temperature: Tensor, strength: Tensor
    ) -> tuple[Projected, Tensor]:
        """Edited keys and values of a batch whose row r has the encoding number rows[r]; and the gates [n, T, J].

        encodings [n, T, D]: the distinct ones. rows [R] int64. index, bias, temperature, strength [n, J]: as in
        `edit_encodings`. Differentiable in the encodings and the tables' outputs. Under autocast the products follow it, as
        calls of the layers would, and the edit does not.
        """
        edited = edit_encodings(encodings, tables, index, bias, temperature, strength)
        keys, values = edited.keys.to(encodings.dtype), edited.values.to(encodings.dtype)
        if edited.key_gates is None:
            keys = linear(keys, self.key_weight)
        else:
            keys = _project(keys, self.key_weight, edited.key_gates, index, tables.key_outputs)
        values = _project(values, self.value_weight, edited.gates, index, tables.value_outputs)
        return Projected(keys[rows], values[rows]), edited.gates


def _project(encodings: Tensor, weight: Tensor, gates: Tensor, index: Tensor, outputs: Tensor) -> Tensor:
    """e Wᵀ + Σ_j g_j o_j. Edited encodings have no component along a target, so there is none to subtract."""
    nothing = torch.zeros_like(gates)
    return perfusion_kernels.fused_edited_projection(encodings, weight, gates, nothing, index, outputs, outputs.detach())
