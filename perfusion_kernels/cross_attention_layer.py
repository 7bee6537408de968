"""`cross_attention_layer`: a whole cross-attention layer whose keys and values stay the same over the denoising steps."""

import torch
from torch import Tensor
from torch.nn import functional

from .backend import call, register, requested
from .edited_attention import edited_attention
from .reference import cross_attention_layer as reference
from .registration import Operator
from .shape_checks import FLOATING, Arguments, autocasts, dtypes_beside, once
from .validation import check_values


def cross_attention_layer(
    hidden_states: Tensor,
    query_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scale: float | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + output_bias + softmax(scale · (x W_Qᵀ) Kᵀ) V W_Oᵀ, with x = hidden_states, per head.

    key and value are those of the prompt, edited already (`edited_projection`). With `query_weight` and
    `output_weight` both None they are absorbed ones, from `absorb_projections`: the heads are then C wide and
    the result is residual + output_bias + Σ_h softmax(scale · x K_hᵀ) V_h.

    Args:
        hidden_states [B, N, C]: float16, bfloat16, float32 or float64; any strides.
        query_weight [H*d, C]: of `to_q`, which has no bias; or None, absorbed.
        key, value [B, T, H, d], absorbed [B, T, H, C]; T >= 1.
        output_weight [C, H*d], output_bias [C]: of `to_out`. output_weight is None exactly if query_weight is.
        residual [B, N, C]: added at the end, or None. All tensors are of the dtype of hidden_states.
        scale: None means d ** -0.5, and 1 for absorbed keys, which contain it.
        validate: whether to check that key and value are finite, which waits for the device. None: on ordinary
            host tensors outside torch.compile only, and not again until one is written in place as torch counts it,
            so not through `.data` or numpy.
        backend: that of `edited_attention`, around which torch makes the products: "cuda", "triton", or None, which chooses.
            "reference" is the formula in plain torch, and what absorbed keys and values run on every device.

    Returns:
        [B, N, C], contiguous, in the dtype of hidden_states; under autocast, in autocast's, to which every
        tensor is cast. Softmax and sums in at least float32. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendUnavailable: see `use_backend`.

    Source: DESIGN.md, "Cross-attention layer".
    """
    tensors = (hidden_states, query_weight, key, value, output_weight, output_bias, residual)
    _check(*tensors)
    check_values(_check_finite, "cross_attention_layer", validate, (hidden_states, key, value), (key, value))
    if scale is None:
        scale = 1.0 if query_weight is None else key.shape[-1] ** -0.5
    arguments = (*tensors, float(scale))
    if query_weight is None or (backend or requested()) == "reference":
        return call("cross_attention_layer", arguments, backend)
    return _around_attention(*arguments, backend)


@once
def _check(
    hidden_states: Tensor,
    query_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    check = Arguments("cross_attention_layer")
    check("hidden_states", hidden_states, "B N C", FLOATING)
    same = (dtypes_beside(hidden_states), "as hidden_states")
    absorbed = query_weight is None and output_weight is None
    heads = "B T H C" if absorbed else "B T H d"
    check("key", key, heads, *same)
    check("value", value, heads, *same)
    if key.shape[1] == 0:
        raise ValueError("cross_attention_layer: key must have at least one position; got T = 0")
    if not absorbed:
        _check_both(query_weight, output_weight)
        check("query_weight", query_weight, "H*d C", *same)
        check("output_weight", output_weight, "C H*d", *same)
    if output_bias is not None:
        check("output_bias", output_bias, "C", *same)
    if residual is not None:
        check("residual", residual, "B N C", *same)


def _check_both(query_weight: Tensor | None, output_weight: Tensor | None) -> None:
    pair = {"query_weight": query_weight, "output_weight": output_weight}
    for name, other in zip(pair, reversed(pair)):
        if pair[name] is None:
            raise ValueError(
                f"cross_attention_layer: {name} must be given with {other}, or both be None for absorbed"
                " keys and values; got None"
            )


def _check_finite(operator: str, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{operator}: {name} must be finite; got another value")


def _fake(hidden_states, *rest):
    return hidden_states.new_empty(hidden_states.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient):
    return reference.cross_attention_layer_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.needs_input_grad)


def _around_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor,
    output_bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    """torch's products around `edited_attention`. Not an operator: autograd differentiates its parts."""
    tensors = (hidden_states, query_weight, key, value, output_weight, output_bias, residual)
    device_type = hidden_states.device.type
    if autocasts(hidden_states):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
        with torch.autocast(device_type, enabled=False):
            return _around_attention(*tensors, scale, backend)
    query = functional.linear(hidden_states, query_weight).unflatten(-1, key.shape[2:])
    attended = edited_attention(query, key, value, scale=scale, validate=False, backend=backend).flatten(2)
    if residual is None:
        return functional.linear(attended, output_weight, output_bias)
    # addmm_ adds residual + bias in the epilogue of the product. The sum takes the place of the copy that torch.addmm makes of its input.
    added = residual.clone() if output_bias is None else residual + output_bias
    added = added.contiguous()
    added.view(-1, added.shape[-1]).addmm_(attended.flatten(0, 1), output_weight.mT)
    return added


OPERATOR = Operator(
    "cross_attention_layer",
    _fake,
    _setup_context,
    _backward,
    autocast=("hidden_states", "query_weight", "key", "value", "output_weight", "output_bias", "residual"),
)
register("reference", OPERATOR, reference.cross_attention_layer)
