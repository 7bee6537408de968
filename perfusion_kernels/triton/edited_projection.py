"""e Wᵀ + Σ_j (g_j o_j - a_j p_j): the library's product, then the edit in place, of the rows that have a concept.

The library's product is called because rows without a concept are guaranteed its bits. The second pass reads and writes the
results once more, which is little beside the weights: T rows against D rows of the same number of columns. float32 products
use TF32 or not by torch's setting, as in every other linear layer.
"""

from torch import Tensor
from torch.nn import functional

from .device import unsupported as unsupported
from .rank_one import add_rank_one, rank_one_backward


def edited_projection(
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
) -> Tensor:
    result = functional.linear(encodings, weight).contiguous()
    add_rank_one(result, gates, components, index, outputs, projected_targets)
    return result


def edited_projection_backward(
    gradient: Tensor,
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """The needed gradients, in order: two library products, and the edit's sums in one pass over `gradient`."""
    found = []
    if needs[0]:
        found.append(gradient @ weight)
    if needs[1]:
        found.append(gradient.flatten(0, 1).mT @ encodings.flatten(0, 1))
    if any(needs[2:]):
        edit = rank_one_backward(gradient, gates, components, index, outputs, projected_targets, tuple(needs[2:]))
        found += [x for x in edit if x is not None]
    return found


unsupported_backward = unsupported
