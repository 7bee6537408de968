"""Who takes part: every backend of ours, the library's attention kernels, `torch.compile` of the plain formula, and the expert.

A contestant that cannot run a call is in its rows all the same, with the reason in place of times.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import formulas
from bench.timing import Contestant
from perfusion_kernels import backend
from tests.kernels import cases

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def ours(operator: str, arguments: Mapping[str, Tensor | None], form: str = "", **options) -> Iterator[Contestant]:
    """One per backend; `form` stands behind its name."""
    for name in backend.ORDER:
        call = functools.partial(cases.PUBLIC[operator], **arguments, **options, backend=name, validate=False)
        device = next(tensor.device for tensor in arguments.values() if tensor is not None)
        interpreted = name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        yield Contestant(f"{name}{form}", call, "Triton's interpreter is for tests" if interpreted else "", on_graph=name != "reference")


def formula(operator: str, positional: tuple) -> Iterator[Contestant]:
    """The plain formula as it stands, as torch.compile makes it, and as the expert writes it."""
    plain, expert = getattr(formulas, operator), getattr(formulas, f"expert_{operator}")
    yield Contestant("eager", functools.partial(plain, *positional))
    # every problem is compiled for its own shapes alone, so none of them counts against the limit of the others
    yield Contestant("compile", functools.partial(torch.compile(_fresh(plain), dynamic=False), *positional))
    yield Contestant("expert", functools.partial(expert, *positional), on_graph=True)


def _fresh(function: Callable) -> Callable:
    """The same function with a code object of its own: torch.compile counts its versions by that."""
    return type(function)(function.__code__.replace(), function.__globals__, function.__name__)


def library(call: Callable[[], Tensor]) -> Iterator[Contestant]:
    """A call that holds one `scaled_dot_product_attention`, on each of its kernels alone."""
    for name, kernel in SDPA.items():
        yield Contestant(f"sdpa {name}", call, context=functools.partial(sdpa_kernel, kernel))


def with_graphs(contestants: list[Contestant]) -> list[Contestant]:
    """The contestants, and each that asks for it once more as a CUDA graph: launches then cost nothing."""
    found = []
    for contestant in contestants:
        found.append(contestant)
        if contestant.on_graph:
            found.append(Contestant(f"{contestant.provider} graph", _Graphed(contestant), contestant.reason))
    return found


class _Graphed:
    """Captures at the first call and replays at all."""

    def __init__(self, contestant: Contestant):
        self.contestant, self.graph, self.result = contestant, None, None

    def __call__(self) -> object:
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.contestant.call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = self.contestant.call()
            self.graph = graph
        self.graph.replay()
        return self.result


def attempt(contestant: Contestant) -> tuple[object, str]:
    """What the contestant gives, or None and why it gives nothing."""
    if contestant.reason:
        return None, contestant.reason
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with contestant.context():
                return (contestant.check or contestant.call)(), ""
        except Exception as error:  # whatever a library raises for a call that it does not take
            texts = [str(error), *(str(each.message) for each in said)]
    lines = dict.fromkeys(line for text in texts for line in [" ".join(text.split("(Triggered internally")[0].split())[:300]] if line)
    return None, "; ".join(lines) or "it raised an error without a message"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
