"""Times of candidates that take turns, so that load and clock changes affect all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLUSH = 256 * 2**20  # bytes; more than any GPU's L2
SHORTEST = 2e-4  # seconds a sample on a CPU should take, so that reading the clock costs nothing beside it


@dataclasses.dataclass
class Candidate:
    """Something to time: `call` does it once, inside `context`, which is entered outside the clock.

    check: returns what is compared with the exact result, from `call` and `calls`, if that is not what `call` returns. reason: why it
    cannot run, or "". on_graph: whether a CUDA graph of the call is a candidate too, where there is a GPU. calls: how many
    calls `call` makes; times are of one.
    """

    provider: str
    call: Callable[[], object] | None
    reason: str = ""
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    check: Callable[[Callable[[], object], int], object] | None = None
    on_graph: bool = False
    calls: int = 1


@dataclasses.dataclass
class Times:
    """Samples in seconds, one per round; round k of every candidate was taken within the same moment.

    samples: by the selected clock. processor: on a CPU, CPU time of this process; else None.
    """

    samples: torch.Tensor  # [rounds], float64
    processor: torch.Tensor | None = None

    def quantiles(self) -> tuple[float, float, float]:
        """The 20th percentile, the median, the 80th percentile."""
        return quantiles(self.samples)

    def ratio(self, other: Times) -> tuple[float, float, float]:
        """The same of this time over the other's, round by round."""
        return quantiles(self.samples / other.samples)

    def processor_ratio(self, other: Times) -> tuple[float, float, float] | None:
        """As `ratio`, of the processor's time; None without it, or where that clock is too coarse for a sample."""
        if self.processor is None or other.processor is None or not (self.processor.min() > 0 and other.processor.min() > 0):
            return None
        return quantiles(self.processor / other.processor)

    def interval(self, other: Times) -> tuple[float, float]:
        """The 95 % confidence interval of the median of the ratio, by order statistics, for any distribution."""
        return median_interval(self.samples / other.samples)


def median_interval(samples: torch.Tensor) -> tuple[float, float]:
    """The narrowest symmetric pair of order statistics that holds the median with at least 95 %; with fewer than 6 samples all of them."""
    count, ordered = len(samples), samples.sort().values.tolist()
    below, tail = 0, 0.5**count  # tail: the chance that at most `below` samples lie under the median
    while below + 1 < count / 2 and tail + math.comb(count, below + 1) * 0.5**count <= 0.025:
        below += 1
        tail += math.comb(count, below) * 0.5**count
    return ordered[below], ordered[count - 1 - below]


def quantiles(samples: torch.Tensor) -> tuple[float, float, float]:
    return tuple(torch.quantile(samples, torch.tensor([0.2, 0.5, 0.8], dtype=samples.dtype)).tolist())


def interleave(
    candidates: Sequence[Candidate], device: torch.device, *, seconds: float, rounds: tuple[int, int], clock: Callable[[], float]
) -> list[Times]:
    """One Times per candidate: rounds in a random order each, as many as `seconds` allow between the limits `rounds`.

    On a GPU a sample is one call between two events, after a write that evicts the L2 cache and keeps the device busy
    while the call is issued. On a CPU it is as many calls as take a while, by `clock`, with whatever the caches hold.
    """
    if not candidates:
        return []
    sample = _cuda_sampler(device) if device.type == "cuda" else _cpu_sampler(candidates, clock)
    for candidate in candidates:  # warm up
        sample(candidate)
    samples: list[list[Callable[[], Any]]] = [[] for _ in candidates]
    order, chance, start = list(range(len(candidates))), random.Random(0), time.perf_counter()
    while len(samples[0]) < rounds[1] and (len(samples[0]) < rounds[0] or time.perf_counter() - start < seconds):
        chance.shuffle(order)
        for number in order:
            samples[number].append(sample(candidates[number]))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = [torch.tensor([read() for read in each], dtype=torch.float64) for each in samples]  # [rounds] or [rounds, 2]
    return [Times(each) if each.dim() == 1 else Times(*each.unbind(1)) for each in found]


def _cuda_sampler(device: torch.device) -> Callable[[Candidate], Callable[[], float]]:
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def sample(candidate: Candidate) -> Callable[[], float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with candidate.context():
            flush.fill_(1)
            begin.record()
            candidate.call()
            end.record()
        return lambda: begin.elapsed_time(end) * 1e-3 / candidate.calls

    return sample


def _cpu_sampler(candidates: Sequence[Candidate], clock: Callable[[], float]) -> Callable[[Candidate], Callable[[], Any]]:
    calls: dict[str, int] = {}

    def sample(candidate: Candidate) -> Callable[[], float]:
        count = calls.get(candidate.provider, 1)
        with candidate.context():
            start, processor = clock(), time.process_time()
            for _ in range(count):
                candidate.call()
            processor, found = (time.process_time() - processor) / count, (clock() - start) / count
        calls.setdefault(candidate.provider, max(1, round(SHORTEST / max(found, 1e-9))))
        return lambda: (found / candidate.calls, processor / candidate.calls)

    return sample


def facts(times: dict[str, Times], provider: str) -> dict[str, Any]:
    """A row's fields about a candidate's times: microseconds, and ratios to every other candidate of the run.

    ratios, processor_ratios: provider -> [20th percentile, median, 80th percentile] over the rounds. intervals: provider ->
    [least, largest] of the median with a confidence of 95 %.
    """
    mine = times[provider]
    others = {name: each for name, each in times.items() if name != provider}
    low, middle, high = (round(1e6 * value, 3) for value in mine.quantiles())
    found: dict[str, Any] = {"median_us": middle, "p20_us": low, "p80_us": high, "repeats": len(mine.samples)}
    found["ratios"] = {name: [round(value, 4) for value in mine.ratio(each)] for name, each in others.items()}
    found["intervals"] = {name: [round(value, 4) for value in mine.interval(each)] for name, each in others.items()}
    by_processor = {name: mine.processor_ratio(each) for name, each in others.items()}
    known = {name: [round(value, 4) for value in each] for name, each in by_processor.items() if each is not None}
    return {**found, "processor_ratios": known} if known else found
