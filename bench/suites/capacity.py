"""Whether resident concepts cost time, and what each takes: a step with 16 loaded, and with many more.

Toybox, or with --quick the tests' tiny pipeline; two rows, one with a concept. Rows hold the bytes of the bank, and of what the process
grew by while the concepts were loaded. Checked: the step is the same, whatever else is resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import Options
from bench.suites.pipelines import TURN, base_of, chosen, common, opened, resident, step_of, timed, told
from bench.suites.train import own_modules
from perfusion.handle import attach
from tests.perfusion.editing import make_concept

COUNTS = (16, 1000)


def measured(options: Options) -> Iterator[dict[str, Any]]:
    counts = (4, 16) if options.quick else COUNTS
    for name, model in chosen(options).items():
        if name not in ("toybox", "tiny"):
            continue
        pipe, _ = opened(name, model, options)
        base, steps, more, handles = base_of(pipe), {}, {}, []
        concept = make_concept(base, "teddy", superclass="cat")
        for count in counts:
            own, before = own_modules(pipe), resident()
            handles.append(attach(own, capacity=count))
            handles[-1].load(concept)
            for number in range(count - 1):
                handles[-1].load(make_concept(base, f"other{number}", seed=number + 2, superclass="cat"))
            grown, provider = resident() - before, f"{count:,} resident"
            steps[provider] = step_of(own, "a <teddy>", model.side, options.device)
            more[provider] = {"resident": count, "bank_bytes": handles[-1].memory()["bank"], "grown_bytes": grown}
        yield from told(
            common("capacity", f"{name}, 2 rows", base, options, R=2, side=model.side), *_timed(steps, options), options, more
        )
        for handle in handles:
            handle.detach()


def _timed(steps: dict[str, Callable[[], Tensor]], options: Options) -> tuple[dict, dict[str, str]]:
    first, *others = (step() for step in steps.values())
    wrong = [name for name, result in zip(list(steps)[1:], others) if not torch.allclose(result, first, atol=1e-5)]
    right = {name: step for name, step in steps.items() if name not in wrong}
    return timed(right, options, turn=TURN), dict.fromkeys(wrong, "its step is another")
