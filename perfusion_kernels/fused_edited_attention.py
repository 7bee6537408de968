"""`fused_edited_attention`: projection, edit and attention in one call, for encodings that change at every step."""

from torch import Tensor

from .backend import call, register
from .reference import fused_edited_attention as reference
from .registration import Operator
from .shape_checks import FLOATING, INDEX, WIDE, Arguments, dtypes_beside, once
from .validation import check_values, validate_edit


def fused_edited_attention(
    query: Tensor,
    encodings: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    gates: Tensor,
    components: Tensor,
    index: Tensor,
    key_outputs: Tensor,
    key_targets: Tensor,
    value_outputs: Tensor,
    value_targets: Tensor,
    *,
    scale: float | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """`edited_attention` with K = e W_Kᵀ and V = e W_Vᵀ, projected and edited on the fly: K and V are never written to memory.

    If the encodings stay the same over the denoising steps, `edited_projection` once and plain
    `edited_attention` per step are less work.

    Args:
        query [B, N, H, d], encodings [B, T, D], key_weight, value_weight [H*d, D]: one dtype of float16,
            bfloat16, float32, float64; T >= 1.
        gates, components [B, T, J]: from `concept_gates`; float32 or float64; not read where index is -1.
        index [B, J]: int32, the bank slots a row uses, -1 for none. Any J, 0 included.
        key_outputs, key_targets, value_outputs, value_targets [S, H*d]: o* and W i* of this layer; any of
            the four dtypes, all the same.
        scale: None means d ** -0.5.
        validate: whether to check values (index in range, gates and components finite), which waits for
            the device. None: on ordinary host tensors outside torch.compile only, and not again until one is written
            in place as torch counts it, so not through `.data` or numpy.
        backend: "cuda", "triton" or "reference"; None chooses.

    Returns:
        [B, N, H, d], contiguous, in the dtype of query; under autocast, in autocast's, to which query,
        encodings and weights are cast. A batch row without a concept has the value of the unedited
        call, bit for bit on one backend. Differentiable in every tensor but index.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendUnavailable: see `use_backend`.

    Source: arXiv 2305.01644, eq. 3 and 4.
    """
    edit = (gates, components, index, key_outputs, key_targets, value_outputs, value_targets)
    tensors = (query, encodings, key_weight, value_weight, *edit)
    _check(*tensors)
    read = (index, gates, components)
    check_values(validate_edit, "fused_edited_attention", validate, tensors, read, key_outputs.shape[0])
    arguments = (*tensors, query.shape[-1] ** -0.5 if scale is None else float(scale))
    return call("fused_edited_attention", arguments, backend)


@once
def _check(query: Tensor, encodings: Tensor, key_weight: Tensor, value_weight: Tensor, *edit: Tensor) -> None:
    gates, components, index, key_outputs, key_targets, value_outputs, value_targets = edit
    check = Arguments("fused_edited_attention")
    check("query", query, "B N H d", FLOATING)
    check("encodings", encodings, "B T D", dtypes_beside(query), "as query")
    check("key_weight", key_weight, "H*d D", dtypes_beside(query), "as query")
    check("value_weight", value_weight, "H*d D", dtypes_beside(query), "as query")
    if encodings.shape[1] == 0:
        raise ValueError("fused_edited_attention: encodings must have at least one position; got T = 0")
    check("gates", gates, "B T J", WIDE, "as concept_gates returns them")
    check("components", components, "B T J", (gates.dtype,), "as gates")
    check("index", index, "B J", INDEX)
    check("key_outputs", key_outputs, "S H*d", FLOATING)
    check("key_targets", key_targets, "S H*d", (key_outputs.dtype,), "as key_outputs")
    check("value_outputs", value_outputs, "S H*d", (key_outputs.dtype,), "as key_outputs")
    check("value_targets", value_targets, "S H*d", (key_outputs.dtype,), "as key_outputs")


def _fake(query, encodings, *weights_and_edit):
    return query.new_empty(query.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient):
    return reference.fused_edited_attention_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.needs_input_grad)


OPERATOR = Operator(
    "fused_edited_attention",
    _fake,
    _setup_context,
    _backward,
    autocast=("query", "encodings", "key_weight", "value_weight"),
)
register("reference", OPERATOR, reference.fused_edited_attention)
