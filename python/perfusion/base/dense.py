"""Weights of layers that may be quantised, read by calling the layer, whatever library keeps them and in however many bits."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["dense_weight", "embedding_rows", "is_quantised", "quantised_layers", "transposes", "weight_bytes"]


def is_quantised(module: Any) -> bool:
    """Whether a layer's weight is anything but numbers that can be read: packed, integers, or a tensor of a class of its own."""
    import torch

    weight = getattr(module, "weight", None)
    return weight is not None and not (type(weight) in (torch.nn.Parameter, torch.Tensor) and weight.is_floating_point())


def quantised_layers(model: Any) -> dict[str, Any]:
    """name -> layer of every quantised layer of a model that is a matrix."""
    return {name: each for name, each in model.named_modules() if hasattr(each, "in_features") and is_quantised(each)}


def dense_weight(module: Any, rows: int | None = None, columns: int | None = None) -> torch.Tensor:
    """The matrix [out, in] of a linear layer, the table [n, width] of an embedding, or their corner [rows, columns], without LoRA.

    A quantised layer is called with unit vectors, forth and back, which takes its bias away. Other layers are read.
    """
    import torch

    module = getattr(module, "base_layer", module)
    if not is_quantised(module):
        return module.weight.detach()[:rows, :columns]
    if isinstance(module, torch.nn.Embedding):
        return embedding_rows(module, list(range(module.num_embeddings)[:rows]))[:, :columns]
    with torch.no_grad():
        units = torch.eye(module.in_features, **_like(module))[:columns]
        return _odd(module, units).T[:rows]


def embedding_rows(embedding: Any, ids: list[int]) -> torch.Tensor:
    """The vectors [n, width] of some tokens, as the text encoder reads them before it."""
    import torch

    device = next((tensor.device for tensor in (*embedding.parameters(), *embedding.buffers())), None)
    with torch.no_grad():
        return embedding(torch.tensor(ids, dtype=torch.int64, device=device))


def transposes(module: Any) -> bool:
    """Whether the gradient of a linear layer W is its transpose: along x it is to be |W x|². Some quantised layers have none."""
    import torch

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what is found out here
        x = torch.randn(1, module.in_features, generator=torch.Generator().manual_seed(0)).to(**_like(module)).requires_grad_()
        there = _odd(module, x.detach()).detach()
        y = _called(module, x)
        (gradient,) = torch.autograd.grad((y * there).sum(), x, allow_unused=True) if y.requires_grad else (None,)
    if gradient is None:
        return False
    return bool(abs((gradient * x).sum().double() / there.double().square().sum() - 1) < 0.1)


def _odd(module: Any, x: torch.Tensor) -> torch.Tensor:
    """W x without the bias of W x + b."""
    return (_called(module, x).float() - _called(module, -x).float()) / 2


def _called(module: Any, x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, on the number format
        return type(module).forward(module, x)  # not its hooks, and not LoRA's


def _like(module: Any) -> dict[str, Any]:
    """Device and dtype of what a quantised layer is given: its bias's, or those of the tensors that it looks like."""
    import torch

    weight = module.weight if isinstance(module.weight, torch.Tensor) else None
    bias = module.bias if isinstance(getattr(module, "bias", None), torch.Tensor) else None
    device = next((each.device for each in (weight, bias) if each is not None), torch.device("cpu"))
    dtype = next((each.dtype for each in (bias, weight) if each is not None and each.is_floating_point()), torch.float32)
    return {"device": device, "dtype": dtype}


def weight_bytes(model: Any) -> int:
    """Memory that the weights of a model take, quantised ones as they are kept."""
    return sum(_kept(parameter) for parameter in model.parameters())


def _kept(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_kept(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
