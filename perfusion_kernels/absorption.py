"""`absorb_projections`: keys and values that have a layer's `to_q` and `to_out` in them, once per prompt; and where that is faster."""

import torch
from torch import Tensor

from .arguments import FLOATING, Arguments
from .backend import differentiated
from .choices import measured
from .reference.look_up import wide


def absorb_projections(
    query_weight: Tensor, key: Tensor, value: Tensor, output_weight: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """scale · K_h W_Q,h and V_h W_O,hᵀ of every head: what `cross_attention_layer` takes in place of its weights.

    The layer then needs no projection, for T·H / (C + T) of the multiplications when H*d = C. That is worth
    it where the quotient is well below 1 (Stable Diffusion 1.5: 0.45 at C = 1280, 1.55 at C = 320), and
    only if done once per prompt: absorption itself costs as much as projecting T tokens twice.

    Args:
        query_weight [H*d, C], key, value [B, T, H, d], output_weight [C, H*d]: one dtype of float16, bfloat16,
            float32, float64.
        scale: None means d ** -0.5.

    Returns:
        key, value [B, T, H, C] in the dtype of key, rounded once. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Source: DESIGN.md, "Cross-attention layer".
    """
    _check("absorb_projections", query_weight, key, value, output_weight)
    scale = key.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype, heads = wide(key), key.shape[2:]
    absorbed_key = torch.einsum("bthd,hdc->bthc", key.to(dtype) * scale, query_weight.to(dtype).unflatten(0, heads))
    absorbed_value = torch.einsum("bthd,chd->bthc", value.to(dtype), output_weight.to(dtype).unflatten(1, heads))
    return absorbed_key.to(key.dtype), absorbed_value.to(value.dtype)


def absorb_where_faster(
    query_weight: Tensor, key: Tensor, value: Tensor, output_weight: Tensor, *, image_tokens: int, scale: float | None = None
) -> dict[str, Tensor | float | None]:
    """The arguments of `cross_attention_layer` in the form that was measured to be faster at this shape: plain or absorbed.

    Call it once per prompt, and the layer at every step with what it gives: `cross_attention_layer(x, **arguments,
    output_bias=b, residual=r)`. A shape that was not measured on this kind of device stays plain, and so does a call that
    will be differentiated, because absorbed keys and values have no kernel for that. The two forms differ in roundings.

    Args:
        query_weight [H*d, C], key, value [B, T, H, d], output_weight [C, H*d], scale: as for `absorb_projections`.
        image_tokens: N of the hidden states [B, N, C] to come.

    Returns:
        query_weight, key, value, output_weight and scale: as they came, or absorbed, with None for both weights and 1 for
        the scale, which the keys then have in them.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Source: DESIGN.md, "Choices by measurement".
    """
    tensors = {"query_weight": query_weight, "key": key, "value": value, "output_weight": output_weight}
    _check("absorb_where_faster", **tensors)
    scale = key.shape[-1] ** -0.5 if scale is None else float(scale)
    B, T, H, d = key.shape
    sizes = (B, image_tokens, query_weight.shape[1], T, H, d)
    if differentiated(tensors.values()) or measured("cross_attention_layer", key.device, key.dtype, sizes) != "absorbed":
        return {**tensors, "scale": scale}
    key, value = absorb_projections(query_weight, key, value, output_weight, scale=scale)
    return {"query_weight": None, "key": key, "value": value, "output_weight": None, "scale": 1.0}


def _check(operator: str, query_weight: Tensor, key: Tensor, value: Tensor, output_weight: Tensor) -> None:
    check = Arguments(operator)
    check("key", key, "B T H d", FLOATING)
    check("value", value, "B T H d", (key.dtype,), "as key")
    check("query_weight", query_weight, "H*d C", (key.dtype,), "as key")
    check("output_weight", output_weight, "C H*d", (key.dtype,), "as key")
