"""One file per suite. Cases are those of the tests' factory.

`problems(options)` of a suite gives its cases and, for each, the candidates, or `planned(options)` their names and how to make them; a
suite that measures in another way gives rows itself, by `measured(options)`.
"""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench import rows
from bench.measure import Options, Problem, measure
from bench.providers import compiled_name
from bench.suites.draw import Planned

NAMES = (
    "decide", "gates", "projection", "attention", "fused", "gradients", "layer", "step", "tenants", "swap", "capacity", "train", "export",
    "overhead", "storage", "startup", "static", "serving",
)  # fmt: skip
COMPANY = ("cuda", "expert", "expert addmm")  # what a time is divided by, and ours
PLANNED = ("attention", "layer")  # whose problems have names before they are made


def problems(suite: str, options: Options) -> Iterator[Problem]:
    module = importlib.import_module(f"bench.suites.{suite}")
    return (each.make() for each in module.planned(options)) if suite in PLANNED else module.problems(options)


def measured(suite: str, options: Options) -> Iterator[dict[str, Any]]:
    """The rows of a suite, as they come."""
    module = importlib.import_module(f"bench.suites.{suite}")
    if hasattr(module, "measured"):
        yield from module.measured(options)
    else:
        for problem in problems(suite, options):
            yield from measure(suite, problem, options)


def missing(names: Sequence[str], options: Options, known: Iterable[dict[str, Any]]) -> list[tuple[str, Iterator[dict[str, Any]]]]:
    """(suite and case, its rows to be measured) of all problems of these suites that lack a row of a mode of torch.compile among `known`.

    Rows count if they passed, with this device, torch, Triton and dtype. The layers that move most in a step come first, those that have
    failed before last. Only `COMPANY` takes part beside the compiled formula.
    """
    machine = rows.provenance(str(options.device))
    same = {name: machine[name] for name in ("device", "torch", "triton")}
    same |= {"dtype": str(options.dtype).removeprefix("torch."), "quick": options.quick}
    wanted = tuple(map(compiled_name, options.compile))
    passed, failed = set(), set()
    for row in known:
        if row.get("provider") in wanted and same.items() <= row.items():
            (passed if row["gate"] == "passed" else failed).add((row["suite"], row["case"], row["provider"]))

    def among(found: set, suite: str, case: str) -> list[bool]:
        return [(suite, case, name) in found for name in wanted]

    plans = [(suite, each) for suite in names for each in importlib.import_module(f"bench.suites.{suite}").planned(options)]
    plans = [(suite, each) for suite, each in plans if not all(among(passed, suite, each.case))]
    plans.sort(key=lambda plan: (any(among(failed, plan[0], plan[1].case)), -plan[1].elements))
    options = dataclasses.replace(options, providers=(*COMPANY, *wanted))
    return [(f"{suite}, {each.case}", _one(suite, each, options)) for suite, each in plans]


def _one(suite: str, planned: Planned, options: Options) -> Iterator[dict[str, Any]]:
    yield from measure(suite, planned.make(), options)
