"""One step of `perfusion train`, forward, backward and optimiser, against the peers of bench/plain_training.py.

Models: toybox as it is, and a UNet of Stable Diffusion 1.5's shape with random weights at latents of 8 x 8, beside CLIP
ViT-L/14's text encoder, also random; with --quick, the tests' tiny pipeline. The gate: gradients of the first step, of o*_V
and of the word, against the peer's in float64.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import Options, Problem
from bench.plain_training import ExpertSession, PlainSession
from bench.suites.pipelines import SD15
from bench.timing import Candidate
from perfusion.base import describe_base
from perfusion.covariance import Covariance, get_covariance
from perfusion.models import load_pipeline
from perfusion.training.data import Picture
from perfusion.training.session import TrainingSession
from perfusion.training_config import TrainingConfig
from tests.perfusion.learning import SUPERCLASS, covariance_of
from tests.perfusion.tiny import tiny_sd


def toybox() -> tuple[Any, Covariance, int]:
    """The pipeline, its covariance, the side of a picture."""
    pipe = load_pipeline("toybox")
    return pipe, get_covariance(pipe, progress=False), 64


def sd15() -> tuple[Any, Covariance, int]:
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny_sd(width=768, unet=SD15)
    tokenizer = pipe.tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.text_encoder = CLIPTextModel(config).eval().requires_grad_(False)
    return pipe, covariance_of(pipe), 16


def tiny() -> tuple[Any, Covariance, int]:
    pipe = tiny_sd()
    return pipe, covariance_of(pipe), 16


COMPILED = ("toybox",)  # where torch.compile of the UNet is a candidate too, unless --compile none: on a CPU it takes minutes
MODELS: dict[str, Callable[[], tuple[Any, Covariance, int]]] = {"toybox": toybox, "sd15": sd15}
SESSIONS = {"ours": TrainingSession, "ours compile": TrainingSession, "plain": PlainSession, "expert": ExpertSession}


def problems(options: Options) -> Iterator[Problem]:
    models = {"tiny": tiny} if options.quick else {name: make for name, make in MODELS.items() if name in options.models}
    for name, make in models.items():
        for batch in (3,) if options.quick else (16,):
            with contextlib.ExitStack() as stack:
                yield problem(name, make, batch, options, stack)


def problem(name: str, make: Callable[[], tuple[Any, Covariance, int]], batch: int, options: Options, stack: Any) -> Problem:
    pipe, covariance, side = make()
    pipe.set_progress_bar_config(disable=True)
    config = TrainingConfig(superclass=SUPERCLASS, name="mine", batch_size=batch)
    draw = torch.Generator().manual_seed(0)
    pictures = []
    for number in range(5):
        pixels, mask = torch.rand(3, side, side, generator=draw) * 2 - 1, torch.rand(side, side, generator=draw)
        pictures.append(Picture(str(number), pixels, mask, config.instance_prompts, tuple(pixels.shape[-2:])))

    def new(kind: type[TrainingSession], compile: bool = False) -> TrainingSession:
        settings = dataclasses.replace(config, compile=compile)
        return kind(own_modules(pipe), describe_base(pipe), settings, covariance, pictures)

    def gradients(session: TrainingSession) -> tuple[Tensor, ...]:
        """The gradients of the next step, [1, ...] each."""
        session.train_step()
        return tuple(parameter.grad.clone()[None] for parameter in session._trained().values())

    def exact() -> tuple[Tensor, ...]:
        # weights are shared, so they are cast in place and back, without a loss
        cast_all(pipe, torch.float64)
        with new(PlainSession) as session:
            found = tuple(gradient.double() for gradient in gradients(session))
        cast_all(pipe, torch.float32)
        return found

    def plain() -> tuple[Tensor, ...]:
        with new(PlainSession) as session:
            return gradients(session)

    cast_all(pipe, torch.float32)
    pipe.to(options.device)
    candidates = []
    truth = exact(), plain()  # before the sessions, whose learned vectors stay as they are
    for provider, kind in SESSIONS.items():
        compile = provider.endswith("compile")
        if compile and (name not in COMPILED or not options.compile):
            continue
        session = stack.enter_context(new(kind, compile))
        candidates.append(Candidate(provider, session.train_step, check=lambda *_, session=session: gradients(session)))
    layers = describe_base(pipe)
    shapes = dict(R=batch, captions=len(config.instance_prompts), T=77, D=layers.encoding_dim, O=layers.outputs, layers=len(layers.layers))
    index = torch.zeros(1, 1, dtype=torch.int32, device=options.device)
    return Problem(f"{name}, {batch} pictures", shapes, torch.float32, index, lambda: truth[0], lambda: truth[1], candidates)


def own_modules(pipe: Any) -> Any:
    """The pipeline with modules of its own around the same weights, so that hooks on one do not affect another."""
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    shared = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(pipe, shared)


def cast_all(pipe: Any, dtype: torch.dtype) -> None:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
