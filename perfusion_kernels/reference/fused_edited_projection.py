"""e Wᵀ + Σ_j (g_j o_j - a_j W i*_j) in plain torch, rounded once; its derivatives are those of `edited_projection`."""

from torch import Tensor
from torch.nn import functional

from .look_up import wide
from .rank_one import rank_one_update


def fused_edited_projection(
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
) -> Tensor:
    dtype = wide(encodings)
    base = functional.linear(encodings.to(dtype), weight.to(dtype))
    return rank_one_update(base, gates, components, index, outputs, projected_targets).to(encodings.dtype)
