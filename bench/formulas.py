"""The operators' formulas in plain torch, for the whole batch at once, every place used: for `eager`, `compile` and `expert`.

The expert knows torch well and writes no kernels: keys and values of all layers by one product, the
edit as one more of rank 2J (DESIGN.md, (11)), attention by the library's kernel, and on a GPU a CUDA graph around it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention


def concept_gates(encodings, targets, metric_targets, index, bias, temperature, *by_word):  # which is not measured
    index, encodings = index.long(), encodings.to(targets.dtype)
    i, m = targets[index], metric_targets[index]  # [B, J, D]
    products = encodings @ m.mT  # [B, T, J]
    similarity = products / (i * m).sum(-1)[:, None]
    gates = torch.sigmoid((similarity - bias[:, None]) / temperature[:, None])
    return gates, torch.linalg.solve(m @ i.mT, products.mT).mT


expert_concept_gates = concept_gates  # nothing in it is to be hoisted


def edited_projection(encodings, weight, gates, components, index, outputs, projected_targets):
    index, base = index.long(), linear(encodings, weight)
    return base + (gates @ outputs[index].to(gates.dtype) - components @ projected_targets[index].to(gates.dtype)).to(base.dtype)


def expert_edited_projection(encodings, weight, gates, components, index, outputs, projected_targets):
    return _plus_rank_one(linear(encodings, weight), gates, components, index, outputs, projected_targets)


def _plus_rank_one(base: Tensor, gates: Tensor, components: Tensor, index: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """K₀ + G B."""
    index = index.long()
    G, B = torch.cat([gates, -components], -1).to(base.dtype), torch.cat([outputs[index], targets[index]], 1).to(base.dtype)
    return torch.baddbmm(base, G, B)


def edited_attention(query, key, value, *edit_and_scale):
    *edit, scale = edit_and_scale  # slots and regions, which may follow the edit, are not measured
    key, value = _edited(key, value, edit)
    scores = torch.softmax(torch.einsum("bnhd,bthd->bhnt", query, key) * scale, -1)
    return torch.einsum("bhnt,bthd->bnhd", scores, value)


def expert_edited_attention(query, key, value, *edit_and_scale):
    *edit, scale = edit_and_scale
    return sdpa(query, *_edited(key, value, edit), scale)


def _edited(key: Tensor, value: Tensor, edit) -> tuple[Tensor, Tensor]:
    if edit[0] is None:
        return key, value
    gates, components, index, *tables = edit[:7]
    pairs = (key, *tables[:2]), (value, *tables[2:])
    return tuple(_plus_rank_one(x.flatten(2), gates, components, index, o, p).unflatten(-1, x.shape[2:]) for x, o, p in pairs)


def fused_edited_attention(query, encodings, key_weight, value_weight, *edit_and_scale):
    return edited_attention(query, *_projected(query, encodings, key_weight, value_weight), *edit_and_scale)


def expert_fused_edited_attention(query, encodings, key_weight, value_weight, *edit_and_scale):
    return expert_edited_attention(query, *_projected(query, encodings, key_weight, value_weight), *edit_and_scale)


def _projected(query: Tensor, encodings: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear(encodings, weight).unflatten(-1, query.shape[2:]) for weight in weights)


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)


def cross_attention_layer(hidden_states, query_weight, key, value, output_weight, output_bias, residual, scale):
    query = linear(hidden_states, query_weight).unflatten(-1, key.shape[2:])
    attended = edited_attention(query, key, value, None, scale)
    return linear(attended.flatten(2), output_weight, output_bias) + residual


def addmm_cross_attention_layer(hidden_states, query_weight, key, value, output_weight, output_bias, residual, scale):
    """The expert's, with the residual as the C of the last product instead of a separate addition."""
    query = linear(hidden_states, query_weight).unflatten(-1, key.shape[2:])
    attended = sdpa(query, key, value, scale).flatten(0, 1).flatten(1)
    return (residual + output_bias).flatten(0, 1).addmm_(attended, output_weight.T).unflatten(0, residual.shape[:2])


def expert_cross_attention_layer(hidden_states, query_weight, key, value, output_weight, output_bias, residual, scale):
    query = linear(hidden_states, query_weight).unflatten(-1, key.shape[2:])
    return linear(sdpa(query, key, value, scale).flatten(2), output_weight, output_bias) + residual
