"""`concept_gates`: how strongly each concept acts at each token, and what of it the token already holds."""

from torch import Tensor

from .arguments import FLOATING, INDEX, WIDE, Arguments, once
from .backend import call, register
from .reference import concept_gates as reference
from .registration import Operator
from .validation import check_values, validate_concepts


def concept_gates(
    encodings: Tensor,
    targets: Tensor,
    metric_targets: Tensor,
    index: Tensor,
    bias: Tensor,
    temperature: Tensor,
    *,
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
        validate: whether to check values (`validate_concepts`), which waits for the device. None: on
            ordinary host tensors outside torch.compile only, and not again until one is written in place as torch
            counts it, so not through `.data` or numpy.
        backend: "cuda", "triton" or "reference"; None chooses.

    Returns:
        gates, components [B, T, J], float64 if encodings or targets are, else float32, under autocast too.
        Both are 0 where index is -1. Differentiable in every argument but index.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendUnavailable: see `use_backend`.

    Unchecked, an index beyond the bank is undefined, and dependent concepts in a row, a zero temperature
    or an empty slot give values that are not finite, in that batch row alone.

    Source: arXiv 2305.01644, eq. 3 (one concept) and eq. 4 (several).
    """
    arguments = (encodings, targets, metric_targets, index, bias, temperature)
    _check(*arguments)
    check_values(_check_concepts, "concept_gates", validate, arguments, arguments)
    return call("concept_gates", arguments, backend)


@once
def _check(
    encodings: Tensor, targets: Tensor, metric_targets: Tensor, index: Tensor, bias: Tensor, temperature: Tensor
) -> None:
    check = Arguments("concept_gates")
    check("encodings", encodings, "B T D", FLOATING)
    check("targets", targets, "S D", WIDE)
    check("metric_targets", metric_targets, "S D", (targets.dtype,), "as targets; half precision cannot hold C⁻¹")
    check("index", index, "B J", INDEX)
    check("bias", bias, "B J", WIDE)
    check("temperature", temperature, "B J", (bias.dtype,), "as bias")


def _check_concepts(operator, encodings, targets, metric_targets, index, bias, temperature):
    values = {"encodings": encodings, "bias": bias, "temperature": temperature}
    validate_concepts(targets, metric_targets, index, **values, operator=operator)


def _fake(encodings, targets, metric_targets, index, bias, temperature):
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
