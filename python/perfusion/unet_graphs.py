"""`UNetGraphs`: the UNet's step as CUDA graphs, one per form and shapes of its arguments, replayed across prompts and concepts.

A graph has addresses and numbers of its recording in it. So what a call is given is copied to where the recording read it; keys, values
and slots have fixed addresses already, which are part of what a graph is known by; and whatever else the UNet computes with
(`UNetWatch`) forgets all graphs when it changes. A call that a graph cannot stand for runs as it is, and `reason` says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from perfusion.attention_processor import SCHEDULE, STOCK, AttentionState, ConceptAttnProcessor
from perfusion.unet_watch import UNetWatch

__all__ = ["CudaRecorder", "Graph", "Recorder", "UNetGraphs"]

MOST = 8  # graphs that are kept, least recently used first to go
WARM_UPS = 3  # calls before a recording, in which libraries choose and kernels are tuned


class Graph(Protocol):
    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recorder(Protocol):
    """What makes graphs on devices of a kind, so that tests can do it without a GPU."""

    kind: str

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Graph, Any]:
        """A graph of what `run` does, and what it returned: tensors that each replay writes anew."""

    def memory(self, device: torch.device) -> int:
        """Bytes that the device has reserved."""


class CudaRecorder:
    """Graphs share memory: of one UNet none runs beside another, and what one returns is copied before the next."""

    kind = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Graph, Any]:
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # other threads may use the device meanwhile: a prompt is encoded, say
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        return graph, result

    def memory(self, device: torch.device) -> int:
        return torch.cuda.memory_reserved(device)


@dataclasses.dataclass(eq=False)
class _Recorded:
    """inputs: where replays read what calls are given. kept: tensors whose addresses are in the graph."""

    graph: Graph
    inputs: list[Tensor]
    output: Any
    kept: list[Tensor]
    nbytes: int


class UNetGraphs:
    """Of one UNet, from `install` to `remove`.

    state, processors: the engine's. `closed`: set by the engine before each forward, why this one cannot be a graph, or None.
    """

    def __init__(
        self, unet: torch.nn.Module, state: AttentionState, processors: Callable[[], Sequence[ConceptAttnProcessor]], recorder: Recorder
    ):
        self._unet, self._state, self._processors, self._recorder = unet, state, processors, recorder
        self._watch = UNetWatch(unet)
        self._stamp: Any = None
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._own, self._before = unet.forward, unet.__dict__.get("forward")
        self.closed: str | None = None
        self.reason = "no forward yet"
        self.recordings = self.replays = 0

    def install(self) -> None:
        self._unet.forward = self._forward

    def remove(self) -> None:
        if self._unet.__dict__.get("forward") == self._forward:
            del self._unet.forward
            if self._before is not None:
                self._unet.forward = self._before
        self.clear()

    def clear(self) -> None:
        """Forget all graphs and free what they hold."""
        for recorded in self._recorded.values():
            recorded.graph.reset()
        self._recorded.clear()

    def __len__(self) -> int:
        return len(self._recorded)

    @property
    def nbytes(self) -> int:
        """What the recordings took of the device, and where they read."""
        return sum(recorded.nbytes for recorded in self._recorded.values())

    @torch.compiler.disable
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._with_timestep_on_device(args, kwargs)
        leaves, shape = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        stamp = self._watch.stamp()
        self.reason = self._obstacle(tensors)
        if self.reason is not None:
            return self._own(*args, **kwargs)
        if stamp != self._stamp:
            self.clear()
            self._stamp = stamp
        fixed, copied = self._state_tensors()
        given = [*tensors, *copied]
        key = self._key(leaves, shape, fixed, copied)
        try:
            recorded = self._recorded.get(key)
        except TypeError:
            self.reason = "an argument of the UNet is neither a tensor nor a plain value"
            return self._own(*args, **kwargs)
        if recorded is None:
            recorded = self._record(key, leaves, shape, given, len(tensors), fixed)
        self._recorded.move_to_end(key)
        for place, tensor in zip(recorded.inputs, given):
            place.copy_(tensor)
        recorded.graph.replay()
        self.replays += 1
        results, form = tree_flatten(recorded.output)
        return tree_unflatten([each.clone() if isinstance(each, Tensor) else each for each in results], form)

    def _with_timestep_on_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A number would be a constant of the graph."""
        if isinstance(kwargs.get("timestep"), (int, float)):
            kwargs = {**kwargs, "timestep": torch.tensor(kwargs["timestep"], device=self._device)}
        elif isinstance(args[1] if len(args) > 1 else None, (int, float)):
            args = (args[0], torch.tensor(args[1], device=self._device), *args[2:])
        return args, kwargs

    @property
    def _device(self) -> torch.device:
        return next(self._unet.parameters()).device

    def _obstacle(self, tensors: Sequence[Tensor]) -> str | None:
        if self._device.type != self._recorder.kind:
            return f"the UNet is on {self._device}"
        if self.closed is not None:
            return self.closed
        if self._watch.obstacle is not None:
            return self._watch.obstacle
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if any(tensor.device != self._device for tensor in tensors if tensor.dim()):
            return "an argument of the UNet is on another device"
        return None

    def _state_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the layers read beside the arguments: tensors of fixed address, and such as a prompt makes anew."""
        state, own = self._state, self._processors()
        if state.form == STOCK:
            return [], []
        fixed = [table for each in own for table in (each.key, each.value)]
        fixed += [] if state.slots is None else [state.slots]
        copied = []
        if state.key_regions is not None:
            copied = [state.key_regions, *(state.query_regions[count] for count in sorted(state.query_regions))]
        if state.form == SCHEDULE:
            fixed += [state.gates, state.components, state.index]
            copied += [table for each in own for table in each.tables]
        return fixed, copied

    def _key(self, leaves: Sequence[Any], shape: Any, fixed: Sequence[Tensor], copied: Sequence[Tensor]) -> Any:
        kind = self._device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        values = tuple(_meta(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
        places = tuple((table.data_ptr(), *_meta(table)) for table in fixed)
        regions = tuple(sorted(self._state.query_regions or ()))
        return self._state.form, autocast, str(shape), values, places, regions, tuple(map(_meta, copied))

    def _record(
        self, key: Any, leaves: Sequence[Any], shape: Any, given: Sequence[Tensor], count: int, fixed: Sequence[Tensor]
    ) -> _Recorded:
        while len(self._recorded) >= MOST:
            self._recorded.popitem(last=False)[1].graph.reset()
        before = self._recorder.memory(self._device)
        with torch.inference_mode(False):  # inference tensors could not be written later
            inputs = [torch.empty_like(tensor, device=self._device).copy_(tensor) for tensor in given]
        own = iter(inputs[:count])
        args, kwargs = tree_unflatten([next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves], shape)
        with self._reading(inputs[count:]), _without_casts_kept(self._device.type):
            graph, output = self._recorder.record(lambda: self._own(*args, **kwargs), self._device)
        nbytes = max(self._recorder.memory(self._device) - before, sum(each.nbytes for each in inputs))
        recorded = self._recorded[key] = _Recorded(graph, inputs, output, list(fixed), nbytes)
        self.recordings += 1
        return recorded

    @contextlib.contextmanager
    def _reading(self, places: Sequence[Tensor]) -> Iterator[None]:
        """The layers read these in place of what a prompt made."""
        state, own = self._state, self._processors()
        before = state.key_regions, state.query_regions, [each.tables for each in own]
        rest = iter(places)
        if state.form != STOCK and state.key_regions is not None:
            state.key_regions = next(rest)
            state.query_regions = {count: next(rest) for count in sorted(state.query_regions)}
        if state.form == SCHEDULE:
            for each in own:
                each.tables = tuple(next(rest) for _ in each.tables)
        try:
            yield
        finally:
            state.key_regions, state.query_regions = before[:2]
            for each, tables in zip(own, before[2]):
                each.tables = tables


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


@contextlib.contextmanager
def _without_casts_kept(kind: str) -> Iterator[None]:
    """Under autocast: weights that were cast before would be constants of the graph."""
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        yield
