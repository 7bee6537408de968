"""The edit x + Σ_j (g_j o_j - a_j t_j) and its derivatives, shared by the operators."""

import torch
from torch import Tensor

from .look_up import in_range, look_up, look_up_backward, wide


def rank_one_update(
    base: Tensor, gates: Tensor, components: Tensor, index: Tensor, outputs: Tensor, targets: Tensor
) -> Tensor:
    """base[B, T, O], edited in at least float32. Batch rows without a concept keep the bits of base."""
    dtype = wide(base, gates, outputs)
    present = in_range(index, outputs.shape[0])
    coefficients = _coefficients(gates, components, present, dtype)
    basis = torch.cat([look_up(outputs, index, dtype), look_up(targets, index, dtype)], 1)  # [B, 2J, O]
    edited = torch.baddbmm(base.to(dtype), coefficients, basis)
    return torch.where(present.any(-1)[:, None, None], edited, base.to(dtype))


def _coefficients(gates: Tensor, components: Tensor, present: Tensor, dtype: torch.dtype) -> Tensor:
    """[g | -a] [B, T, 2J], zeros where absent; present [B, J]."""
    present = present[:, None]
    return torch.cat([torch.where(present, gates.to(dtype), 0), torch.where(present, -components.to(dtype), 0)], -1)


def rank_one_backward(
    gradient: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    targets: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """One gradient per argument from gates on, None where `needs` is False. That of base is `gradient` itself."""
    dtype = wide(gradient, gates, outputs)
    gradient = gradient.to(dtype)
    present = in_range(index, outputs.shape[0])[:, None]
    by_gates = by_components = by_outputs = by_targets = None
    if needs[0]:
        by_gates = (gradient @ look_up(outputs, index, dtype).mT).to(gates.dtype)
    if needs[1]:
        by_components = -(gradient @ look_up(targets, index, dtype).mT).to(components.dtype)
    if needs[3]:
        used = torch.where(present, gates.to(dtype), 0)
        by_outputs = look_up_backward(used.mT @ gradient, outputs, index)
    if needs[4]:
        used = torch.where(present, components.to(dtype), 0)
        by_targets = look_up_backward(-used.mT @ gradient, targets, index)
    return by_gates, by_components, None, by_outputs, by_targets
