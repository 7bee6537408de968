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
from perfusion.edit import EditedText, RowSettings, Tables, edit_encodings
from perfusion.projection_hooks import KeysValues, Projection

__all__ = ["BatchedProjection", "layer_obstacle", "obstacle"]


def obstacle(unet: torch.nn.Module, *, frozen: bool = True) -> str | None:
    """Why the layers of a UNet must be called, or None where reading their weights gives the same.

    LoRA and quantised layers are modules of other kinds, or weights of another kind of tensor; offloading and layer-wise
    casting are hooks, or a `forward` of the module's own. frozen: whether weights that want gradients must be called, too.
    """
    first = None
    for name, layer in cross_attention_layers(unet).items():
        first = layer if first is None else first
        if (reason := layer_obstacle(name, layer, first, frozen=frozen)) is not None:
            return reason
    return None


def layer_obstacle(name: str, layer: torch.nn.Module, first: torch.nn.Module, *, frozen: bool = True) -> str | None:
    """The same of one layer, beside the first one, of whose number format all must be."""
    for kind in ("to_k", "to_v"):
        module, like = getattr(layer, kind), getattr(first.to_k, "weight", None)
        where = f"{kind} of {name}"
        if type(module) is not torch.nn.Linear:
            return f"{where} is a {type(module).__module__}.{type(module).__name__}"
        if "forward" in vars(module) or _hooked(module):
            return f"{where} has hooks"
        weight = module.weight
        if type(weight) not in (torch.nn.Parameter, Tensor) or weight.is_meta or not weight.is_floating_point():
            return f"{where} has a weight that cannot be read"
        if frozen and weight.requires_grad:
            return f"{where} is trained"
        if like is not None and (weight.dtype, weight.device) != (like.dtype, like.device):
            return f"{where} is {weight.dtype} on {weight.device}, and others are {like.dtype} on {like.device}"
    return None


def _hooked(module: torch.nn.Module) -> bool:
    """Whether anything but our own hooks is called with a module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for kind in kinds for hook in vars(module).get(kind, {}).values()]
    return any(not isinstance(getattr(hook, "__self__", None), Projection) for hook in hooks)


class BatchedProjection:
    """The weights [O, D] of all `to_k` and of all `to_v`, as copies: what changes in the UNet later is not seen."""

    def __init__(self, unet: torch.nn.Module, *, frozen: bool = True):
        reason = obstacle(unet, frozen=frozen)
        if reason is not None:
            raise ValueError(f"BatchedProjection: every to_k and to_v must be a frozen Linear without hooks, but {reason}.")
        layers = cross_attention_layers(unet).values()
        self.key_weight = torch.cat([layer.to_k.weight.detach() for layer in layers])
        self.value_weight = torch.cat([layer.to_v.weight.detach() for layer in layers])
        self.key_bias = _bias([layer.to_k for layer in layers])
        self.value_bias = _bias([layer.to_v for layer in layers])

    @property
    def biased(self) -> bool:
        return self.key_bias is not None or self.value_bias is not None

    def project(self, encodings: Tensor, rows: Tensor, tables: Tables, settings: RowSettings) -> tuple[KeysValues, Tensor]:
        """Edited keys and values of a batch whose row r has the encoding number rows[r]; and the gates [n, T, J].

        encodings [n, T, D]: the distinct ones, with their settings. rows [R] int64. Differentiable in the encodings and the
        tables' outputs. Under autocast the products follow it, as calls of the layers would, and the edit does not.
        """
        edited = edit_encodings(encodings, tables, settings)
        keys, values = self.keys_values(edited, encodings.dtype, tables, settings.index)
        return KeysValues(keys[rows], values[rows]), edited.gates

    def keys_values(self, edited: EditedText, dtype: torch.dtype, tables: Tables, index: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [n, T, O] of all layers, of edited encodings [n, T, D]: two products, the edit as their epilogue."""
        keys, values = edited.keys.to(dtype), edited.values.to(dtype)
        if edited.key_gates is None:
            keys = linear(keys, self.key_weight, self.key_bias)
        else:
            keys = _plus(_project(keys, self.key_weight, edited.key_gates, index, tables.key_outputs), self.key_bias)
        return keys, _plus(_project(values, self.value_weight, edited.gates, index, tables.value_outputs), self.value_bias)

    def plain(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """K of encodings [n, T, D] and V of others, without an edit: [n, T, O] each."""
        return linear(keys, self.key_weight, self.key_bias), linear(values, self.value_weight, self.value_bias)


def _bias(projections: list[torch.nn.Linear]) -> Tensor | None:
    """The biases [O] side by side, 0 where a layer has none; None where no layer has one."""
    if all(each.bias is None for each in projections):
        return None
    return torch.cat([each.weight.new_zeros(each.out_features) if each.bias is None else each.bias.detach() for each in projections])


def _plus(outputs: Tensor, bias: Tensor | None) -> Tensor:
    return outputs if bias is None else outputs + bias.to(outputs.dtype)


def _project(encodings: Tensor, weight: Tensor, gates: Tensor, index: Tensor, outputs: Tensor) -> Tensor:
    """e Wᵀ + Σ_j g_j o_j. Edited encodings have no component along a target, so there is none to subtract."""
    nothing = torch.zeros_like(gates)
    return perfusion_kernels.fused_edited_projection(encodings, weight, gates, nothing, index, outputs, outputs.detach())
