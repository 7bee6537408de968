"""What the suites of whole UNets share: pipelines at the shapes of real ones, a call that makes one step, and rows of what was timed.

Weights are random. Latents are small, so that the text is a larger part of the work than at full size: what personalisation
costs or saves appears larger than there.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import rows
from bench.measure import Options
from bench.providers import quiet
from bench.timing import Candidate, Times, facts, interleave
from perfusion.base import Base, describe_base
from perfusion.models import load_pipeline
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

SD15 = dict(
    block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, norm_num_groups=32, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)  # fmt: skip
SDXL = dict(
    block_out_channels=(320, 640, 1280), layers_per_block=2, norm_num_groups=32, attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 2, 10),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
THIN_SD15 = {**SD15, "block_out_channels": (32, 64, 128, 128)}
THIN_SDXL = {**SDXL, "block_out_channels": (32, 64, 128), "attention_head_dim": (2, 4, 8)}


@dataclasses.dataclass(frozen=True)
class Model:
    """make: gives the pipeline. side: of its latents. memory: bytes that its weights take. said: what differs from the real model."""

    make: Callable[[], Any]
    side: int
    memory: float
    said: str


def _filled(make: Callable[..., Any], unet: dict[str, Any], **options: Any) -> Any:
    """A pipeline whose UNet has random weights, drawn once for a million and repeated: drawing billions takes minutes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        few = torch.randn(2**20 + 7) * 0.02
    kept = {name: getattr(torch.nn.init, name) for name in ("kaiming_uniform_", "uniform_")}  # what the layers of a UNet draw with
    try:
        for name in kept:
            setattr(torch.nn.init, name, lambda tensor, *arguments, **more: tensor)
        pipe = make(unet=unet, **options)
    finally:
        for name, function in kept.items():
            setattr(torch.nn.init, name, function)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if parameter.dim() > 1:
                flat = parameter.view(-1)
                for start in range(0, len(flat), len(few)):
                    flat[start : start + len(few)] = few[: len(flat) - start]
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return pipe


MODELS = {
    "toybox": Model(lambda: load_pipeline("toybox", device="cpu"), 8, 0.1e9, "as it is"),
    "sd15": Model(lambda: _filled(tiny_sd, SD15, width=768), 8, 3.6e9, "SD 1.5's UNet, latents of 8 x 8"),
    "sdxl": Model(lambda: _filled(tiny_sdxl, SDXL, widths=(768, 1280)), 8, 10.6e9, "SDXL's UNet, latents of 8 x 8"),
}
MODELS |= {  # all blocks at a tenth of the width: what launches and Python cost, of which wide layers show little
    "sd15-thin": Model(lambda: tiny_sd(width=64, unet=THIN_SD15), 8, 0.0, "SD 1.5's blocks at a tenth of its width"),
    "sdxl-thin": Model(lambda: tiny_sdxl(widths=(64, 96), unet=THIN_SDXL), 8, 0.0, "SDXL's blocks at a tenth of its width"),
}
TINY = Model(tiny_sd, 8, 0.0, "a tiny one")


def free_memory() -> float:
    """Bytes available; infinite where the system does not report them."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def chosen(options: Options) -> dict[str, Model]:
    return {"tiny": TINY} if options.quick else {name: model for name, model in MODELS.items() if name in options.models}


def opened(name: str, model: Model, options: Options, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    """The pipeline on the device in `dtype`, or None and why not."""
    if options.device.type == "cpu" and model.memory * 1.3 > free_memory():
        return None, f"its weights take {model.memory / 1e9:.1f} GB, and this machine has {free_memory() / 1e9:.1f} GB free"
    pipe = model.make().to(options.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, ""


def encoded(pipe: Any, prompts: str | list[str], device: torch.device, *, guidance: bool = True) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Encodings [R, T, D] of prompts, behind those of no words with guidance, and the added conditions of SDXL or None."""
    found = pipe.encode_prompt(prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guidance)
    encodings = torch.cat([found[1], found[0]]) if guidance else found[0]
    if pipe.unet.config.addition_embed_type != "text_time":
        return encodings, None
    pooled = torch.cat([found[3], found[2]]) if guidance else found[2]
    return encodings, {"text_embeds": pooled, "time_ids": torch.zeros(len(encodings), 6, device=device, dtype=encodings.dtype)}


def step_of(pipe: Any, prompts: str | list[str], side: int, device: torch.device, *, guidance: bool = True) -> Callable[[], Tensor]:
    """A call that makes one step of the UNet for prompts that are encoded now."""
    return step_with(pipe.unet, *encoded(pipe, prompts, device, guidance=guidance), side)


def step_with(unet: Any, encodings: Tensor, conditions: dict[str, Tensor] | None, side: int, **more: Any) -> Callable[[], Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(len(encodings), unet.config.in_channels, side, side, generator=draw).to(encodings)
    timestep = torch.tensor(500, device=encodings.device)

    @torch.no_grad()
    def step() -> Tensor:
        return unet(latents, timestep, encoder_hidden_states=encodings, added_cond_kwargs=conditions, return_dict=False, **more)[0]

    return step


def tried(steps: dict[str, Callable[[], Tensor]], absent: dict[str, str]) -> dict[str, Tensor]:
    """What each step gives; of those that fail, the reason into `absent`."""
    results = {}
    for provider, step in steps.items():
        try:
            results[provider] = step()
        except Exception as error:
            absent[provider] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return results


def common(
    suite: str, case: str, base: Base | None, options: Options, dtype: torch.dtype = torch.float32, **shapes: Any
) -> dict[str, Any]:  # fmt: skip
    """The fields that all rows of a case share."""
    if base is not None:
        shapes = dict(D=base.encoding_dim, O=base.outputs, layers=len(base.layers), **shapes)
    return {
        "suite": suite, "case": case, "dtype": str(dtype).removeprefix("torch."), "quick": options.quick, "load": rows.load(),
        "shapes": shapes, **rows.provenance(str(options.device)),
    }  # fmt: skip


TURN = 5  # steps in a row, as a picture takes 50: what one step leaves in the caches the next one finds


def timed(steps: dict[str, Callable[[], Any]], options: Options, *, turn: int = 1) -> dict[str, Times]:
    """All in one interleaved run; times are of one call, of as many in a row as `turn` says."""
    clock = {"wall": time.perf_counter, "process": time.process_time}[options.clock]
    candidates = [Candidate(name, functools.partial(_in_a_row, call, turn), calls=turn) for name, call in steps.items()]
    with quiet(), torch.no_grad():
        found = interleave(candidates, options.device, seconds=options.seconds * len(candidates), rounds=options.rounds, clock=clock)
    return {candidate.provider: each for candidate, each in zip(candidates, found)}


def _in_a_row(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def told(
    shared: dict[str, Any], times: dict[str, Times], absent: dict[str, str], options: Options, more: dict[str, dict[str, Any]] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each that was timed, and for each that was not one with the reason. more: provider -> further fields."""
    more = more or {}
    on_gpu = options.device.type == "cuda"
    for provider in times:
        yield {
            **shared, "provider": provider, "gate": "passed", **facts(times, provider), "l2": "cold" if on_gpu else "warm",
            "clock": "cuda events" if on_gpu else options.clock, **more.get(provider, {}),
        }  # fmt: skip
    for provider, reason in absent.items():
        yield {**shared, "provider": provider, "gate": "not passed", "reason": reason, **more.get(provider, {})}


def base_of(pipe: Any) -> Base:
    return describe_base(pipe)


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
