"""One file per suite: `problems(options)` gives the cases, and for each the contestants. Cases are those of the tests' factory."""

import importlib
from collections.abc import Iterator

from bench.measure import Options, Problem

NAMES = ("gates", "projection", "attention", "layer", "training")


def problems(suite: str, options: Options) -> Iterator[Problem]:
    yield from importlib.import_module(f"bench.suites.{suite}").problems(options)
