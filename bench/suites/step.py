"""One step of the UNet with a concept in it, against the stock pipeline's without one and against other ways to have one.

Two rows, as guidance makes them: no words, and a prompt with one concept. Models: toybox as it is, and UNets of Stable
Diffusion 1.5's and XL's shapes with random weights at small latents; with --quick the tests' tiny pipeline.

    stock                the pipeline without a concept: what a step costs anyway
    attached             the same with perfusion attached and a concept loaded that the prompt does not name
    perfusion            a concept in the prompt, keys and values in slots
    perfusion, hooks     the same by the compatibility path (exact=True)
    expert, gated edit, perfusion-pytorch, LoRA, LoRA fused          see bench/peers.py
    ... compiled         after torch.compile of the whole UNet, of toybox and with --quick alone: it takes minutes elsewhere

All in the dtype of --dtype, float32 on a CPU. Checked: attached is bit-equal to the stock step. The edited row of perfusion, hooks, expert,
gated edit and perfusion-pytorch is the same up to rounding; a fused LoRA agrees with the unfused one. The row of
perfusion names the operators of ours that ran, with their backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import peers
from bench.measure import Options
from bench.suites.pipelines import TURN, base_of, chosen, common, encoded, opened, step_of, step_with, timed, told, tried
from bench.suites.train import own_modules
from perfusion.handle import attach
from tests.perfusion.editing import make_concept

COMPILED = ("toybox", "tiny")
PROMPT, PLAIN = "a <teddy>", "a cat"
EDITED = ("perfusion", "perfusion, hooks", "perfusion compiled", "expert", "gated edit", "perfusion-pytorch")


def measured(options: Options) -> Iterator[dict[str, Any]]:
    for name, model in chosen(options).items():
        pipe, reason = opened(name, model, options, options.dtype)
        if pipe is None:
            yield from told(common("step", f"{name}, 2 rows", None, options, options.dtype), {}, {"perfusion": reason}, options)
        else:
            yield from _rows(name, pipe, model.side, options)


def _rows(name: str, pipe: Any, side: int, options: Options) -> Iterator[dict[str, Any]]:
    base, device = base_of(pipe), options.device
    concept = make_concept(base, "teddy").to(device)
    steps: dict[str, Callable[[], Tensor]] = {}
    absent: dict[str, str] = {}
    handles = []

    def ours(prompt: str, *, exact: bool = False, compiled: bool = False) -> Callable[[], Tensor]:
        own = own_modules(pipe)  # the same weights, and hooks of its own
        handles.append(attach(own, exact=exact))
        handles[-1].load(concept)
        if compiled:
            own.unet = _compiled(own.unet)
        return step_of(own, prompt, side, device)

    def stock(*, compiled: bool = False) -> Callable[[], Tensor]:
        own = own_modules(pipe)
        return step_with(_compiled(own.unet) if compiled else own.unet, *encoded(own, PLAIN, device), side)

    def peer(change: Callable[[Any], Any]) -> Callable[[], Tensor]:
        return step_with(change(own_modules(pipe).unet), encodings, conditions, side)

    steps["stock"] = stock()
    steps["attached"] = ours(PLAIN)
    steps["perfusion"] = ours(PROMPT)
    encodings, conditions = encoded(handles[-1].pipe, PROMPT, device)
    encodings = encodings.clone()  # for the others: nobody takes these for ours
    steps["perfusion, hooks"] = ours(PROMPT, exact=True)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "expert": lambda: peer(lambda unet: peers.with_expert(unet, concept, encodings)),
        "gated edit": lambda: peer(lambda unet: peers.with_gated_edit(unet, concept)),
        "perfusion-pytorch": lambda: peer(lambda unet: peers.with_perfusion_pytorch(unet, concept, encodings.shape[1])),
        "LoRA": lambda: peer(peers.with_lora),
        "LoRA fused": lambda: step_with(peers.with_lora(own_weights(own_modules(pipe).unet), fused=True), encodings, conditions, side),
        "stock compiled": lambda: stock(compiled=True),
        "perfusion compiled": lambda: ours(PROMPT, compiled=True),
    }
    for provider, make in makers.items():
        if provider.endswith("compiled") and (name not in COMPILED or not options.compile):
            absent[provider] = "left out by --compile none" if name in COMPILED else "compiling takes minutes: measured on toybox alone"
            continue
        try:
            steps[provider] = make()
        except Exception as error:  # a library that is not here, or does not take this
            absent[provider] = f"{type(error).__name__}: {error}"
    results = tried(steps, absent)
    absent |= {provider: "its step is not the one that it should be" for provider in _wrong(results)}
    used = {"perfusion": {"operators": operators(steps["perfusion"])}}
    times = timed({provider: steps[provider] for provider in results if provider not in absent}, options, turn=TURN)
    yield from told(common("step", f"{name}, 2 rows", base, options, options.dtype, R=2, side=side), times, absent, options, used)
    for handle in handles:
        handle.detach()


def _wrong(results: dict[str, Tensor]) -> list[str]:
    """Whose result does not agree with what it should be."""
    truth = results.get("gated edit", results["perfusion, hooks"])[1]  # the published formula, layer by layer
    size, eps = truth.abs().max(), torch.finfo(truth.dtype).eps
    near = max(1e-3, 4 * eps) * float(size)  # roundings of some dozens of layers, of which fewer than two show
    wrong = [name for name in EDITED if name in results and (results[name][1] - truth).abs().max() > near]
    if not torch.equal(results["stock"], results["attached"]):
        wrong.append("attached")
    if (truth - results["stock"][1]).abs().max() < max(1e-2 * size, 2 * near):
        wrong.append("perfusion")  # an edit that does nothing is none
    if {"LoRA", "LoRA fused"} <= results.keys() and not torch.allclose(results["LoRA"], results["LoRA fused"], atol=near):
        wrong.append("LoRA fused")
    if "stock compiled" in results and not torch.allclose(results["stock"], results["stock compiled"], atol=near):
        wrong.append("stock compiled")
    return wrong


def operators(step: Callable[[], Any]) -> list[str]:
    """Our operators that one step runs, as "edited_attention.cuda": which kernels are on the path."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            if operation.namespace == "perfusion_kernels":
                found.add(operation.__name__)
            return operation(*arguments, **(keywords or {}))

    found: set[str] = set()
    with Seen():
        step()
    return sorted(found)


def _compiled(unet: Any) -> Any:
    return torch.compile(unet, dynamic=False)


def own_weights(unet: Any) -> Any:
    """A UNet, with weights of its own in its attention, which fusing a LoRA writes to."""
    for name, module in unet.named_modules():
        if name.split(".")[-1] in ("to_q", "to_k", "to_v") or name.endswith("to_out.0"):
            module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    return unet
