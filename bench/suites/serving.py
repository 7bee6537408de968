"""Inputs of the simulation of a server, for one model: a step by the number of its rows, every row with a concept of its own.

Cases: a step of 1 to 64 rows; per picture, its text and its decoding; a concept read from its file until it can be drawn with, and one
that was read before. The gate: the batch's rows are those that each row gives alone. `bench/serve_sim.py` reads the rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import rows
from bench.measure import Options
from bench.providers import quiet
from bench.suites.step import MODELS
from bench.timing import Candidate, interleave
from perfusion.base import describe_base
from perfusion.concept import Concept
from perfusion.handle import attach
from perfusion.models import load_pipeline
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import tiny_sd

ROWS = (1, 2, 4, 8, 16, 32, 64)
MODEL = "toybox"


def measured(options: Options) -> Iterator[dict[str, Any]]:
    if not options.quick and MODEL not in options.models:
        return
    name, pipe, side = ("tiny", tiny_sd(), 8) if options.quick else (MODEL, load_pipeline(MODEL, device="cpu"), MODELS[MODEL][1])
    pipe.to(options.device)
    counts = (1, 2, 4) if options.quick else ROWS
    base, device = describe_base(pipe), options.device
    with attach(pipe, capacity=max(counts) + 1) as handle, tempfile.TemporaryDirectory() as folder:
        concepts = [make_concept(base, f"c{number}", seed=number) for number in range(max(counts))]
        for concept in concepts:
            handle.load(concept)
        latents = torch.randn(max(counts), pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        steps: dict[int, Callable[[], Tensor]] = {count: _step(pipe, latents[:count], _encodings(pipe, count, device)) for count in counts}
        whole = steps[counts[-1]]()
        gate = all(
            torch.allclose(whole[row], _alone(pipe, latents, row, counts[-1])[0], atol=1e-3, rtol=1e-2) for row in (0, counts[-1] - 1)
        )
        file = Path(folder) / "new.safetensors"
        make_concept(base, "new", seed=999).save(file)
        known = Concept.load(file)

        def loaded(source: Any) -> Callable[[], None]:
            def call() -> None:
                handle.load(source)
                handle.unload("new")

            return call

        @torch.no_grad()
        def decode() -> Tensor:
            return pipe.vae.decode(latents[:1] / pipe.vae.config.scaling_factor, return_dict=False)[0]

        candidates = {
            **{f"a step, {count} rows": Candidate(f"a step, {count} rows", step) for count, step in steps.items()},
            "text of a picture": Candidate("text of a picture", lambda: pipe.encode_prompt(_prompt(0), device, 1, True)),
            "decoding of a picture": Candidate("decoding of a picture", decode),
            "a concept from its file": Candidate("a concept from its file", loaded(file)),
            "a concept read before": Candidate("a concept read before", loaded(known)),
        }
        clock = {"wall": time.perf_counter, "process": time.process_time}[options.clock]
        with quiet(), torch.no_grad():
            timed = interleave(
                list(candidates.values()), device, seconds=options.seconds * len(candidates), rounds=options.rounds, clock=clock
            )
    common = {
        "suite": "serving", "provider": "perfusion", "dtype": "float32", "quick": options.quick, "load": rows.load(),
        "shapes": dict(T=77, D=base.encoding_dim, O=base.outputs, layers=len(base.layers), side=side), **rows.provenance(str(device)),
    }  # fmt: skip
    one = timed[0]
    for (what, _), times in zip(candidates.items(), timed):
        row = {**common, "case": f"{name}, {what}", "gate": "passed" if gate else "not passed", "what": what}
        if not gate:
            yield {**row, "reason": "rows of the batch are not those of each row alone"}
            continue
        low, middle, high = (round(1e6 * value, 3) for value in times.quantiles())
        yield {
            **row, "median_us": middle, "p20_us": low, "p80_us": high, "repeats": len(times.samples), "l2": "warm", "clock": options.clock,
            "ratios": {"a step, 1 rows": [round(value, 4) for value in times.ratio(one)]},
        }  # fmt: skip


def _prompt(row: int) -> str:
    return f"a <c{row}>"


def _encodings(pipe: Any, count: int, device: torch.device) -> Tensor:
    return pipe.encode_prompt([_prompt(row) for row in range(count)], device, 1, False)[0]


def _alone(pipe: Any, latents: Tensor, row: int, count: int) -> Tensor:
    """The same row of a batch of `count`, in a forward of its own."""
    encodings = pipe.encode_prompt(_prompt(row), latents.device, 1, False)[0]
    return _step(pipe, latents[row : row + 1], encodings, _timesteps(count, latents.device)[row : row + 1])()


def _timesteps(count: int, device: torch.device) -> Tensor:
    return torch.linspace(900, 100, count, device=device).round()


def _step(pipe: Any, latents: Tensor, encodings: Tensor, timesteps: Tensor | None = None) -> Callable[[], Tensor]:
    """A call that makes a step of these rows, each at a timestep of its own, as a server's rows are."""
    timesteps = _timesteps(len(latents), latents.device) if timesteps is None else timesteps

    @torch.no_grad()
    def step() -> Tensor:
        return pipe.unet(latents, timesteps, encoder_hidden_states=encodings, return_dict=False)[0]

    return step
