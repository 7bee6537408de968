"""Gathers rows of a bank's table by slot, and scatter-adds their gradients."""

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if any tensor has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def in_range(index: Tensor, size: int) -> Tensor:
    """Where `index` names one of `size` rows. The others are absent: -1, and whatever else is out of range."""
    return (index >= 0) & (index < size)


def look_up(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """table[S, ...], index[...] -> [..., ...] in `dtype`; zeros where the index is out of range, whatever the table holds."""
    present = in_range(index, table.shape[0])
    if table.shape[0] == 0:
        return table.new_zeros((*index.shape, *table.shape[1:]), dtype=dtype)
    rows = table[torch.where(present, index, 0).long()].to(dtype)
    return torch.where(present.view(*index.shape, *[1] * (table.dim() - 1)), rows, 0)


def look_up_backward(gradient: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """gradient[..., X], index[...] -> [S, X]: each slot's sum over the places that use it."""
    total = gradient.new_zeros(table.shape)
    if table.shape[0] == 0:
        return total.to(table.dtype)
    present = in_range(index, table.shape[0])
    gradient = torch.where(present.view(*index.shape, *[1] * (table.dim() - 1)), gradient, 0)
    return total.index_add(0, torch.where(present, index, 0).flatten(), gradient.flatten(0, index.dim() - 1)).to(table.dtype)
