"""Inputs for every test and benchmark of the operators, on any device and in any dtype.

Letters: B rows, T tokens, D text width, J places per row, S slots in the bank, H heads, d head width,
N image tokens, O = H * d columns, C = `channels` of an image token. Encodings and targets have an ill-conditioned second moment, as real
ones have. The rows of a batch are mixed: none, all, one, all but one of the J places are used. Whatever
an operator must not read is NaN: slot 0 of every table (to which a careless look-up of -1 leads), bias,
temperature, gates and components at unused places, and, with `views=True`, the memory around each tensor.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import perfusion_kernels
from perfusion_kernels import metric
from perfusion_kernels.reference.concept_gates import concept_gates

from . import cuda_on_host

WIDTHS = (32, 40, 64, 80, 96, 128, 160)  # of heads that are compiled for CUDA
CONDITION = 4e3  # of the second moment of CLIP ViT-L/14's encodings


@dataclass(frozen=True)
class Case:
    covariance: Tensor  # [D, D], float64
    encodings: Tensor  # [B, T, D]
    targets: Tensor  # [S, D]
    metric_targets: Tensor  # [S, D]
    superclasses: Tensor  # [S, D]
    index: Tensor  # [B, J]
    bias: Tensor  # [B, J]
    temperature: Tensor  # [B, J]
    gates: Tensor  # [B, T, J]
    components: Tensor  # [B, T, J]
    query: Tensor  # [B, N, H, d]
    key: Tensor  # [B, T, H, d], the unedited projection
    value: Tensor  # [B, T, H, d]
    key_weight: Tensor  # [O, D]
    value_weight: Tensor  # [O, D]
    key_outputs: Tensor  # [S, O]
    key_targets: Tensor  # [S, O]
    value_outputs: Tensor  # [S, O]
    value_targets: Tensor  # [S, O]
    hidden_states: Tensor  # [B, N, C]
    query_weight: Tensor  # [O, C]
    output_weight: Tensor  # [C, O]
    output_bias: Tensor  # [C]
    residual: Tensor  # [B, N, C]

    def arguments(self, operator: str) -> dict[str, Tensor]:
        """The tensor arguments of an operator by name."""
        edit = ("gates", "components", "index", "key_outputs", "key_targets", "value_outputs", "value_targets")
        if operator in ("edited_projection", "fused_edited_projection"):
            return {
                **self._select("encodings", "gates", "components", "index"),
                "weight": self.value_weight,
                "outputs": self.value_outputs,
                "projected_targets": self.value_targets,
            }
        return self._select(
            *{
                "concept_gates": ("encodings", "targets", "metric_targets", "index", "bias", "temperature"),
                "edited_attention": ("query", "key", "value", *edit),
                "fused_edited_attention": ("query", "encodings", "key_weight", "value_weight", *edit),
                "cross_attention_layer": (
                    *("hidden_states", "query_weight", "key", "value", "output_weight", "output_bias", "residual"),
                ),
            }[operator]
        )

    def _select(self, *names: str) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in names}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "Case":
        return replace(self, **{field.name: function(field.name, getattr(self, field.name)) for field in fields(self)})

    def double(self) -> "Case":
        """The same values, to compute the exact result from."""
        return self.map(lambda name, tensor: tensor.double() if tensor.is_floating_point() else tensor)


PUBLIC = {
    name: getattr(perfusion_kernels, name)
    for name in (
        "concept_gates", "edited_projection", "fused_edited_projection", "edited_attention", "fused_edited_attention",
        "cross_attention_layer",
    )
}


def positional(operator: str, arguments: dict[str, Tensor], scale: float = 0.3) -> tuple:
    """The arguments in the schema's order, for the torch operator itself."""
    overload = overload_of(operator)
    return tuple(scale if argument.name == "scale" else arguments.get(argument.name) for argument in overload._schema.arguments)


def overload_of(operator: str, backend: str = "reference"):
    return getattr(getattr(torch.ops.perfusion_kernels, operator), backend)


def covariance(D: int, condition: float = CONDITION, seed: int = 0) -> Tensor:
    """A second moment [D, D] of the given condition number, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(condition), D, dtype=torch.float64) if D > 1 else torch.ones(1).double()
    return (basis * values) @ basis.T


def make(
    B: int = 4,
    T: int = 13,
    D: int = 19,
    J: int = 2,
    S: int | None = None,
    H: int = 3,
    d: int = 8,
    N: int = 17,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    backend: str = "reference",
    seed: int = 0,
    views: bool = False,
    C: Tensor | None = None,
    channels: int | None = None,
    full: bool = False,
    drawn_on: str = "cpu",
) -> Case:
    """A case. `C` is the second moment, `channels` the C of an image token, by default not O. `dtype` is that of encodings, weights,
    query, key, value and tables; the rest is float32 at least. Where `backend` has compiled kernels, for some dtypes and head widths, the
    default of `dtype` is float16 in place of float32, and `d` becomes the next width that there is.

    For benchmarks: `full` uses every place of every row, each with a concept of its own where S allows it; `drawn_on` is the
    device that draws, where large tensors are drawn faster (and to other values).
    """
    S = J + 3 if S is None else S
    compiled = backend == "cuda"
    d = min((width for width in WIDTHS if width >= d), default=d) if compiled else d
    dtype = dtype or (torch.float16 if compiled else torch.float32)
    generator = torch.Generator(drawn_on).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=drawn_on)

    C = (covariance(D, seed=seed) if C is None else C.double()).to(drawn_on)
    D = C.shape[0]
    factor = torch.linalg.cholesky(C) * (D / C.trace()) ** 0.5  # encodings of unit variance
    C = factor @ factor.T

    targets = normal(S, D) @ factor.T
    encodings = normal(B, T, D) @ factor.T
    index = full_index(B, J, S) if full else mixed_index(B, J, S)
    for row in range(B):  # each concept's word stands somewhere in the prompt
        for place, slot in enumerate(index[row].tolist()):
            if slot >= 0:
                position = (3 * place + row + 1) % T
                encodings[row, position] = targets[slot] + 0.05 * encodings[row, position]

    O = H * d
    key_weight, value_weight = normal(O, D) / D**0.5, normal(O, D) / D**0.5
    superclasses = normal(S, D) @ factor.T
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "covariance": C,
        "encodings": encodings.to(dtype),
        "targets": targets.to(wide),
        "metric_targets": metric.metric_targets(targets, C).to(wide),
        "superclasses": superclasses.to(wide),
        "index": index.to(drawn_on),
        "bias": (0.4 + 0.3 * torch.rand(B, J, generator=generator, device=drawn_on)).to(wide),
        "temperature": (0.1 + 0.1 * torch.rand(B, J, generator=generator, device=drawn_on)).to(wide),
        "query": normal(B, N, H, d).to(dtype),
        "key": (encodings @ key_weight.T).unflatten(-1, (H, d)).to(dtype),
        "value": (encodings @ value_weight.T).unflatten(-1, (H, d)).to(dtype),
        "key_weight": key_weight.to(dtype),
        "value_weight": value_weight.to(dtype),
        "key_outputs": (superclasses @ key_weight.T).to(dtype),
        "key_targets": (targets @ key_weight.T).to(dtype),
        "value_outputs": normal(S, O).to(dtype),
        "value_targets": (targets @ value_weight.T).to(dtype),
    }
    channels = O + 5 if channels is None else channels
    layer = {
        "hidden_states": normal(B, N, channels),
        "query_weight": normal(O, channels) / channels**0.5,
        "output_weight": normal(channels, O) / O**0.5,
        "output_bias": normal(channels),
        "residual": normal(B, N, channels),
    }
    tensors |= {name: tensor.to(dtype) for name, tensor in layer.items()}
    for name, tensor in tensors.items():
        if name.endswith(("targets", "outputs", "superclasses")):
            tensor[0] = float("nan")
    for argument in ("bias", "temperature"):
        tensors[argument][tensors["index"] < 0] = float("nan")
    gates = concept_gates(
        *(tensors[name] for name in ("encodings", "targets", "metric_targets", "index", "bias", "temperature"))
    )
    for argument, values in zip(("gates", "components"), gates):
        tensors[argument] = torch.where((tensors["index"] >= 0)[:, None], values, float("nan"))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    if views:
        tensors = {name: poisoned_view(tensor) for name, tensor in tensors.items()}
    return Case(**tensors)


def mixed_index(B: int, J: int, S: int) -> Tensor:
    """Rows that use none, all, one and all but one of the J places, and never slot 0."""
    index = torch.full((B, J), -1, dtype=torch.int32)
    for row in range(B):
        for place in range(J):
            used = (False, True, place == J - 1, place != 0)[row % 4]
            if used:
                index[row, place] = 1 + (row + place) % (S - 1)
    return index


def full_index(B: int, J: int, S: int) -> Tensor:
    """Rows that use all J places, never slot 0, and all different slots if there are enough."""
    return (1 + torch.arange(B * J, dtype=torch.int32).reshape(B, J) % (S - 1)).int()


def poisoned_view(tensor: Tensor) -> Tensor:
    """The same values as a strided slice of a larger tensor that is NaN elsewhere (for integers: out of range)."""
    poison = float("nan") if tensor.is_floating_point() else 10**6
    larger = torch.full([size + 3 for size in tensor.shape[:-1]] + [2 * tensor.shape[-1] + 5], poison).to(tensor)
    view = larger[(*(slice(2, 2 + size) for size in tensor.shape[:-1]), slice(1, 1 + tensor.shape[-1]))]
    view.copy_(tensor)
    return view


WITHOUT_FLOAT64 = ("cuda", "triton")  # the reference has it
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def takes(operator: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend has the operator in this dtype; gates in every one but float64."""
    half = backend == "cuda" and operator != "concept_gates"
    return dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and not half) or backend not in WITHOUT_FLOAT64


def runs(operator: str | None = None) -> list[tuple[str, str]]:
    """(backend, device) pairs that this machine can test, for an operator or for any; in host memory Triton is interpreted, and compiled
    kernels are those of cuda_on_host.py."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    on_host = ("reference", *["triton"] * (os.environ.get("TRITON_INTERPRET") == "1"), *["cuda"] * cuda_on_host.registered())
    return [
        (status.name, device)
        for device in devices
        for status in perfusion_kernels.available_backends()
        if status.available and operator in (None, *status.operators) and (device == "cuda" or status.name in on_host)
    ]
