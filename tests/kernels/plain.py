"""The operators as a reader of the paper would write them, row by row, in the dtype that comes in.

Independent of the package, and the yardstick of `tolerance`. Absent places are skipped, not masked.
"""

import torch
from torch import Tensor


def used(index: Tensor, row: int) -> list[tuple[int, int]]:
    """(place, slot) of the concepts of a batch row."""
    return [(place, slot) for place, slot in enumerate(index[row].tolist()) if slot >= 0]


def concept_gates(encodings, targets, metric_targets, index, bias, temperature, words=None, floor=None):
    (B, T, _), J = encodings.shape, index.shape[1]
    gates, components = torch.zeros(B, T, J).to(targets), torch.zeros(B, T, J).to(targets)
    for b in range(B):
        places, slots = [list(x) for x in zip(*used(index, b))] or ([], [])
        if not places:
            continue
        A, M, e = targets[slots], metric_targets[slots], encodings[b].to(targets.dtype)
        c = e @ M.T / (A * M).sum(-1)
        gates[b][:, places] = torch.sigmoid((c - bias[b, places]) / temperature[b, places])
        components[b][:, places] = torch.linalg.solve(M @ A.T, M @ e.T).T
        if words is not None:
            at = {j: {t for t in words[b, j].flatten().tolist() if t >= 0} for j in places}
            for j in places:
                for t in set().union(*at.values()):
                    least = 0 if floor is None else floor[b, j]
                    gates[b, t, j] = gates[b, t, j].clamp(min=least) if t in at[j] else 0
    return gates, components


def edited_projection(encodings, weight, gates, components, index, outputs, projected_targets):
    result = encodings @ weight.T
    for b in range(result.shape[0]):
        for place, slot in used(index, b):
            result[b] += torch.outer(gates[b, :, place], outputs[slot]).to(result.dtype)
            result[b] -= torch.outer(components[b, :, place], projected_targets[slot]).to(result.dtype)
    return result


fused_edited_projection = edited_projection


def edited_attention(
    query, key, value, gates, components, index, key_outputs, key_targets, value_outputs, value_targets, *rest
):
    slots, query_regions, key_regions, scale = rest

    def edit(base, outputs, targets):
        flat = base.flatten(2)
        one = torch.eye(flat.shape[-1]).to(flat)
        return edited_projection(flat, one, gates, components, index, outputs, targets).unflatten(-1, base.shape[2:])

    key, value = edit(key, key_outputs, key_targets), edit(value, value_outputs, value_targets)
    result = torch.empty_like(query)
    for b in range(query.shape[0]):
        seen = [] if query_regions is None else regions(query_regions[b].tolist(), key_regions[b].tolist())
        for h in range(query.shape[2]):
            row = b if slots is None else slots[b]
            scores = query[b, :, h] @ key[row, :, h].T * scale
            if query_regions is None:
                result[b, :, h] = torch.softmax(scores, -1) @ value[row, :, h]
                continue
            for n, positions in enumerate(seen):
                result[b, n, h] = torch.softmax(scores[n, positions], -1) @ value[row, positions, h] if positions else 0
    return result


def regions(queries: list[int], keys: list[int]) -> list[list[int]]:
    """The positions that each image token attends to."""
    return [[t for t, key in enumerate(keys) if key == 0 or key & query] for query in queries]


def fused_edited_attention(query, encodings, key_weight, value_weight, *edit_and_scale):
    *edit, scale = edit_and_scale
    key, value = ((encodings @ weight.T).unflatten(-1, query.shape[2:]) for weight in (key_weight, value_weight))
    return edited_attention(query, key, value, *edit, None, None, None, scale)


def cross_attention_layer(hidden_states, query_weight, key, value, output_weight, output_bias, residual, scale):
    query = (hidden_states @ query_weight.T).unflatten(-1, key.shape[2:])
    result = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            scores = query[b, :, h] @ key[b, :, h].T * scale
            result[b, :, h] = torch.softmax(scores, -1) @ value[b, :, h]
    return result.flatten(2) @ output_weight.T + output_bias + residual
