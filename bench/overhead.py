"""Overhead of one eager call: the public function with an implementation that does nothing.

    PYTHONPATH=.:python python bench/overhead.py

Checks of arguments, choice of the backend, dispatch and autograd's bookkeeping are measured, on ordinary tensors in host
memory; the implementation in place of the reference returns `torch.empty_like` of its first argument for each result, and
as many calls of that are subtracted. `overhead` is that of the default call with the same tensors as before, as the steps of a
pipeline make it, whose values were checked once; `unvalidated` with `validate=False`; `fresh` after a write to one of
them, when values are looked at. Times are of this CPU, the least of several rounds, because other processes only add to it.
"""

import contextlib
import dataclasses
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd.graph import increment_version

import perfusion_kernels
from perfusion_kernels import backend
from perfusion_kernels.registration import bind
from perfusion_kernels.schemas import SCHEMAS

ROOT = Path(__file__).parents[1]
LIMIT_US = 15.0


def overheads(operators: tuple[str, ...] = tuple(SCHEMAS), *, calls: int = 50, rounds: int = 60) -> list[dict]:
    """One row per operator, all in microseconds: overhead, unvalidated, fresh, call, empty_like, limit."""
    sys.path.insert(0, str(ROOT))  # the case factory of the tests
    try:
        cases = importlib.import_module("tests.kernels.cases")
    finally:
        sys.path.remove(str(ROOT))
    case, rows = cases.make(), []
    for operator in operators:
        function, arguments = getattr(perfusion_kernels, operator), case.arguments(operator)
        first = next(iter(arguments.values()))
        written = (arguments["key" if operator == "cross_attention_layer" else "index"],)
        with _nothing_done(operator) as results, torch.no_grad():
            timed = {
                "call": lambda: function(**arguments),
                "unvalidated": lambda: function(**arguments, validate=False),
                "fresh": lambda: (increment_version(written), function(**arguments)),
                "write": lambda: increment_version(written),
                "empty_like": lambda: [torch.empty_like(first) for _ in range(results)],
            }
            best = dict.fromkeys(timed, math.inf)
            for _ in range(rounds):  # in turn: load affects all
                for name, call in timed.items():
                    best[name] = min(best[name], _microseconds(call, calls))
        rows.append(
            {
                "operator": operator,
                "overhead": best["call"] - best["empty_like"],
                "unvalidated": best["unvalidated"] - best["empty_like"],
                "fresh": best["fresh"] - best["write"] - best["empty_like"],
                "call": best["call"],
                "empty_like": best["empty_like"],
                "limit": LIMIT_US,
            }
        )
    return rows


_overloads: dict = {}  # they live as long as the process


@contextlib.contextmanager
def _nothing_done(operator: str) -> Iterator[int]:
    """Inside the `with`, the reference of `operator` is one `empty_like` per result; yields how many results there are."""
    kind = importlib.import_module(f"perfusion_kernels.{operator}").OPERATOR
    have = backend._implementations[operator]
    results = len(have["reference"].overload._schema.returns)

    def nothing(first, *rest):
        found = tuple(torch.empty_like(first) for _ in range(results))
        return found if results > 1 else found[0]

    if operator not in _overloads:
        _overloads[operator] = bind(dataclasses.replace(kind, backwards={}), "nothing", nothing)
    backend._implementations[operator] = {
        **have,
        "reference": dataclasses.replace(have["reference"], overload=_overloads[operator]),
    }
    try:
        yield results
    finally:
        backend._implementations[operator] = have


def _microseconds(call: Callable[[], object], calls: int) -> float:
    call()  # after another's write, values are looked at once
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'operator':24}{'overhead':>10}{'limit':>8}{'unvalidated':>14}{'fresh':>10}{'empty_like':>12}   µs")
    for row in overheads():
        numbers = f"{row['overhead']:10.1f}{row['limit']:8.1f}{row['unvalidated']:14.1f}{row['fresh']:10.1f}"
        print(f"{row['operator']:24}{numbers}{row['empty_like']:12.2f}")


if __name__ == "__main__":
    main()
