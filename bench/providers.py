"""The candidates: every backend of ours, the library's attention kernels, `torch.compile` of the plain formula, and the expert.

A candidate that cannot run a call still has its row, with the reason instead of times.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import formulas
from bench.timing import Candidate
from perfusion_kernels import backend
from tests.kernels import cases

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


WITHOUT_DEPENDENT_LAUNCH = " without dependent launch"  # which the library reads from the environment once, so a process has one of both


def ours(operator: str, arguments: Mapping[str, Tensor | None], form: str = "", **options) -> Iterator[Candidate]:
    """One per backend; `form` is appended to its name, with the features of the compiled kernels that the environment disables."""
    device = next(tensor.device for tensor in arguments.values() if tensor is not None)
    for name in backend.ORDER:
        call = functools.partial(cases.PUBLIC[operator], **arguments, **options, backend=name, validate=False)
        left_out = WITHOUT_DEPENDENT_LAUNCH if name == "cuda" and os.environ.get("PERFUSION_DEPENDENT_LAUNCH") == "0" else ""
        yield Candidate(f"{name}{form}{left_out}", call, interpreted(name, device), on_graph=name != "reference")


def interpreted(name: str, device: torch.device) -> str:
    """Why a backend is not timed on a device where it only pretends to run, or nothing."""
    of_triton = name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return "Triton's interpreter is for tests" if of_triton else ""


def formula(operator: str, positional: tuple, modes: Sequence[str] = ("default",)) -> Iterator[Candidate]:
    """The plain formula in eager mode, compiled by torch.compile in each of `modes`, and the expert's."""
    plain, expert = getattr(formulas, operator), getattr(formulas, f"expert_{operator}")
    yield Candidate("eager", functools.partial(plain, *positional))
    for mode in modes:
        compiled = _compiled(plain, mode, tuple(map(_signature, positional)))
        yield Candidate(compiled_name(mode), functools.partial(compiled, *positional), on_graph=True)
    yield Candidate("expert", functools.partial(expert, *positional), on_graph=True)


def compiled_name(mode: str) -> str:
    return "compile" if mode == "default" else f"compile {mode}"


@functools.cache
def _compiled(plain: Callable, mode: str, signature: tuple) -> Callable:
    """The formula compiled for one problem's shapes: once, however many copies of its tensors are called; graphs are captured elsewhere.

    Each has a code object of its own, by which torch.compile counts its versions: so none counts against the limit of the others.
    """
    own = type(plain)(plain.__code__.replace(), plain.__globals__, plain.__name__)
    return torch.compile(own, dynamic=False, mode=f"{mode}-no-cudagraphs" if mode == "max-autotune" else mode)


def _signature(argument: object) -> object:
    """What code is compiled for: all of a tensor except its values."""
    if not isinstance(argument, Tensor):
        return argument
    return tuple(argument.shape), argument.stride(), argument.dtype, str(argument.device)


def library(call: Callable[[], Tensor]) -> Iterator[Candidate]:
    """A call that holds one `scaled_dot_product_attention`, on each of its kernels alone."""
    for name, kernel in SDPA.items():
        yield Candidate(f"sdpa {name}", call, context=functools.partial(sdpa_kernel, kernel), on_graph=True)


CALLS = 20  # that a graph holds: with one, the launch of the graph is what is measured


def with_graphs(candidates: list[Candidate], copies: Sequence[list[Candidate]] = ()) -> list[Candidate]:
    """The candidates, and those with `on_graph` once more as a CUDA graph of 20 calls, in which launches cost little.

    copies: the same candidates with tensors of their own, so that a call finds in L2 no more than a first one would: the calls
    of a graph go through them in turn.
    """
    found = []
    for number, candidate in enumerate(candidates):
        found.append(candidate)
        if candidate.on_graph:
            calls = [candidate.call, *(each[number].call for each in copies)]
            graph = _Graphed(calls, candidate.context)
            check = candidate.check or (lambda *_, graph=graph: graph.first())
            found.append(Candidate(f"{candidate.provider} graph", graph, candidate.reason, check=check, calls=CALLS))
    return found


class _Graphed:
    """Captures at the first call, and replays at every call."""

    def __init__(self, calls: Sequence[Callable[[], object] | None], context: Callable[[], contextlib.AbstractContextManager]):
        self.calls, self.context, self.graph, self.result = calls, context, None, None

    def first(self) -> object:
        """Replays, and gives the result of the graph's first call."""
        self()
        return self.result

    def __call__(self) -> None:
        if self.graph is None:
            with self.context():
                self._capture()
        self.graph.replay()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in [*self.calls, *self.calls[:1] * 2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [self.calls[number % len(self.calls)]() for number in range(CALLS)]
            self.result = results[0]  # kept, so that no later call of the graph writes there
        self.graph = graph


def attempt(candidate: Candidate) -> tuple[object, str, str]:
    """The candidate's result; or None, the reason, and the name of the exception."""
    if candidate.reason:
        return None, candidate.reason, ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with candidate.context():
                call = candidate.call
                return candidate.check(call, candidate.calls) if candidate.check else call(), "", ""
        except Exception as error:  # whatever a library raises for a call that it does not take
            kind, texts = type(error).__name__, [str(error), *(str(each.message) for each in said)]
    lines = dict.fromkeys(line for text in texts for line in [" ".join(text.split("(Triggered internally")[0].split())[:300]] if line)
    return None, "; ".join(lines) or "it raised an error without a message", kind


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
