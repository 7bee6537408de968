"""`warm_up`: compiles and tunes the kernels for given shapes before the first call."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .backend import BackendUnavailable, available_backends
from .concept_gates import concept_gates
from .edited_attention import edited_attention
from .edited_projection import edited_projection
from .fused_edited_attention import fused_edited_attention
from .fused_edited_projection import fused_edited_projection

Layer = tuple[int, int, int, int]
Tiles = dict[str, dict[str, dict[str, int]]]


def warm_up(
    layers: Iterable[Layer],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    rows: int = 2,
    tokens: int = 77,
    text_width: int = 768,
    concepts: int = 1,
    gradients: bool = False,
) -> Tiles:
    """Calls every operator that has kernels at the shapes of a model's cross-attention layers, and keeps the fastest tile sizes found.

    Without it a process compiles each kernel in the first call that needs it, and uses default tile sizes that were not
    measured. The choices are kept in the user's cache folder, for later processes too.

    Args:
        layers: (N, C, H, d) of each layer: image tokens, channels, heads, head width. Repeated ones count once.
        device: of the calls to come; a GPU. dtype: float16, bfloat16 or float32.
        rows, tokens, text_width, concepts: B, T, D and J of the calls to come.
        gradients: whether to warm up derivatives as well, for training.

    Returns:
        the choices: kind of device -> launch -> tile sizes, as in the cache file.

    Raises:
        BackendUnavailable: Triton is missing or does not support the device. ValueError: no layer is given.

    Source: docs/kernels-triton.md, "Tile sizes".
    """
    layers = list(layers)
    if not layers:
        raise ValueError("warm_up: layers must name at least one layer; got none")
    _require_triton(torch.device(device))
    from .triton.tuning import tuning  # imported here, because it needs Triton

    with tuning() as chosen:
        for call in _calls(layers, torch.device(device), dtype, rows, tokens, text_width, concepts, gradients):
            with torch.set_grad_enabled(gradients):
                results = call()
            if gradients:
                sum(result.float().sum() for result in results).backward()
    return chosen


def _require_triton(device: torch.device) -> None:
    status = next(status for status in available_backends() if status.name == "triton")
    if not status.available:
        raise BackendUnavailable(f"warm_up: Triton is unavailable, {status.reason}")
    from .triton.device import unsupported

    reason = unsupported(torch.empty(0, device=device))
    if reason is not None:
        raise BackendUnavailable(f"warm_up: {reason}")


def _calls(
    layers: list[Layer],
    device: torch.device,
    dtype: torch.dtype,
    B: int,
    T: int,
    D: int,
    J: int,
    gradients: bool,
) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
    """The calls, one after the other; the arguments of each are freed after it."""

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(gradients)

    wide = torch.float32
    index = torch.arange(J, dtype=torch.int32, device=device).expand(B, J)
    places = {"index": index, "validate": False}
    edit = {"gates": draw(B, T, J, dtype=wide), "components": draw(B, T, J, dtype=wide), **places}
    encodings = draw(B, T, D)
    banks = draw(J, D, dtype=wide), draw(J, D, dtype=wide)
    gate = {"bias": draw(B, J, dtype=wide), "temperature": draw(B, J, dtype=wide), **places}
    yield lambda: concept_gates(encodings, *banks, **gate)

    O = sum(H * d for _, _, H, d in layers)  # all layers are projected at once
    tables = {"weight": draw(O, D), "outputs": draw(J, O), "projected_targets": draw(J, O)}
    yield lambda: (edited_projection(encodings, **tables, **edit),)
    yield lambda: (fused_edited_projection(encodings, **tables, **edit),)

    for N, H, d in dict.fromkeys((N, H, d) for N, _, H, d in layers):
        O = H * d
        query, key, value = draw(B, N, H, d), draw(B, T, H, d), draw(B, T, H, d)
        names = ("key_outputs", "key_targets", "value_outputs", "value_targets")
        tables = {name: draw(J, O) for name in names}
        weights = draw(O, D), draw(O, D)
        yield lambda: (edited_attention(query, key, value),)
        yield lambda: (edited_attention(query, key, value, **edit, **tables),)
        yield lambda: (fused_edited_attention(query, encodings, *weights, **edit, **tables),)
