"""`concept_gates`: the gate of each concept at each token, and the token's components along the concepts' targets."""

from torch import Tensor

from .backend import call, register
from .reference import concept_gates as reference
from .registration import Operator
from .shape_checks import FLOATING, INDEX, WIDE, Arguments, once
from .validation import check_values, validate_concepts, validate_places


def concept_gates(
    encodings: Tensor,
    targets: Tensor,
    metric_targets: Tensor,
    index: Tensor,
    bias: Tensor,
    temperature: Tensor,
    *,
    places: Tensor | None = None,
    floor: Tensor | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates g = sigmoid((c - β) / τ) and components a = (A C⁻¹ Aᵀ)⁻¹ A C⁻¹ e of every token.

    c_j = e·m_j / i*_j·m_j is the similarity of token e to concept j, with i*_j = targets[j] and
    m_j = metric_targets[j] = C⁻¹ i*_j. A holds the i* of the concepts that the batch row uses. No scale of C
    or of a row of metric_targets changes the result.

    Args:
        encodings [B, T, D]: the text encoder's output; float16, bfloat16, float32 or float64.
        targets, metric_targets [S, D]: the bank's i* and i* C⁻¹; float32 or float64, both the same.
        index [B, J]: int32, the bank slots a row uses, -1 for none. Any J, 0 included.
        bias, temperature [B, J]: β and τ per row and place; float32 or float64, both the same; not read
            where index is -1.
        places [B, J] or [B, J, P]: int32, the text positions of a concept's own word (several tokens or
            mentions: P > 1), -1 for none. At its own places a concept's gate is at least its floor; at those of another
            concept of the same row it is 0, unless the place is its own too. None: the published gates everywhere.
        floor [B, J]: the least gate at the own places, in 0 … 1; as bias. None: 0. Both are not read where index is -1.
        validate: whether to check values (`validate_concepts`), which waits for the device. None: on
            ordinary host tensors outside torch.compile only, and not again until one is written in place as torch
            counts it, so not through `.data` or numpy.
        backend: "cuda", "triton" or "reference"; None chooses.

    Returns:
        gates, components [B, T, J], float64 if encodings or targets are, else float32, under autocast too.
        Both are 0 where index is -1. Differentiable in every argument but index and places.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendUnavailable: see `use_backend`.

    Unchecked, an index out of range acts as -1, a place out of range as none, and dependent concepts in a row, a zero temperature
    or an empty slot give values that are not finite, in that batch row alone.

    Source: arXiv 2305.01644, eq. 3 (one concept) and eq. 4 (several); places: DESIGN.md, "Gates by word".
    """
    arguments = (encodings, targets, metric_targets, index, bias, temperature, places, floor)
    _check(*arguments)
    given = tuple(argument for argument in arguments if argument is not None)
    check_values(_check_concepts, "concept_gates", validate, arguments, given)
    if places is not None and places.dim() == 2:
        arguments = (*arguments[:6], places[..., None], floor)
    return call("concept_gates", arguments, backend)


@once
def _check(
    encodings: Tensor,
    targets: Tensor,
    metric_targets: Tensor,
    index: Tensor,
    bias: Tensor,
    temperature: Tensor,
    places: Tensor | None,
    floor: Tensor | None,
) -> None:
    check = Arguments("concept_gates")
    check("encodings", encodings, "B T D", FLOATING)
    check("targets", targets, "S D", WIDE)
    check("metric_targets", metric_targets, "S D", (targets.dtype,), "as targets; half precision cannot hold C⁻¹")
    check("index", index, "B J", INDEX)
    check("bias", bias, "B J", WIDE)
    check("temperature", temperature, "B J", (bias.dtype,), "as bias")
    if places is not None:
        check("places", places, "B J" if getattr(places, "ndim", 3) == 2 else "B J P", INDEX)
    if floor is not None:
        check("floor", floor, "B J", (bias.dtype,), "as bias")
        if places is None:
            raise ValueError("concept_gates: floor must be given with places, at which it holds; got places None")


def _check_concepts(operator, encodings, targets, metric_targets, index, bias, temperature, places=None, floor=None):
    values = {"encodings": encodings, "bias": bias, "temperature": temperature}
    validate_concepts(targets, metric_targets, index, **values, operator=operator)
    if places is not None:
        validate_places(operator, places, floor, index, encodings.shape[1])


def _fake(encodings, targets, metric_targets, index, bias, temperature, places, floor):
    dtype = reference.wide(encodings, targets)
    shape = (encodings.shape[0], encodings.shape[1], index.shape[1])
    return encodings.new_empty(shape, dtype=dtype), encodings.new_empty(shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gates_gradient, components_gradient):
    return reference.concept_gates_backward(
        gates_gradient, components_gradient, *ctx.saved_tensors, ctx.needs_input_grad
    )


OPERATOR = Operator("concept_gates", _fake, _setup_context, _backward)
register("reference", OPERATOR, reference.concept_gates)
