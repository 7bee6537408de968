"""e Wᵀ + Σ_j (g_j o_j - a_j W i*_j) in plain torch."""

from torch import Tensor
from torch.nn import functional

from .rank_one import rank_one_backward, rank_one_update


def edited_projection(
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
) -> Tensor:
    base = functional.linear(encodings, weight)
    return rank_one_update(base, gates, components, index, outputs, projected_targets).to(base.dtype)


def edited_projection_backward(
    gradient: Tensor,
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """One gradient per argument of `edited_projection`, None where `needs` is False."""
    return (
        gradient @ weight if needs[0] else None,
        gradient.flatten(0, 1).mT @ encodings.flatten(0, 1) if needs[1] else None,
        *rank_one_backward(gradient, gates, components, index, outputs, projected_targets, needs[2:]),
    )
