"""Rows of a bank's table by slot, and the way back for gradients."""

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if any tensor has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def look_up(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """table[S, X], index[B, J] -> [B, J, X] in `dtype`; zeros for an absent slot, whatever the table holds."""
    rows = table[index.clamp(min=0).long()].to(dtype)
    return torch.where((index >= 0)[..., None], rows, 0)


def look_up_backward(gradient: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """gradient[B, J, X] -> [S, X]: each slot's sum over the rows that use it."""
    gradient = torch.where((index >= 0)[..., None], gradient, 0)
    total = gradient.new_zeros(table.shape)
    return total.index_add(0, index.clamp(min=0).flatten(), gradient.flatten(0, 1)).to(table.dtype)
