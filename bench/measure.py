"""Measures one problem. Candidates whose results are correct are timed together; every candidate gets a row."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import chips, roofline, rows
from bench.providers import CALLS, attempt, quiet, with_graphs
from bench.timing import FLUSH, Candidate, facts, interleave
from tests.kernels.tolerance import Exact, assert_no_worse, exactly


@dataclasses.dataclass(frozen=True)
class Options:
    """How and what to measure. clock: on a CPU, "wall" or "process" (CPU time of this process).

    tokens: only layers with these numbers of image tokens; () for all. places: J; () for the suite's. compile: modes of torch.compile.
    providers: only these candidates, and their graphs; () for all.
    """

    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    models: tuple[str, ...] = ("toybox", *roofline.UNETS)
    rows: tuple[int, ...] = (1, 2, 8, 16)
    seconds: float = 1.0
    rounds: tuple[int, int] = (10, 100)
    clock: str = "wall"
    tokens: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    compile: tuple[str, ...] = ("default",)
    providers: tuple[str, ...] = ()


@dataclasses.dataclass
class Problem:
    """A case and its candidates. exact, plain: return the float64 results, and those of the plain formula in the case's dtype.

    again: makes the candidates once more, on copies of their tensors, of `copied` bytes. facts: added to every row.
    """

    case: str
    shapes: dict[str, int]
    dtype: torch.dtype
    index: Tensor
    exact: Callable[[], Any]
    plain: Callable[[], Any]
    candidates: list[Candidate]
    work: roofline.Work | None = None
    again: Callable[[], list[Candidate]] | None = None
    copied: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def copies(self) -> list[list[Candidate]]:
        """Enough copies to fill L2 together with the first, but no more than a graph has calls."""
        count = min(CALLS, -(-FLUSH // max(1, self.copied))) - 1
        return [self.again() for _ in range(count)] if self.again else []


def measure(suite: str, problem: Problem, options: Options) -> Iterator[dict[str, Any]]:
    """One row per candidate: times, if its results pass the tests' tolerance in this run; else the reason, and as `error` the exception, or
    "wrong result"."""
    exact, plain = exactly(problem.exact), _tensors(problem.plain())
    on_gpu = options.device.type == "cuda"
    candidates, *copies = (
        [each for each in every if not options.providers or each.provider in options.providers]
        for every in (problem.candidates, *(problem.copies() if on_gpu else ()))
    )
    candidates = with_graphs(candidates, copies) if on_gpu else candidates
    admitted, reasons = [], {}
    for candidate in candidates:
        result, reason, error = attempt(candidate)
        if not reason:
            reason, error = _rejected(_tensors(result), plain, exact, problem.index), "wrong result"
        if reason:
            reasons[candidate.provider] = {"reason": reason, **({"error": error} if error else {})}
        else:
            admitted.append(candidate)
    del exact, plain
    clock = {"wall": time.perf_counter, "process": time.process_time}[options.clock]
    with quiet():
        timed = interleave(admitted, options.device, seconds=options.seconds * len(admitted), rounds=options.rounds, clock=clock)
    times = dict(zip((candidate.provider for candidate in admitted), timed))

    machine = rows.provenance(str(options.device))
    common = {
        "suite": suite, "case": problem.case, "dtype": str(problem.dtype).removeprefix("torch."), "shapes": problem.shapes,
        **machine, "load": rows.load(), "quick": options.quick, **_floor(problem.work, machine["device"]), **problem.facts,
    }  # fmt: skip
    for candidate in candidates:
        row = {"suite": suite, "case": problem.case, "provider": candidate.provider, **common}
        mine = times.get(candidate.provider)
        if mine is None:
            yield {**row, "gate": "not passed", **reasons[candidate.provider]}
            continue
        yield {
            **row, "gate": "passed", **facts(times, candidate.provider), "calls": candidate.calls, "l2": "cold" if on_gpu else "warm",
            "clock": "cuda events" if on_gpu else options.clock, **(_rates(common, 1e6 * mine.quantiles()[1]) if on_gpu else {}),
        }  # fmt: skip


def _rates(row: dict[str, Any], median_us: float) -> dict[str, float]:
    """Bytes and FLOPs per second, where the row has the work; on a GPU."""
    return {f"{name}_per_s": 1e6 * row[name] / median_us for name in ("bytes", "flops") if row.get(name)}


def _floor(work: roofline.Work | None, device: str) -> dict[str, Any]:
    """Bytes and FLOPs of the work, and on a chip whose rates are known the roofline's least time."""
    if work is None:
        return {}
    known, chip = {"bytes": work.bytes, "flops": work.flops}, chips.of_device(device)
    return {**known, "floor_us": round(1e6 * chips.CHIPS[chip].floor(work), 4), "floor_of": chip} if chip else known


def _tensors(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _rejected(results: tuple, plain: tuple[Tensor, ...], exact: tuple[Exact, ...], index: Tensor) -> str:
    """Why the results are wrong; "" if they are right."""
    try:
        for mine, formula, truth in zip(results, plain, exact, strict=True):
            if not isinstance(mine, Tensor) or mine.shape != formula.shape or mine.dtype != formula.dtype:
                came = f"{mine.dtype} {list(mine.shape)}" if isinstance(mine, Tensor) else type(mine).__name__
                return f"it gives {came}, not {formula.dtype} {list(formula.shape)}"
            assert_no_worse(mine, formula, truth, index)
    except AssertionError as error:
        return f"its result is wrong, {' '.join(str(error).split())}"
    return ""
