"""`fused_edited_projection`: `edited_projection` with product and edit in one launch and one rounding."""

from functools import partial

from torch import Tensor

from .backend import call, register
from .edited_projection import OPERATOR as SEPARATE
from .edited_projection import check_call, check_projection
from .reference import fused_edited_projection as reference
from .registration import Operator
from .shape_checks import once


def fused_edited_projection(
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
    *,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """e Wᵀ + Σ_j (g_j o_j - a_j p_j), summed in at least float32 and rounded once.

    `edited_projection` guarantees rows without a concept the bits of the unedited layer, so it calls the library's product
    and edits the results in a second pass. This operator gives no such guarantee. It serves training, and callers that
    compute the keys and values of all rows with it.

    Args: those of `edited_projection`.

    Returns:
        [B, T, O] in the dtype of encodings; under autocast, in autocast's, to which encodings and weight are cast.
        A batch row without a concept has the value of the call in which no row has one, bit for bit on one backend.
        Differentiable in every argument but index.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendUnavailable: see `use_backend`.

    Source: arXiv 2305.01644, eq. 3 and 4.
    """
    arguments = (encodings, weight, gates, components, index, outputs, projected_targets)
    check_call("fused_edited_projection", _check, arguments, validate)
    return call("fused_edited_projection", arguments, backend)


_check = once(partial(check_projection, "fused_edited_projection"))

OPERATOR = Operator(
    "fused_edited_projection", SEPARATE.fake, SEPARATE.setup_context, SEPARATE.backward, autocast=SEPARATE.autocast
)
register("reference", OPERATOR, reference.fused_edited_projection)
