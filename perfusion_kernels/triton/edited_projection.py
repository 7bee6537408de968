"""e Wᵀ + Σ_j (g_j o_j - a_j p_j): the library's product, and the edit of the rows that have a concept in place of them.

The product is the library's because rows without a concept are promised its bits, which only it can give,
and because it reads the weights once, which is most of what there is to do: the edit reads and writes the results once
more, T rows beside the D rows of as many columns that are weights. Precision of float32 products (TF32 or not) is torch's
setting, as for every other linear layer.
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
    """The gradients that are needed: two library products, and the edit's sums in one pass over `gradient`."""
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
