"""softmax(q K̃ᵀ · scale) Ṽ in plain torch, K̃ and Ṽ being K and V or their edits, row b of a batch reading row slots[b]."""

import torch
from torch import Tensor

from .edit import of_keys, of_values, unpacked
from .look_up import look_up, look_up_backward, wide
from .rank_one import rank_one_backward, rank_one_update


def edited_attention(query: Tensor, key: Tensor, value: Tensor, *rest) -> Tensor:
    """rest: the edit, slots, regions and scale, as the schema has them."""
    edit, slots, query_regions, key_regions, scale = unpacked(rest)
    key, value = of_rows(edited(key, *of_keys(edit)), slots), of_rows(edited(value, *of_values(edit)), slots)
    weights, value = _weights(query, key, scale, allowed(query_regions, key_regions)), value.to(wide(query, key, value))
    return torch.einsum("bhnt,bthd->bnhd", weights.to(value.dtype), value).to(query.dtype).contiguous()


def of_rows(base: Tensor, slots: Tensor | None) -> Tensor:
    """base[P, T, H, d] -> [B, T, H, d], row b being base[slots[b]]; zeros, whose attention is 0, for a slot out of range."""
    return base if slots is None else look_up(base, slots, base.dtype)


def allowed(query_regions: Tensor | None, key_regions: Tensor | None) -> Tensor | None:
    """Whether image token n may attend to text position t [B, N, T], by bit sets [B, N] and [B, T]; None: everywhere."""
    if query_regions is None:
        return None
    keys = key_regions[:, None]
    return (keys == 0) | ((query_regions[..., None] & keys) != 0)


def edited(
    base: Tensor,
    gates: Tensor | None,
    components: Tensor | None,
    index: Tensor | None,
    outputs: Tensor | None,
    targets: Tensor | None,
) -> Tensor:
    """base[B, T, H, d] with the edit of its H*d columns, if there is one."""
    if outputs is None:
        return base
    update = rank_one_update(base.flatten(2), gates, components, index, outputs, targets)
    return update.unflatten(2, base.shape[2:])


def _weights(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """softmax over the positions that are allowed, of all T [B, H, N, T], in at least float32; 0 at the others."""
    dtype = wide(query, key)
    scores = torch.einsum("bnhd,bthd->bhnt", query.to(dtype) * scale, key.to(dtype))
    if allowed is None:
        return torch.softmax(scores, -1)
    forbidden = ~allowed[:, None]  # a finite score avoids 0 / 0 for a fully masked token
    weights = torch.softmax(scores.masked_fill(forbidden, torch.finfo(dtype).min), -1)
    return weights.masked_fill(forbidden, 0)


def edited_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest) -> tuple[Tensor | None, ...]:
    """One gradient per argument of `edited_attention`, None where there is none; the first three always."""
    edit, slots, query_regions, key_regions, scale, needs = unpacked(rest)
    edited_key, edited_value = of_rows(edited(key, *of_keys(edit)), slots), of_rows(edited(value, *of_values(edit)), slots)
    dtype = wide(query, edited_key, edited_value)
    gradient, q, k, v = (x.to(dtype) for x in (gradient, query, edited_key, edited_value))
    weights = _weights(q, k, scale, allowed(query_regions, key_regions))
    by_weights = torch.einsum("bnhd,bthd->bhnt", gradient, v)
    by_scores = weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True)) * scale
    by_query = torch.einsum("bhnt,bthd->bnhd", by_scores, k)
    by_key = torch.einsum("bhnt,bnhd->bthd", by_scores, q)
    by_value = torch.einsum("bhnt,bnhd->bthd", weights, gradient)
    if slots is not None:
        by_key, by_value = (look_up_backward(x, k.new_empty(key.shape), slots) for x in (by_key, by_value))

    by_key_edit = by_value_edit = (None,) * 5
    shared = needs[3:6]
    if edit.key_outputs is not None:
        by_key_edit = rank_one_backward(by_key.flatten(2), *of_keys(edit), (*shared, *needs[6:8]))
    if edit.value_outputs is not None:
        by_value_edit = rank_one_backward(by_value.flatten(2), *of_values(edit), (*shared, *needs[8:10]))
    return (
        by_query.to(query.dtype),
        by_key.to(key.dtype),
        by_value.to(value.dtype),
        _sum(by_key_edit[0], by_value_edit[0]),
        _sum(by_key_edit[1], by_value_edit[1]),
        None,
        *by_key_edit[3:],
        *by_value_edit[3:],
        None,
        None,
        None,
        None,
    )


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if y is None else y if x is None else x + y
