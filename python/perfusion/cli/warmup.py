"""`perfusion warmup`: compile and tune the GPU kernels for a model before the first picture is asked for."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from perfusion.cli.checks import check_device
from perfusion.cli.models import MODEL_HELP
from perfusion.cli.strict_json import strict_json

if TYPE_CHECKING:
    import torch

GPUS = ("cuda", "xpu")
NO_GPU = 4  # there is nothing to warm up


def warmup(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "toybox",
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once. Guidance doubles them.")] = 1,
    height: Annotated[Optional[int], typer.Option(min=8, help="Of the pictures; by default the model's own.")] = None,
    width: Annotated[Optional[int], typer.Option(min=8, help="Of the pictures; by default the model's own.")] = None,
    concepts: Annotated[int, typer.Option(min=1, help="Concepts in one prompt.")] = 1,
    training: Annotated[bool, typer.Option("--training", help="Warm up derivatives, too.")] = False,
    device: Annotated[Optional[str], typer.Option(help="cuda, cuda:1, xpu; by default the best there is.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile and tune the GPU kernels for a model, before the first picture is asked for.

    Draws nothing: it runs the model for one step to see the sizes of its layers, tries the tile sizes of every kernel
    at them, and keeps the fastest in the cache, where later programs find them. Without it, the first pictures wait for
    the compiler. Needs a GPU.

    Exit codes: 0 done, 2 bad input, 3 a model that cannot be used, 4 no GPU here.
    """
    import perfusion_kernels
    from perfusion.models import load_pipeline

    device = _checked(device) if device else _best_device()
    if device is None:
        print("error: there is no GPU to compile kernels for; without one, nothing needs to warm up", file=sys.stderr)
        raise typer.Exit(NO_GPU)
    start = time.monotonic()
    shapes = layer_shapes(load_pipeline(model, device=device), batch, height, width)
    tiles = perfusion_kernels.warm_up(**shapes, device=device, concepts=concepts, gradients=training)
    facts = {
        "model": model,
        "device": device,
        "rows": shapes["rows"],
        "layers": len(shapes["layers"]),
        "chosen": tiles,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(strict_json(facts) if json else "\n".join(_lines(facts)))


def _checked(device: str) -> str | None:
    """The device, if it is a GPU that is here; None if its kind is not. ValueError if it is none at all, or has another number."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if kind not in ("cpu", *GPUS):
        raise ValueError(f"--device must be {' or '.join(GPUS)}, which have kernels to compile, got {device}")
    if kind == "cpu" or not _is_there(kind):
        return None
    check_device(device)
    return device


def _best_device() -> str | None:
    return next(filter(_is_there, GPUS), None)


def _is_there(kind: str) -> bool:
    import torch

    return hasattr(torch, kind) and getattr(torch, kind).is_available()


def layer_shapes(pipe: Any, batch: int = 1, height: int | None = None, width: int | None = None) -> dict[str, Any]:
    """Layers, rows, tokens, text width and dtype of the cross-attention in one step of the pipeline, seen as it runs."""
    from perfusion.base import check_supported, cross_attention_layers, denoiser

    check_supported(pipe)
    seen: list[tuple[tuple[int, int, int, int], torch.Tensor]] = []

    def look(layer: Any, args: tuple, kwargs: dict) -> None:
        named = {**dict(zip(("hidden_states", "encoder_hidden_states"), args)), **kwargs}
        _, N, C = named["hidden_states"].shape
        O = getattr(layer.to_q, "base_layer", layer.to_q).out_features
        seen.append(((N, C, layer.heads, O // layer.heads), named["encoder_hidden_states"]))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in cross_attention_layers(denoiser(pipe)).values()]
    try:
        pipe(["a photo"] * batch, height=height, width=width, num_inference_steps=1, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    rows, tokens, text_width = seen[0][1].shape
    layers = [layer for layer, _ in seen]
    return {"layers": layers, "rows": rows, "tokens": tokens, "text_width": text_width, "dtype": seen[0][1].dtype}


def _lines(facts: dict[str, Any]) -> list[str]:
    launches = [(launch, tiles) for found in facts["chosen"].values() for launch, tiles in found.items()]
    return [
        *(f"{launch}: {', '.join(f'{name} {size}' for name, size in tiles.items())}" for launch, tiles in launches),
        f"{len(launches)} launches for {facts['layers']} layers of {facts['model']}, {facts['rows']} rows, on"
        f" {', '.join(facts['chosen']) or facts['device']}; {facts['seconds']} s",
    ]
