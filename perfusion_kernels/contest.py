"""Two or more ways to compute one result, timed against each other: who is wrong takes no part, and the others take turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Call = Callable[[], Tensor]
Measure = Callable[[Call], float]  # time of a call, in any unit

ROUNDS = (15, 100)  # at least, at most
SECONDS = 0.3  # for each contestant, within these limits
SHORTEST = 2e-4  # seconds of a sample on a CPU, so that reading the clock costs nothing beside it
FLUSH = 256 * 2**20  # bytes, more than the L2 cache of any GPU
FACTOR = 4.0  # times the plain formula's own error, as in the tests


def admit(contestants: Mapping[str, Call], plain: Tensor, exact: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """Those whose result is right, and why the others take no part.

    plain [B, ...]: what the plain formula gives in the dtype that is measured. exact [B, ...]: the result in float64. A result
    is right if in every batch row its error is at most four times that of the plain formula, and one rounding of the row's
    largest value.
    """
    right, reasons = {}, {}
    bound = FACTOR * _largest(plain.double() - exact) + torch.finfo(plain.dtype).eps * _largest(exact)
    for name, call in contestants.items():
        try:
            result = call()
        except Exception as error:  # whatever a backend or a compiler raises for what it cannot do
            reasons[name] = f"failed: {type(error).__name__}: {error}"
            continue
        error = _largest(result.double() - exact)
        if not (error <= bound).all():  # NaN is not <= anything
            reasons[name] = f"gave a wrong result: error {error.max().item():.3g}, and {bound.max().item():.3g} is allowed"
            continue
        right[name] = call
    return right, reasons


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().flatten(1).amax(1)


def ratios(first: str, contestants: Mapping[str, Call], device: torch.device, measure: Measure | None) -> tuple[dict[str, float], int]:
    """The time of `first` over that of each other, the median over rounds in which each was measured once; how many rounds."""
    measure = measure or (_on_host if device.type == "cpu" else _on_gpu(device))
    for call in contestants.values():  # compiled and warm
        measure(call)
    times = {name: [] for name in contestants}
    start, rounds = time.perf_counter(), 0
    while rounds < ROUNDS[0] or (rounds < ROUNDS[1] and time.perf_counter() - start < SECONDS * len(contestants)):
        for name in times if rounds % 2 else reversed(times):
            times[name].append(measure(contestants[name]))
        rounds += 1
    others = [name for name in times if name != first]
    return {name: statistics.median(mine / its for mine, its in zip(times[first], times[name])) for name in others}, rounds


def _on_host(call: Call) -> float:
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SHORTEST or not calls:
        call()
        calls += 1
    return passed / calls


def _on_gpu(device: torch.device) -> Measure:
    api = getattr(torch, device.type)
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def measure(call: Call) -> float:
        """Between two events, behind a write that empties the L2 cache and keeps the device busy while the call is issued."""
        with api.device(device):
            begin, end = api.Event(enable_timing=True), api.Event(enable_timing=True)
            flush.fill_(1)
            begin.record()
            call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end)

    return measure
