"""The superclass encoding s, which none of the checkpoints holds.

With the key lock o*_K = W_K s, so s is the least-squares solution over all layers' W_K, exact when the checkpoint was
trained on this UNet; the residual tells whether it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perfusion.base import cross_attention_layers
from perfusion.base.dense import dense_weight
from perfusion.convert.checkpoint import ConversionError

__all__ = ["LOCKED", "fit", "projection_weights", "superclass_encoding"]

LOCKED = 0.02  # relative residual below which keys count as W_K s; another precision of the UNet makes about 0.0005


def projection_weights(pipe: Any, projection: str) -> list[Tensor]:
    """W of every layer, [d_l, D] each, as they lie in the pipeline."""
    linears = [getattr(layer, projection) for layer in cross_attention_layers(pipe.unet).values()]
    if any(parameter.is_meta for linear in linears for parameter in linear.parameters()):
        raise ConversionError("the UNet's weights are offloaded and cannot be read. Convert before offloading.")
    return [dense_weight(linear) for linear in linears]


def fit(weights: list[Tensor], outputs: Tensor) -> tuple[Tensor, float]:
    """x [D] that minimises |W x - o| over all layers' W [O, D], and the relative residual |W x - o| / |o|."""
    width, normal, right, start = weights[0].shape[1], 0, 0, 0
    for weight in weights:
        matrix = weight.cpu().double()
        part = outputs[start : start + len(matrix)]
        normal, right, start = normal + matrix.T @ matrix, right + matrix.T @ part, start + len(matrix)
    x = torch.linalg.pinv(normal, rtol=1e-12 * width, hermitian=True) @ right
    residual = torch.cat([weight.cpu().double() @ x for weight in weights]) - outputs
    return x, (residual.norm() / outputs.norm().clamp_min(1e-300)).item()


def superclass_encoding(pipe: Any, keys: Tensor, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """s with W_K s = keys, and None; or the fit, and the keys themselves where they are not locked."""
    s, residual = fit(projection_weights(pipe, "to_k"), keys)
    if residual <= LOCKED:
        notes.append(f"s comes from the locked keys o*_K = W_K s; relative residual {residual:.1e}.")
        return s, None
    notes.append(
        f"The keys are not W_K s on this UNet (relative residual {residual:.2f}): trained without the key lock, or on another "
        "UNet. They are kept as they are, and the file is twice as large."
    )
    return s, keys
