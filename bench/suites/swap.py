"""How long another subject takes until a step with it can begin, against a step, and against loading a LoRA.

    step                          one step of the stock UNet, two rows: the unit of the others
    perfusion, from memory        unload, load, encode the prompt, keys and values of all layers
    perfusion, from its file      the same, and the file is read and checked
    LoRA, load                    diffusers' unload_lora_weights and load_lora_weights
    LoRA, load and fuse           the same, unfused before and fused after
    LoRA, hot swap                load_lora_weights(hotswap=True) into an adapter of the same rank

A LoRA keeps the prompt's encodings, so encoding it counts for ours alone; the text encoder of toybox is small, and that of the other
models is a small stand-in. Checked: the step after a swap is that of the subject which was swapped in, and not the one before.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.measure import Options
from bench.suites.pipelines import base_of, chosen, common, encoded, opened, step_with, timed, told
from bench.suites.step import own_weights
from bench.suites.train import own_modules
from perfusion.concept import Concept
from perfusion.handle import attach
from tests.perfusion.editing import make_concept


def measured(options: Options) -> Iterator[dict[str, Any]]:
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it says at every load that the LoRA has nothing for the text encoder
    for name, model in chosen(options).items():
        pipe, reason = opened(name, model, options)
        if pipe is None:
            yield from told(common("swap", name, None, options), {}, {"perfusion, from memory": reason}, options)
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield from _rows(name, pipe, model.side, Path(folder), options)


def _rows(name: str, pipe: Any, side: int, folder: Path, options: Options) -> Iterator[dict[str, Any]]:
    base, device = base_of(pipe), options.device
    two = [make_concept(base, "teddy", seed=seed, covariance="0123456789abcdef") for seed in (1, 2)]
    for number, concept in enumerate(two):
        concept.save(folder / f"{number}.safetensors")
        peers.save_lora(pipe, folder / f"lora{number}", seed=number)
    stock = own_modules(pipe)
    step = step_with(stock.unet, *encoded(stock, "a cat", device), side)
    swaps: dict[str, Callable[[], Any]] = {"step": step}
    absent: dict[str, str] = {}
    handles = []
    # a swap, and the step that follows
    for provider, read in (
        ("perfusion, from memory", lambda number: two[number]),
        ("perfusion, from its file", lambda number: Concept.load(folder / f"{number}.safetensors")),
    ):
        own = own_modules(pipe)
        handles.append(attach(own))
        swap = _ours(own, handles[-1], read, side, device)
        if _alternates(swap):
            swaps[provider] = swap
        else:
            absent[provider] = "the step after it is not that of the subject"
    for provider, (weights, change) in {
        "LoRA, load": (own_modules, _load),
        "LoRA, load and fuse": (_with_own_weights, _load_and_fuse),
        "LoRA, hot swap": (own_modules, _hot_swap),
    }.items():
        own = weights(pipe)
        try:
            swap = _lora(own, change, folder, side, device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                right = _alternates(swap)
        except Exception as error:  # a library that is not here, or of another version
            absent[provider] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        if right:
            swaps[provider] = swap
        else:
            absent[provider] = "the step after it is not that of the subject"
    times = timed(swaps, options)
    yield from told(common("swap", name, base, options, R=2, side=side), times, absent, options)
    for handle in handles:
        handle.detach()


def _alternates(swap: Callable[..., Any]) -> bool:
    """Whether swapping back and forth gives two different steps, each the same again."""
    results = [swap(step=True) for _ in range(4)]
    size = 1e-4 * results[0].abs().max()

    def far(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool((a - b).abs().max() > size)

    return far(results[0], results[1]) and not far(results[0], results[2]) and not far(results[1], results[3])


def _ours(own: Any, handle: Any, read: Callable[[int], Concept], side: int, device: torch.device) -> Callable[..., Any]:
    turn = itertools.cycle((0, 1))
    handle.load(read(1))
    engine = handle._engine

    @torch.no_grad()
    def swap(step: bool = False) -> Any:
        handle.unload("teddy")
        handle.load(read(next(turn)))
        encodings, conditions = encoded(own, "a <teddy>", device)
        if step:
            return step_with(own.unet, encodings, conditions, side)()
        return engine.keys_values(encodings)

    return swap


def _lora(own: Any, change: Callable[[Any, Path, bool], None], folder: Path, side: int, device: torch.device) -> Callable[..., Any]:
    turn, first = itertools.cycle((0, 1)), itertools.chain([True], itertools.repeat(False))
    once = step_with(own.unet, *encoded(own, "a cat", device), side)

    @torch.no_grad()
    def swap(step: bool = False) -> Any:
        change(own, folder / f"lora{next(turn)}", next(first))
        return once() if step else None

    return swap


def _load(pipe: Any, folder: Path, first: bool) -> None:
    if not first:
        pipe.unload_lora_weights()
    pipe.load_lora_weights(folder, adapter_name="subject")


def _load_and_fuse(pipe: Any, folder: Path, first: bool) -> None:
    if not first:
        pipe.unfuse_lora()
    _load(pipe, folder, first)
    pipe.fuse_lora()


def _hot_swap(pipe: Any, folder: Path, first: bool) -> None:
    pipe.load_lora_weights(folder, adapter_name="subject", hotswap=not first)


def _with_own_weights(pipe: Any) -> Any:
    own = own_modules(pipe)
    own_weights(own.unet)
    return own
