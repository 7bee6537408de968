"""A concept's bytes, rounded to the file's type, and refused where rounding would change the concept."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perfusion.concept_file.format import FORMAT, digest, word_name
from perfusion.concept_file.layers import encode_layers
from perfusion.errors import advise
from perfusion.families import family_by_id

if TYPE_CHECKING:
    from perfusion.concept import Concept

__all__ = ["encode"]

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Largest rounding error that a save may make, relative to a tensor's norm: twice what the type's mantissa gives.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
ENERGY_ROUNDING = 0.01  # largest change of i* . C^-1 i* that a save may make, relative; float16 makes about 5e-5


def _tensors(concept: Concept) -> dict[str, Tensor]:
    tensors = concept._single_tensors()
    for i, word in enumerate(concept.word_embeddings):
        tensors[word_name(i)] = word
    return dict(sorted(tensors.items()))


def _metadata(concept: Concept) -> dict[str, str]:
    """All metadata but the digest. Optional keys are left out when empty."""
    base = concept.base
    recipe = json.dumps(concept.recipe, ensure_ascii=False, separators=(",", ":")) if concept.recipe else ""
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family_by_id(base.family).architecture}/perfusion",
        "modelspec.implementation": "diffusers",
        "modelspec.title": concept.name,
        "modelspec.date": concept.created,
        "modelspec.author": concept.author,
        "modelspec.license": concept.license,
        "perfusion.format": FORMAT,
        "perfusion.name": concept.name,
        "perfusion.superclass": concept.superclass,
        "perfusion.family": base.family,
        "perfusion.text_encoder": base.text_encoder,
        "perfusion.layers": encode_layers(base.layers),
        "perfusion.covariance": concept.covariance,
        "perfusion.bias": repr(float(concept.bias)),
        "perfusion.temperature": repr(float(concept.temperature)),
        "perfusion.recipe": recipe,
    }
    return {key: value for key, value in metadata.items() if value}


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    exact = tensor.cpu().double()
    rounded = tensor.cpu().to(dtype)
    error, norm = (rounded.double() - exact).norm().item(), exact.norm().item()
    if not math.isfinite(error) or error > ROUNDING[dtype] * norm:
        largest = exact.abs().max().item()
        raise _in_float32(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}: its largest entry is {largest:.3g}, and rounding would "
            f"change it by {error / max(norm, 1e-300):.2g} of its norm."
        )
    return rounded


def _in_float32(what: str) -> ValueError:
    return advise(
        ValueError(what),
        python="Save with dtype=torch.float32.",
        command="A training with a lower --learning-rate keeps it small; where a checkpoint is converted, --dtype float32 holds it.",
    )


def encode(concept: Concept, dtype: torch.dtype = torch.float16) -> bytes:
    """The concept file's bytes; equal concepts give equal bytes. ValueError when a tensor does not fit `dtype`."""
    if dtype not in DTYPES.values():
        raise ValueError(f"a concept file holds float16, bfloat16 or float32, got {dtype}")
    rounded = {name: _rounded(name, tensor, dtype) for name, tensor in _tensors(concept).items()}
    energy = torch.dot(rounded["target"].double(), rounded["metric_target"].double()).item()
    if abs(energy - concept.energy) > ENERGY_ROUNDING * concept.energy:
        raise _in_float32(
            f"the energy target . metric_target does not survive {str(dtype).removeprefix('torch.')}: "
            f"{concept.energy:.4g} would become {energy:.4g}."
        )
    label = next(label for label, known in DTYPES.items() if known == dtype)
    data = {name: (label, len(tensor), tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in rounded.items()}
    metadata = _metadata(concept)
    metadata["perfusion.digest"] = digest(metadata, data)

    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (label, size, content) in data.items():
        header[name] = {"dtype": label, "shape": [size], "data_offsets": [end, end + len(content)]}
        end += len(content)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, _, content in data.values())
