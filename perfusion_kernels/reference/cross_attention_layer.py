"""A whole cross-attention layer in plain torch: projection, `edited_attention` without an edit, projection, sums."""

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
    attended = edited_attention(_query(hidden_states, query_weight, key), key, value, *NO_EDIT, scale)
    if output_weight is None:
        result = attended.sum(2)
    else:
        result = functional.linear(attended.flatten(2), output_weight).to(dtype)
    for summand in (output_bias, residual):
        result = result if summand is None else result + summand
    return result.to(hidden_states.dtype).contiguous()


def _query(hidden_states: Tensor, query_weight: Tensor | None, key: Tensor) -> Tensor:
    """[B, N, H, d]. Absorbed, every head's query is the hidden state, wide so that the sum over heads is."""
    if query_weight is None:
        return hidden_states[:, :, None].expand(-1, -1, key.shape[2], -1).to(wide(hidden_states))
    return functional.linear(hidden_states, query_weight).unflatten(-1, key.shape[2:])


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
    query = _query(hidden_states, query_weight, key)
    if output_weight is None:
        by_attended = gradient[:, :, None].expand(-1, -1, key.shape[2], -1)
    else:
        by_attended = (gradient @ output_weight).unflatten(-1, key.shape[2:])
    by_query, by_key, by_value, *_ = edited_attention_backward(
        by_attended, query, key, value, *NO_EDIT, scale, (True,) * 3 + (False,) * 11
    )
    by_hidden_states = by_query_weight = by_output_weight = None
    if query_weight is None:
        by_hidden_states = by_query.sum(2).to(hidden_states.dtype)
    else:
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
