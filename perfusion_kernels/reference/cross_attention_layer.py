"""A whole cross-attention layer in plain torch: projection, `edited_attention` without an edit, projection, sums."""

import torch
from torch import Tensor
from torch.nn import functional

from .edited_attention import edited_attention, edited_attention_backward
from .look_up import wide

NO_EDIT = (None,) * 10
"""Of `edited_attention`: no edit, no slots, no regions."""


def cross_attention_layer(
    hidden_states: Tensor,
    query_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    dtype = wide(hidden_states, key, value)
    if query_weight is None:
        result = torch.einsum("bhnt,bthc->bnc", _absorbed_weights(hidden_states, key, scale), value.to(dtype))
    else:
        query = functional.linear(hidden_states, query_weight).unflatten(-1, key.shape[2:])
        attended = edited_attention(query, key, value, *NO_EDIT, scale)
        result = functional.linear(attended.flatten(2), output_weight).to(dtype)
    for summand in (output_bias, residual):
        result = result if summand is None else result + summand
    return result.to(hidden_states.dtype).contiguous()


def _absorbed_weights(hidden_states: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(scale x K_hᵀ) [B, H, N, T]: every head's query is the hidden state."""
    dtype = wide(hidden_states, key)
    return torch.softmax(torch.einsum("bnc,bthc->bhnt", hidden_states.to(dtype) * scale, key.to(dtype)), -1)


def cross_attention_layer_backward(
    gradient: Tensor,
    hidden_states: Tensor,
    query_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """One gradient per argument of `cross_attention_layer`, None where `needs` is False."""
    by_query_weight = by_output_weight = None
    if query_weight is None:
        weights = _absorbed_weights(hidden_states, key, scale)
        dtype = weights.dtype
        wide_gradient, x, k, v = (each.to(dtype) for each in (gradient, hidden_states, key, value))
        by_weights = torch.einsum("bnc,bthc->bhnt", wide_gradient, v)
        by_scores = weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True)) * scale
        by_hidden_states = torch.einsum("bhnt,bthc->bnc", by_scores, k).to(hidden_states.dtype)
        by_key = torch.einsum("bhnt,bnc->bthc", by_scores, x).to(key.dtype)
        by_value = torch.einsum("bhnt,bnc->bthc", weights, wide_gradient).to(value.dtype)
    else:
        query = functional.linear(hidden_states, query_weight).unflatten(-1, key.shape[2:])
        by_attended = (gradient @ output_weight).unflatten(-1, key.shape[2:])
        by_query, by_key, by_value, *_ = edited_attention_backward(
            by_attended, query, key, value, *NO_EDIT, scale, (True,) * 3 + (False,) * 11
        )
        by_hidden_states = by_query.flatten(2) @ query_weight
    if needs[1]:
        by_query_weight = by_query.flatten(2).flatten(0, 1).mT @ hidden_states.flatten(0, 1)
    if needs[4]:
        attended = edited_attention(query, key, value, *NO_EDIT, scale)
        by_output_weight = gradient.flatten(0, 1).mT @ attended.flatten(2).flatten(0, 1)
    return (
        by_hidden_states if needs[0] else None,
        by_query_weight,
        by_key if needs[2] else None,
        by_value if needs[3] else None,
        by_output_weight,
        gradient.sum((0, 1)) if needs[5] else None,
        gradient if needs[6] else None,
        None,
    )
