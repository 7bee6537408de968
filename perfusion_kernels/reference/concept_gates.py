"""Gates and components in plain torch.

With m_j the metric target of concept j, the similarity c_j(e) = e·m_j / i*_j·m_j is 1 at e = i*_j. The
gate is sigmoid((c_j(e) - β_j) / τ_j). The components a(e), by which e - Σ_k a_k i*_k has similarity 0
to every concept of the row, solve R a = c(e) with R_jk = c_j(i*_k). This is (A C⁻¹ Aᵀ) a = A C⁻¹ e with each
row divided by its energy, so no scale of a row of metric_targets matters.

Gates by word: with `places`, the positions of each concept's own words, the gate of concept j there is at least floor_j; at the
words of another concept of the row it is 0. Components stay as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .look_up import in_range, look_up, look_up_backward, wide


class _Projection(NamedTuple):
    present: Tensor  # [B, J]
    targets: Tensor  # [B, J, D]
    metric_targets: Tensor  # [B, J, D]
    energies: Tensor  # [B, J], 1 where absent
    similarities: Tensor  # [B, J, T], 0 where absent
    system: Tensor  # R [B, J, J], identity where absent


def concept_gates(
    encodings: Tensor,
    targets: Tensor,
    metric_targets: Tensor,
    index: Tensor,
    bias: Tensor,
    temperature: Tensor,
    places: Tensor | None = None,
    floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    projection = _project(encodings, targets, metric_targets, index)
    gates = torch.sigmoid(_logits(projection, bias, temperature))
    gates = torch.where(projection.present[..., None], gates, 0)
    gates = by_word(gates, projection.present, places, floor)
    components = _solve(projection.system, projection.similarities)
    components = torch.where(projection.present[..., None], components, 0)
    return gates.mT.contiguous(), components.mT.contiguous()


def by_word(gates: Tensor, present: Tensor, places: Tensor | None, floor: Tensor | None) -> Tensor:
    """gates [B, J, T], where there are places at least the floor at a concept's own words, and 0 at those of others."""
    if places is None:
        return gates
    own, other = words(places, present, gates.shape[2])
    least = 0 if floor is None else torch.where(present, floor.to(gates.dtype), 0)[..., None]
    return torch.where(own, gates.clamp(min=least), torch.where(other, 0, gates))


def words(places: Tensor, present: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Masks of a concept's own words, and of those of other concepts of its row, both [B, J, T].

    places [B, J, P]: positions, -1 for none; present [B, J]: the places of absent concepts are not read.
    """
    own = (places[..., None] == torch.arange(T, device=places.device)).any(2) & present[..., None]
    other = (own.sum(1, keepdim=True) - own.int()) > 0
    return own, other


def _project(encodings: Tensor, targets: Tensor, metric_targets: Tensor, index: Tensor) -> _Projection:
    dtype = wide(encodings, targets)
    present = in_range(index, targets.shape[0])
    i = look_up(targets, index, dtype)
    m = look_up(metric_targets, index, dtype)
    energies = torch.where(present, (i * m).sum(-1), 1)
    similarities = _products(m, encodings.to(dtype)) / energies[..., None]
    system = _products(m, i) / energies[..., None] + torch.diag_embed((~present).to(dtype))
    return _Projection(present, i, m, energies, similarities, system)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """x[B, J, D] · y[B, T, D] -> [B, J, T].

    A sum, not a matrix product: torch may run those in TF32, which is too coarse for the large
    cancellations inside C⁻¹.
    """
    return (x[:, :, None] * y[:, None]).sum(-1)


def _logits(projection: _Projection, bias: Tensor, temperature: Tensor) -> Tensor:
    """(c - β) / τ [B, J, T]; finite where absent, whatever bias and temperature hold there."""
    c = projection.similarities
    bias = torch.where(projection.present, bias.to(c.dtype), 0)
    temperature = torch.where(projection.present, temperature.to(c.dtype), 1)
    return (c - bias[..., None]) / temperature[..., None]


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """system[B, J, J]⁻¹ right[B, J, T], by elimination.

    No pivoting: the system is a positive definite matrix with its rows rescaled, for which elimination in
    the given order is stable. So there is no data-dependent branch, no library call and no synchronisation.
    """
    size = system.shape[-1]
    identity = torch.eye(size, dtype=system.dtype, device=system.device)
    rows = torch.cat([system, right], -1)
    for j in range(size):
        pivot_row = rows[:, j : j + 1] / rows[:, j : j + 1, j : j + 1]
        rows = rows - (rows[:, :, j : j + 1] - identity[:, j : j + 1]) * pivot_row
    return rows[..., size:]


def concept_gates_backward(gates_gradient: Tensor, components_gradient: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    """One gradient per argument of `concept_gates`, None where `needs` is False."""
    encodings, targets, metric_targets, index, bias, temperature, places, floor, needs = arguments
    projection = _project(encodings, targets, metric_targets, index)
    present, i, m, energies, c, system = projection
    dtype = c.dtype
    logits = _logits(projection, bias, temperature)
    gates = torch.sigmoid(logits)
    components = _solve(system, c)

    by_gates, by_floor = gates_gradient.mT.to(dtype), None
    if places is not None:
        own, other = words(places, present, encodings.shape[1])
        least = 0 if floor is None else torch.where(present, floor.to(dtype), 0)[..., None]
        lifted = own & (gates < least)
        if needs[7]:
            by_floor = torch.where(lifted, by_gates, 0).sum(-1).to(floor.dtype)
        by_gates = torch.where(lifted | (other & ~own), 0, by_gates)

    # gates: d logits = dg g (1 - g); logits = (c - β) / τ
    by_logits = torch.where(present[..., None], by_gates * gates * (1 - gates), 0)
    by_scaled = by_logits / torch.where(present, temperature.to(dtype), 1)[..., None]

    # components: R a = c, so dc = R⁻ᵀ da and dR = -dc aᵀ
    by_components = torch.where(present[..., None], components_gradient.mT.to(dtype), 0)
    by_right = _solve(system.mT, by_components)
    by_system = -by_right @ components.mT
    by_similarities = by_scaled + by_right

    # c = M e / ε and R = M Aᵀ / ε
    by_energies = -((by_similarities * c).sum(-1) + (by_system * system).sum(-1)) / energies
    by_products = by_similarities / energies[..., None]
    by_gram = by_system / energies[..., None]
    encodings_gradient = targets_gradient = metric_targets_gradient = None
    if needs[0]:
        encodings_gradient = (by_products.mT @ m).to(encodings.dtype)
    if needs[1]:
        rows = by_gram.mT @ m + by_energies[..., None] * m
        targets_gradient = look_up_backward(rows, targets, index)
    if needs[2]:
        rows = by_products @ encodings.to(dtype) + by_gram @ i + by_energies[..., None] * i
        metric_targets_gradient = look_up_backward(rows, metric_targets, index)
    return (
        encodings_gradient,
        targets_gradient,
        metric_targets_gradient,
        None,
        -by_scaled.sum(-1).to(bias.dtype) if needs[4] else None,
        -(by_scaled * logits).sum(-1).to(temperature.dtype) if needs[5] else None,
        None,
        by_floor,
    )
