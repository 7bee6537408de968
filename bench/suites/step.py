"""One step of the UNet: stock, attached without a concept, personalised, and personalised by the compatibility path.

Models: toybox as it is, and UNets of Stable Diffusion 1.5's and XL's shapes with random weights at small latents; with --quick
the tests' tiny pipeline. Two rows, as guidance makes them, one of them with a concept. The gate: attached without a concept, the
step has the stock step's bits; the two personalised steps agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import rows
from bench.measure import Options
from bench.providers import quiet
from bench.suites.training import SD15, own_modules
from bench.timing import Candidate, interleave
from perfusion.base import describe_base
from perfusion.handle import attach
from perfusion.models import load_pipeline
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

SDXL = dict(
    block_out_channels=(320, 640, 1280), layers_per_block=2, norm_num_groups=32, attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 2, 10),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
MODELS: dict[str, tuple[Callable[[], Any], int]] = {  # how to make it, and the side of its latents
    "toybox": (lambda: load_pipeline("toybox", device="cpu"), 8),
    "sd15": (lambda: tiny_sd(width=768, unet=SD15), 16),
    "sdxl": (lambda: tiny_sdxl(widths=(768, 1280), unet=SDXL), 8),
}


def measured(options: Options) -> Iterator[dict[str, Any]]:
    models = {"tiny": (tiny_sd, 8)} if options.quick else {name: made for name, made in MODELS.items() if name in options.models}
    for name, (make, side) in models.items():
        yield from _rows(name, make().to(options.device), side, options)


def _rows(name: str, pipe: Any, side: int, options: Options) -> Iterator[dict[str, Any]]:
    base, device = describe_base(pipe), options.device
    steps: dict[str, Callable[[], Tensor]] = {}
    handles = []
    for provider, prompt, loaded, exact in (
        ("stock", "a cat", None, False),
        ("attached", "a cat", False, False),
        ("personalised", "a <teddy>", True, False),
        ("hooks", "a <teddy>", True, True),
    ):
        own = own_modules(pipe)  # the same weights, and hooks of its own
        if loaded is not None:
            handles.append(attach(own, exact=exact))
            if loaded:
                handles[-1].load(make_concept(base, "teddy"))
        steps[provider] = _step(own, prompt, side, device)
    results = {provider: step() for provider, step in steps.items()}
    same = torch.equal(results["stock"], results["attached"])
    near = torch.allclose(results["personalised"], results["hooks"], atol=1e-3, rtol=1e-2)
    gates = {"stock": True, "attached": same, "personalised": near, "hooks": near}
    candidates = [Candidate(provider, steps[provider]) for provider in steps if gates[provider]]
    clock = {"wall": time.perf_counter, "process": time.process_time}[options.clock]
    with quiet(), torch.no_grad():
        timed = interleave(candidates, device, seconds=options.seconds * len(candidates), rounds=options.rounds, clock=clock)
    times = {candidate.provider: each for candidate, each in zip(candidates, timed)}
    common = {
        "suite": "step", "case": f"{name}, 2 rows", "dtype": "float32", "quick": options.quick, "load": rows.load(),
        "shapes": dict(R=2, T=77, D=base.encoding_dim, O=base.outputs, layers=len(base.layers), side=side), **rows.provenance(str(device)),
    }  # fmt: skip
    for provider in steps:
        if provider not in times:
            yield {**common, "provider": provider, "gate": "not passed", "reason": "its step is not the one that it should be"}
            continue
        low, middle, high = (round(1e6 * value, 3) for value in times[provider].quantiles())
        ratios = {
            other: [round(value, 4) for value in times[provider].ratio(each)] for other, each in times.items() if other != provider
        }
        yield {
            **common, "provider": provider, "gate": "passed", "median_us": middle, "p20_us": low, "p80_us": high,
            "repeats": len(times[provider].samples), "l2": "warm", "clock": options.clock, "ratios": ratios,
        }  # fmt: skip
    for handle in handles:
        handle.detach()


def _step(pipe: Any, prompt: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    """A call that makes one step with the encodings of a prompt behind those of no words."""
    found = pipe.encode_prompt(prompt=prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True)
    encodings = torch.cat([found[0] if found[1] is None else found[1], found[0]])
    latents = torch.randn(2, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    conditions = None
    if pipe.unet.config.addition_embed_type == "text_time":
        conditions = {"text_embeds": torch.cat([found[3], found[2]]), "time_ids": torch.zeros(2, 6, device=device)}
    timestep = torch.tensor(500, device=device)

    @torch.no_grad()
    def step() -> Tensor:
        return pipe.unet(latents, timestep, encoder_hidden_states=encodings, added_cond_kwargs=conditions, return_dict=False)[0]

    return step
