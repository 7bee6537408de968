"""`edited_projection`: the edited keys or values of every layer from one set of encodings."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from .backend import call, register
from .reference import edited_projection as reference
from .registration import Operator
from .shape_checks import FLOATING, INDEX, WIDE, Arguments, dtypes_beside, once
from .validation import check_values, validate_edit


def edited_projection(
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
    """e Wᵀ + Σ_j (g_j o_j - a_j p_j): a projection, edited by the concepts of each row.

    o_j = outputs[j] is the concept's target output o*_j, p_j = projected_targets[j] is W i*_j, so that the
    result is W (e - Aᵀ a) + Σ_j g_j o*_j. All layers project the same encodings, so their weights
    concatenate to one `weight` and the tables' columns follow the same order. `fused_edited_projection` is the same
    in one launch, without bit equality to the unedited layer.

    Args:
        encodings [B, T, D]: float16, bfloat16, float32 or float64.
        weight [O, D]: of the dtype of encodings.
        gates, components [B, T, J]: from `concept_gates`; float32 or float64; not read where index is -1.
        index [B, J]: int32, the bank slots a row uses, -1 for none. Any J, 0 included.
        outputs, projected_targets [S, O]: any of the four dtypes, both the same.
        validate: whether to check values (index in range, gates and components finite), which waits for
            the device. None: on ordinary host tensors outside torch.compile only, and not again until one is written
            in place as torch counts it, so not through `.data` or numpy.
        backend: "cuda", "triton" or "reference"; None chooses.

    Returns:
        [B, T, O] in the dtype of encodings; under autocast, in autocast's, to which encodings and weight
        are cast. The edit is added in at least float32. A batch row without a concept is bit-equal to
        `torch.nn.functional.linear(encodings, weight)`; on "cuda", which runs only when requested by name, to that
        backend's call in which no row has a concept. Differentiable in every argument but index.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendUnavailable: see `use_backend`.

    Source: arXiv 2305.01644, eq. 3 and 4.
    """
    arguments = (encodings, weight, gates, components, index, outputs, projected_targets)
    check_call("edited_projection", _check, arguments, validate)
    return call("edited_projection", arguments, backend)


def check_call(operator: str, check: Callable[..., None], arguments: tuple[Tensor, ...], validate: bool | None) -> None:
    """Checks shapes by `check`, and values as `validate` says."""
    check(*arguments)
    _, _, gates, components, index, outputs, _ = arguments
    check_values(validate_edit, operator, validate, arguments, (index, gates, components), outputs.shape[0])


def check_projection(
    operator: str,
    encodings: Tensor,
    weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    outputs: Tensor,
    projected_targets: Tensor,
) -> None:
    check = Arguments(operator)
    check("encodings", encodings, "B T D", FLOATING)
    check("weight", weight, "O D", dtypes_beside(encodings), "as encodings")
    check("gates", gates, "B T J", WIDE, "as concept_gates returns them")
    check("components", components, "B T J", (gates.dtype,), "as gates")
    check("index", index, "B J", INDEX)
    check("outputs", outputs, "S O", FLOATING)
    check("projected_targets", projected_targets, "S O", (outputs.dtype,), "as outputs")


_check = once(partial(check_projection, "edited_projection"))


def _fake(encodings, weight, gates, components, index, outputs, projected_targets):
    return encodings.new_empty((encodings.shape[0], encodings.shape[1], weight.shape[0]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return reference.edited_projection_backward(gradient, *ctx.saved_tensors, ctx.needs_input_grad)


OPERATOR = Operator("edited_projection", _fake, _setup_context, _backward, autocast=("encodings", "weight"))
register("reference", OPERATOR, reference.edited_projection)
