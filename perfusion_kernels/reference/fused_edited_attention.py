"""Attention to the edited projections of the encodings, in plain torch: two projections, then `edited_attention`."""

from torch import Tensor
from torch.nn import functional

from .edited_attention import edited_attention, edited_attention_backward

ALL_TO_ALL = (None,) * 3
"""No slots and no regions: row b reads row b, and every image token all positions."""


def fused_edited_attention(query: Tensor, encodings: Tensor, key_weight: Tensor, value_weight: Tensor, *rest) -> Tensor:
    """rest: the edit and the scale, as the schema has them."""
    *edit, scale = rest
    key, value = _project(query, encodings, key_weight, value_weight)
    return edited_attention(query, key, value, *edit, *ALL_TO_ALL, scale)


def _project(query: Tensor, encodings: Tensor, key_weight: Tensor, value_weight: Tensor) -> tuple[Tensor, Tensor]:
    heads = query.shape[2:]
    key = functional.linear(encodings, key_weight).unflatten(-1, heads)
    value = functional.linear(encodings, value_weight).unflatten(-1, heads)
    return key, value


def fused_edited_attention_backward(
    gradient: Tensor, query: Tensor, encodings: Tensor, key_weight: Tensor, value_weight: Tensor, *rest
) -> tuple[Tensor | None, ...]:
    """One gradient per argument of `fused_edited_attention`, None where `needs` is False."""
    *edit, scale, needs = rest
    key, value = _project(query, encodings, key_weight, value_weight)
    by_query, by_key, by_value, *by_edit = edited_attention_backward(
        gradient, query, key, value, *edit, *ALL_TO_ALL, scale, (True, True, True, *needs[4:11], False, False, False, False)
    )
    by_key, by_value = by_key.flatten(2), by_value.flatten(2)
    tokens = encodings.flatten(0, 1)
    return (
        by_query,
        by_key @ key_weight + by_value @ value_weight if needs[1] else None,
        by_key.flatten(0, 1).mT @ tokens if needs[2] else None,
        by_value.flatten(0, 1).mT @ tokens if needs[3] else None,
        *by_edit[:7],
        None,
    )
