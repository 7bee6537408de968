"""One file per suite. Cases are those of the tests' factory.

`problems(options)` of a suite gives its cases and, for each, the candidates; a suite that measures in another way gives rows itself,
by `measured(options)`.
"""

import importlib
from collections.abc import Iterator
from typing import Any

from bench.measure import Options, measure

NAMES = (
    "decide", "gates", "projection", "attention", "fused", "layer", "step", "tenants", "swap", "capacity", "train", "export",
    "overhead", "storage", "startup", "static", "serving",
)  # fmt: skip


def measured(suite: str, options: Options) -> Iterator[dict[str, Any]]:
    """The rows of a suite, as they come."""
    module = importlib.import_module(f"bench.suites.{suite}")
    if hasattr(module, "measured"):
        yield from module.measured(options)
    else:
        for problem in module.problems(options):
            yield from measure(suite, problem, options)
