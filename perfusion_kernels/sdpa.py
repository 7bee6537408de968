"""`edited_attention` on a CPU: the edit in plain torch, then torch's `scaled_dot_product_attention`.

A call that names no backend and has its tensors in host memory runs this, because it is the function that stock pipelines call there.
The result is the reference's up to roundings of the dtype. It is not a backend: a call that will be differentiated, autocast or
vmapped, or that names "reference", runs the operator.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import backend
from .reference.edit import of_keys, of_values, unpacked
from .reference.edited_attention import allowed, edited, of_rows
from .shape_checks import autocasts


def preferred(arguments: tuple, name: str | None) -> bool:
    """Whether a call of `edited_attention` runs here. name: its argument `backend`."""
    query = arguments[0]
    if not query.is_cpu or backend.requested(name) is not None or autocasts(query) or backend.differentiated(arguments):
        return False
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


def edited_attention(query: Tensor, key: Tensor, value: Tensor, *rest) -> Tensor:
    """As `reference.edited_attention`, but that K and V are rounded to the dtype of query once they are edited, as in a kernel."""
    edit, slots, query_regions, key_regions, scale = unpacked(rest)
    key = of_rows(edited(key, *of_keys(edit)).to(query.dtype), slots)
    value = of_rows(edited(value, *of_values(edit)).to(query.dtype), slots)
    mask = allowed(query_regions, key_regions)
    if mask is None:
        return _attend(query, key, value, None, scale)
    alone = ~mask.any(-1)  # fully masked rows attend to everything, to avoid 0 / 0, and are zeroed below
    result = _attend(query, key, value, (mask | alone[..., None])[:, None], scale)
    return result.masked_fill(alone[..., None, None], 0)


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention without slots, edit and regions."""
    return _attend(query, key, value, None, scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    attended = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scale)
    return attended.transpose(1, 2).contiguous()
