"""Selects the tile sizes of a launch: the first of its list, or the fastest from the user's cache if it was tuned.

An ordinary call measures nothing. Inside `with tuning():` each launch times its whole list and keeps the fastest; on exit the
choices are written to a file of the user's cache, which later processes read. A warm-up is therefore ordinary calls at the
expected shapes:

    with tuning() as chosen:
        concept_gates(...)
    print(chosen)

A file belongs to one kind of GPU and one version of Triton. A launch is identified by its kernel's name and a key of
sizes and dtypes, on which its speed depends.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from .. import user_cache

Configuration = dict[str, int]  # tile sizes, num_warps, num_stages

Choices = dict[str, dict[str, Configuration]]  # kind of device -> launch -> configuration

_measure: Callable[[Callable[[], object]], float] | None = None  # time of a call; None: nothing is measured
_tuned: Choices = {}  # choices of the current `tuning()`


def launch(
    kernel: str,
    key: tuple,
    device: torch.device,
    configurations: Sequence[Configuration],
    run: Callable[[Configuration], object],
    trial: Callable[[Configuration], object] | None = None,
) -> None:
    """Calls `run(configuration)` with the tuned configuration, or with the first one if there is none.

    kernel, key: identify the launch; with the device's kind they identify a choice.
    configurations: a short list, the default for this key first.
    trial: timed instead of `run` where `run` works in place and must not be called twice.
    """
    with _current(device):
        run(_choice(kernel, key, device, configurations, trial or run))


def _choice(kernel: str, key: tuple, device: torch.device, configurations: Sequence[Configuration], trial) -> Configuration:
    kind = user_cache.kind(device)
    choices = known(kind)
    if not choices and _measure is None:  # the common case, without building a name
        return configurations[0]
    name = f"{kernel} {' '.join(map(str, key))}"
    if _measure is not None and name not in _tuned.setdefault(kind, {}):
        choices[name] = _tuned[kind][name] = _fastest(configurations, trial)
    configuration = choices.get(name)
    # a file may hold a configuration that is no longer in the list
    return configuration if configuration in configurations else configurations[0]


def _current(device: torch.device):
    """Triton launches on the current device, whichever the tensors are on."""
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else nullcontext()


def _fastest(configurations: Sequence[Configuration], run: Callable[[Configuration], object]) -> Configuration:
    times = {}
    for position, configuration in enumerate(configurations):
        try:
            times[position] = _measure(lambda: run(configuration))
        except OutOfResources:  # not enough shared memory or registers on this device
            continue
    return configurations[min(times, key=times.get, default=0)]


@contextmanager
def tuning(measure: Callable[[Callable[[], object]], float] | None = None) -> Iterator[Choices]:
    """Inside the `with`, launches time their configurations; yields the choices.

    measure: returns the time of a call, in any unit. None: Triton's `do_bench`, the median with L2 flushed before each run.
    """
    global _measure, _tuned
    before = _measure, _tuned
    _measure, _tuned = measure or (lambda call: triton.testing.do_bench(call, return_mode="median")), {}
    try:
        yield _tuned
    finally:
        for kind in _tuned:
            user_cache.write(path(kind), known(kind))
        _measure, _tuned = before


@cache
def known(kind: str) -> dict[str, Configuration]:
    """The choices for one kind of device, from its file; none where there is no readable file."""
    try:
        read = json.loads(path(kind).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def path(kind: str) -> Path:
    return user_cache.path(f"triton-{triton.__version__}", kind)
