"""What `perfusion generate` computes with: torch and diffusers, or onnxruntime and numpy.

Each is a context that gives a `Session`; inside it the concepts can be loaded and set.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from perfusion.cli.checks import check_device
from perfusion.cli.drawing import prepare
from perfusion.cli.models import Precision, add_parts
from perfusion.families import Family, family_by_id

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["RuntimeName", "Session", "onnx_session", "torch_session"]

Source = tuple["str | None", Path]


class RuntimeName(str, enum.Enum):
    torch = "torch"
    onnx = "onnx"


class Session(NamedTuple):
    """family: the model's; handle: loads, sets and checks concepts; concepts: (name, path, Concept) of the files, read; tokens: the
    tokenizer's own words; words: of embeddings that were loaded; draw(prompts, seeds, steps, guidance_scale, negative_prompt, advance):
    one batch of pictures, with a call of `advance` after each step."""

    family: Family
    handle: Any
    concepts: list[tuple[str | None, Path, Any]]
    tokens: Collection[str]
    words: list[str]
    draw: Callable[..., list[Image.Image]]


@contextlib.contextmanager
def torch_session(
    model: str,
    sources: Sequence[Source],
    device: str | None,
    dtype: Precision | None,
    *,
    parts: dict[str, Any],
    embeddings: list[str] | None,
    loras: list[str] | None,
    drawing: dict[str, Any],
) -> Iterator[Session]:
    """parts: keywords of `load_pipeline`; drawing: of `prepare`."""
    import torch

    from perfusion.concept import Concept
    from perfusion.handle import attach
    from perfusion.models import load_pipeline
    from perfusion.text import added_tokens

    concepts = [(name, path, Concept.load(path if path.exists() else path.as_posix())) for name, path in sources]
    check_device(device)
    pipe = load_pipeline(model, device=device, dtype=None if dtype is None else getattr(torch, dtype.value), **parts)
    words = add_parts(pipe, model, embeddings, loras)
    pipe, options = prepare(pipe, **drawing)
    after_step = options.pop("after_step", None)

    def draw(
        prompts: list[str], seeds: list[int], steps: int, guidance_scale: float, negative_prompt: str, advance: Callable[[], None]
    ) -> list[Image.Image]:
        def step_end(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            advance()
            return tensors if after_step is None else after_step(pipe, step, timestep, tensors)

        return pipe(
            prompts,
            negative_prompt=[negative_prompt] * len(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            # on the CPU, so that a seed means the same picture on every device
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=step_end,
            **{name: [value] * len(prompts) if name.endswith("image") else value for name, value in options.items()},
        ).images

    with attach(pipe, capacity=max(1, len(concepts))) as handle:
        yield Session(family_by_id(handle.base.family), handle, concepts, added_tokens(pipe), words, draw)


@contextlib.contextmanager
def onnx_session(model: str, sources: Sequence[Source], unused: dict[str, Any]) -> Iterator[Session]:
    """Neither torch nor diffusers is imported. unused: options that only torch can follow, and their values; ValueError if any is given."""
    from perfusion.runtime import Concept, Request, Runtime

    for option, value in unused.items():
        if value is not None:
            raise ValueError(
                f"{option} is for --runtime torch: an export has its parts, sizes and number format, and onnxruntime its devices."
            )
    concepts = [(name, path, Concept.load(path)) for name, path in sources]
    runtime = Runtime(model)

    def draw(
        prompts: list[str], seeds: list[int], steps: int, guidance_scale: float, negative_prompt: str, advance: Callable[[], None]
    ) -> list[Image.Image]:
        requests = [
            Request(prompt=prompt, negative_prompt=negative_prompt, seed=seed, guidance_scale=guidance_scale)
            for prompt, seed in zip(prompts, seeds)
        ]
        return runtime.generate(requests, steps=steps, progress=lambda step: advance())

    yield Session(family_by_id(runtime.manifest.base.family), runtime, concepts, runtime.text.words, [], draw)
