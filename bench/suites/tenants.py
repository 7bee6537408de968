"""One step of a batch of 16 rows that belong to 1, 2, 4, 8 or 16 tenants, each with a concept of its own.

    stock                  no concept
    perfusion, n           row r has the concept of tenant r mod n
    PEFT mixed batch, n    the same with LoRAs, an adapter for each tenant and `adapter_names` in the forward

No guidance, so that all rows are personalised. Models as in the suite `step`; the peer on toybox alone. Checked: a tenant's row is the
same whoever else is in the batch, and is not the stock step's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from bench import peers
from bench.measure import Options
from bench.suites.pipelines import base_of, chosen, common, encoded, opened, step_of, step_with, timed, told, tried
from bench.suites.train import own_modules
from perfusion.handle import attach
from tests.perfusion.editing import make_concept

ROWS = 16
PEERS = ("toybox", "tiny")


def measured(options: Options) -> Iterator[dict[str, Any]]:
    batch = 4 if options.quick else ROWS
    for name, model in chosen(options).items():
        pipe, reason = opened(name, model, options)
        if pipe is None:
            yield from told(common("tenants", f"{name}, {batch} rows", None, options), {}, {"perfusion, 1": reason}, options)
        else:
            yield from _rows(name, pipe, model.side, batch, options)


def _rows(name: str, pipe: Any, side: int, batch: int, options: Options) -> Iterator[dict[str, Any]]:
    base, device = base_of(pipe), options.device
    counts = [n for n in (1, 2, 4, 8, 16) if n <= batch]
    concepts = [make_concept(base, f"c{n}", seed=n + 1, superclass="cat", bias=0.0) for n in range(batch)]
    encodings, conditions = encoded(pipe, ["a cat"] * batch, device, guidance=False)
    steps: dict[str, Callable[[], Tensor]] = {"stock": step_with(own_modules(pipe).unet, encodings, conditions, side)}
    more: dict[str, dict[str, Any]] = {}
    absent, handles = {}, []
    for n in counts:
        own = own_modules(pipe)
        handles.append(attach(own, capacity=batch))
        for concept in concepts[:n]:
            handles[-1].load(concept)
        more[f"perfusion, {n}"] = {"tenants": n, "way": "perfusion"}
        steps[f"perfusion, {n}"] = step_of(own, [f"a <c{row % n}>" for row in range(batch)], side, device, guidance=False)
    for n in counts if name in PEERS else ():
        provider, names = f"PEFT mixed batch, {n}", [f"t{row}" for row in range(n)]
        more[provider] = {"tenants": n, "way": "PEFT mixed batch"}
        try:
            model = peers.with_mixed_lora(own_modules(pipe).unet, names)
            rows = [names[row % n] for row in range(batch)]
            steps[provider] = step_with(model, encodings, conditions, side, adapter_names=rows)
        except Exception as error:  # a library that is not here, or of another version
            absent[provider] = f"{type(error).__name__}: {error}"
    results = tried(steps, absent)
    for way in ("perfusion", "PEFT mixed batch"):
        found = {provider: results[provider] for provider in results if more.get(provider, {}).get("way") == way}
        for provider, result in found.items():
            first, size = found.get(f"{way}, 1", result)[0], result.abs().max()
            if (result[0] - first).abs().max() > 1e-3 * size or (result - results["stock"]).abs().amax((1, 2, 3)).min() < 1e-3 * size:
                absent[provider] = "its step is not the one that it should be"
    times = timed({provider: steps[provider] for provider in results if provider not in absent}, options)
    yield from told(common("tenants", f"{name}, {batch} rows", base, options, R=batch, side=side), times, absent, options, more)
    for handle in handles:
        handle.detach()


