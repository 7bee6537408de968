"""What is counted instead of timed: operator launches of a step, and the memory of a concept and of a prompt's slot.

Launches, by torch's profiler on a CPU: operators that start a kernel, so all but views, allocations and what only calls others. Their
number depends on a UNet's blocks and not on its widths, so SD 1.5's and XL's have their blocks at a tenth of the width. One concept
in one of two rows; for PEFT's mixed batch 16 rows with 16 adapters. A GPU's own kernels fuse or split some of them.

Memory, in float16: of a place in the bank, and of a row's keys and values in all layers, at the shapes of the real models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import peers, roofline
from bench.measure import Options
from bench.suites import pipelines
from bench.suites.pipelines import base_of, common, encoded, step_of, step_with
from bench.suites.train import own_modules
from perfusion.handle import attach
from perfusion.slots import Slots
from perfusion_kernels import ConceptBank
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import tiny_sd

FREE = (
    "_local_scalar_dense", "_nnpack_available", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "conj",
    "contiguous", "detach", "detach_", "dropout", "empty", "expand", "expand_as", "flatten", "is_floating_point", "is_nonzero",
    "item", "lift_fresh", "movedim", "narrow", "numpy_T", "permute", "reshape", "resize_", "resolve_conj", "resolve_neg",
    "result_type", "select", "set_", "slice", "split", "squeeze", "swapaxes", "t", "to", "transpose", "type_as", "unbind",
    "unflatten", "unsafe_split", "unsqueeze", "view", "view_as",
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "toybox": pipelines.MODELS["toybox"].make,
    "sd15": pipelines.MODELS["sd15-thin"].make,
    "sdxl": pipelines.MODELS["sdxl-thin"].make,
}


def launches(step: Callable[[], Any]) -> int:
    """Of the second call: the first one fills what is kept."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    roots = [event for event in profiler.events() if event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")]
    return sum(map(_kernels, (event for event in roots if event.name.startswith(("aten::", "perfusion")))))


def _kernels(event: Any) -> int:
    """An operator starts a kernel if none that it calls does."""
    below = sum(_kernels(child) for child in event.cpu_children if "::" in child.name)
    name = event.name.split("::")[-1]
    return below or int(name not in FREE and not name.startswith("empty"))


def measured(options: Options) -> Iterator[dict[str, Any]]:
    models = {"tiny": tiny_sd} if options.quick else {name: make for name, make in MODELS.items() if name in options.models}
    for name, make in models.items():
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        yield from _launches(name, pipe, options)
    for name in () if options.quick else filter(roofline.UNETS.get, options.models):
        yield from _memory(name, options)


def _launches(name: str, pipe: Any, options: Options) -> Iterator[dict[str, Any]]:
    base, device, side = base_of(pipe), torch.device("cpu"), 8
    concept, handles = make_concept(base, "teddy"), []

    def ours(prompt: str, exact: bool = False) -> Callable[[], Any]:
        own = own_modules(pipe)
        handles.append(attach(own, exact=exact))
        handles[-1].load(concept)
        return step_of(own, prompt, side, device)

    plain = encoded(pipe, "a cat", device)
    sixteen = encoded(pipe, ["a cat"] * 16, device, guidance=False)
    names = [f"t{number}" for number in range(16)]
    makers = {
        "stock": lambda: step_with(own_modules(pipe).unet, *plain, side),
        "perfusion": lambda: ours("a <teddy>"),
        "perfusion, hooks": lambda: ours("a <teddy>", exact=True),
        "gated edit": lambda: step_with(peers.with_gated_edit(own_modules(pipe).unet, concept), *plain, side),
        "perfusion-pytorch": lambda: step_with(
            peers.with_perfusion_pytorch(own_modules(pipe).unet, concept, plain[0].shape[1]), *plain, side
        ),
        "LoRA": lambda: step_with(peers.with_lora(own_modules(pipe).unet), *plain, side),
        "PEFT mixed batch, 16": lambda: step_with(
            peers.with_mixed_lora(own_modules(pipe).unet, names), *sixteen, side, adapter_names=names
        ),
    }
    for provider, make in makers.items():
        row = {**common("static", name, base, options), "provider": provider, "what": f"launches, {provider}", "unit": "launches"}
        try:
            with torch.no_grad():
                count = launches(make())
        except Exception as error:  # a library that is not here, or of another version
            yield {**row, "gate": "not passed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            continue
        yield {**row, "gate": "counted", "value": count}
    for handle in handles:
        handle.detach()


def _memory(name: str, options: Options) -> Iterator[dict[str, Any]]:
    row = {**common("static", name, None, options), "provider": "perfusion", "gate": "counted", "unit": "bytes"}
    for what, value in memory(name).items():
        yield {**row, "what": what, "value": value}


def memory(name: str) -> dict[str, int]:
    """Bytes on a device, in float16, of a concept in the bank and of a slot of 77 tokens in all layers: of a UNet of `roofline.UNETS`."""
    outputs = sum(layer.C * layer.count for layer in roofline.UNETS[name])
    bank = ConceptBank(2, roofline.TEXT_WIDTHS[name], outputs, dtype=torch.float16)
    slots = Slots(77, outputs, torch.device("cpu"))
    _, missing = slots.place(["a", "b"])
    slots.write(list(missing.values()), *torch.zeros(2, 2, 77, outputs, dtype=torch.float16))
    held = sum(table.nbytes for table in vars(bank).values() if isinstance(table, torch.Tensor))
    return {"memory, a concept": held // 2, "memory, a slot": slots.nbytes // slots.capacity}
