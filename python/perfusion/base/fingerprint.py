"""A short signature of the text encoders' weights, by which a concept knows the encoders it was made for."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from perfusion.base.dense import dense_weight, is_quantised
from perfusion.base.parts import denoiser, plain_module, text_encoders
from perfusion.base.text_projection import text_projection
from perfusion.errors import UnsupportedPipeline

if TYPE_CHECKING:
    import torch

__all__ = ["fingerprint_vectors", "fingerprints_match", "text_encoder_fingerprint"]

_NUMBERS = 32  # projections per encoder
_ROWS = 256  # of each matrix; CLIP's first 256 tokens are its bytes, so tokens added later change nothing
_COLUMNS = 256
_MLPS = ("mlp", "DenseReluDense")  # what CLIP and GLM, and T5, call it
_SAME = 0.9  # cosine. Two unrelated encoders: 0 +- 0.18. A change of 20 % of the weights' norm: 0.98.


def _blocks(encoder: torch.nn.Module) -> list[torch.Tensor]:
    """The weights a fingerprint reads: the token embedding and the last layer's MLP, a fixed corner of each, on the CPU."""
    encoder = plain_module(encoder)
    mlps = [module for name, module in encoder.named_modules() if name.rsplit(".", 1)[-1] in _MLPS]
    if not mlps:
        names = " or ".join(map(repr, _MLPS))
        raise UnsupportedPipeline(f"{type(encoder).__name__} has no layer called {names}, by which it would be recognised.")
    return _corners(type(encoder).__name__, [encoder.get_input_embeddings(), *mlps[-1].children()])


def _corners(owner: str, modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    matrices = [each for each in (getattr(module, "base_layer", module) for module in modules) if hasattr(each, "weight")]
    if any(parameter.is_meta for each in matrices for parameter in each.parameters()):
        raise UnsupportedPipeline(
            f"the weights of {owner} are offloaded (on the meta device) and cannot be read. "
            "Describe the pipeline, or attach to it, before enable_sequential_cpu_offload()."
        )
    try:
        return [dense_weight(each, _ROWS, _COLUMNS).cpu().double() for each in matrices]
    except Exception as error:  # of a library that keeps weights in 8 or 4 bits
        kinds = ", ".join(sorted({f"{type(each).__module__}.{type(each).__name__}" for each in matrices if is_quantised(each)}))
        raise UnsupportedPipeline(
            f"the quantised weights of {owner} ({kinds}) cannot be computed with here: {type(error).__name__}: {error}. "
            "Load this text encoder in 8 bits by another library, or unquantised."
        ) from error


def _signs(index: int, count: int) -> np.ndarray:
    """`count` numbers -1 or +1, the same on every machine: bits of SHAKE-256, not of a random generator."""
    stream = hashlib.shake_256(f"perfusion text encoder fingerprint 1:{index}".encode()).digest((count + 7) // 8)
    return np.unpackbits(np.frombuffer(stream, np.uint8), count=count).astype(np.float64) * 2 - 1


def _encoder_numbers(encoder: torch.nn.Module, projection: torch.nn.Module | None = None) -> bytes:
    """32 signed bytes: projections of the weights of an encoder, and of what projects its output, scaled so that the largest is 127."""
    beside = [] if projection is None else _corners(type(projection).__name__, projection.modules())
    blocks = [block.numpy().ravel() for block in (*_blocks(encoder), *beside)]
    # Every matrix has the same say, whatever its scale.
    values = np.concatenate([block / max(np.linalg.norm(block), 1e-30) for block in blocks])
    numbers = np.array([values @ _signs(i, values.size) for i in range(_NUMBERS)])
    return np.rint(numbers * (127 / max(np.abs(numbers).max(), 1e-30))).astype(np.int8).tobytes()


def text_encoder_fingerprint(pipe: Any) -> str:
    """A short signature of the text encoders' weights, to be compared by `fingerprints_match`, never by `==`.

    Per encoder 32 random-sign projections of a fixed corner of the token embedding and of the last layer's MLP, as int8 in
    base64; two encoders are joined by ".". Projections keep angles, so loads of the same weights in other precisions and
    light fine-tunes stay close, and another encoder of the same shape does not. Where the denoiser projects the text, its
    projection counts too, so that two models with one text encoder differ. Raises UnsupportedPipeline when the weights are
    offloaded to the meta device.
    """
    projection = text_projection(denoiser(pipe))
    numbers = [_encoder_numbers(encoder, projection) for _, encoder in text_encoders(pipe)]
    return ".".join(base64.b64encode(each).decode("ascii") for each in numbers)


def fingerprint_vectors(fingerprint: str) -> list[np.ndarray]:
    try:
        parts = [base64.b64decode(part, validate=True) for part in fingerprint.split(".")]
    except (binascii.Error, ValueError):
        parts = []
    if not parts or any(len(part) != _NUMBERS for part in parts):
        raise ValueError(f"not a text encoder fingerprint: {fingerprint[:120]!r}. Expected {_NUMBERS} bytes in base64 per encoder.")
    return [np.frombuffer(part, np.int8).astype(np.float64) for part in parts]


def fingerprints_match(a: str, b: str) -> bool:
    """Whether two fingerprints are of the same encoders, up to precision and light fine-tuning. ValueError on other text."""
    left, right = fingerprint_vectors(a), fingerprint_vectors(b)
    if len(left) != len(right):
        return False
    return all(x @ y >= _SAME * np.linalg.norm(x) * np.linalg.norm(y) and x.any() and y.any() for x, y in zip(left, right))
