"""`Engine`: the concepts at work in one UNet. Before each forward it decides how the layers compute, and gives them what they need.

Nothing here knows of a pipeline: a client (`Handle`, `UNetConcepts`, a server) says which rows of the encodings hold concepts. The
forms are

    stock     no row has a concept, or the compatibility path is taken: the pipeline's own attention, hooks on to_k and to_v
    slots     keys and values of a prompt, computed once for its distinct rows, read by index at every step
    schedule  settings that follow the steps: the edit as keys and values are loaded, no projection after the first step
    fused     encodings that change at every step: projection, edit and attention in one call

and `explain` says in a sentence per reason why a faster one was not taken.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import perfusion_kernels
from perfusion.attention_processor import FUSED, SCHEDULE, SLOTS, STOCK, AttentionState
from perfusion.base import UnsupportedPipeline, cross_attention_layers
from perfusion.batch_plan import Client, GivenRows, Plan
from perfusion.denoiser_call import DenoiserCall
from perfusion.errors import advise
from perfusion.fast_path import FastPath, Forward, offloaded
from perfusion.own_processors import OwnProcessors
from perfusion.path_report import outlook, paths_of, what_ran
from perfusion.projection_hooks import HookEdit, ProjectionHooks, hook_edit
from perfusion.slots import Slots
from perfusion.unet_graphs import CudaRecorder, Recorder, UNetGraphs

__all__ = ["Client", "Engine", "GivenRows", "engine_of"]

CHANGING = 3  # forwards in a row with new encodings, after which they are taken to change at every step

# the operators that look up slots or concepts in a forward of each form, for messages
OPERATORS = {
    SLOTS: "concept_gates, fused_edited_projection, edited_attention",
    SCHEDULE: "concept_gates, edited_attention",
    FUSED: "concept_gates, fused_edited_attention",
    "hooks": "concept_gates",
}

_ENGINES: Any = weakref.WeakKeyDictionary()  # UNet -> a weak reference to its engine, which holds the UNet: what keeps it are its clients
_MAKING = threading.Lock()


def engine_of(unet: torch.nn.Module) -> Engine:
    """The engine of a UNet, the same for all pipelines that share it."""
    with _MAKING:
        engine = _ENGINES[unet]() if unet in _ENGINES else None
        if engine is None:
            engine = Engine(unet)
            _ENGINES[unet] = weakref.ref(engine)
        return engine


class Run(threading.local):
    """What a thread draws: its pipelines' forwards come one after the other, and those of other threads between them.

    client: who encoded the last prompt. changed: forwards in a row with new encodings. timestep: the last one. step: how many before it.
    """

    client: Client | None = None
    changed = 0
    timestep: float | None = None
    step = -1


class Engine:
    """Of one UNet, from the first client's `add` to the last one's `remove`. Forwards of several threads wait for each other."""

    def __init__(self, unet: torch.nn.Module):
        self._unet = weakref.ref(unet)
        self.layers, self._call = cross_attention_layers(unet), DenoiserCall(unet)
        self.clients: list[Client] = []
        self.state = AttentionState()
        self.form, self.reason = STOCK, "no forward yet"
        self.counts = {STOCK: 0, SLOTS: 0, SCHEDULE: 0, FUSED: 0, "hooks": 0}  # forwards of the UNet by form
        self._processors = OwnProcessors(self.layers, self.state)
        self.fast_path = FastPath(unet, self.layers, self._call, self.state, self._processors)
        self._hooks = ProjectionHooks(unet, self._hook_edit, driven=True)
        self._text_stamp: tuple[Any, ...] = ()
        self._plans: Any = WeakTensorKeyDictionary()
        self._held: Any = WeakTensorKeyDictionary()  # encodings -> their concepts, which stay where they are whatever is computed anew
        self._numbers = itertools.count()
        self._run = Run()
        self._lock, self._depth = threading.RLock(), 0
        self._handles: list[Any] = []
        self._given: GivenRows | None = None
        self._graphs: UNetGraphs | None = None
        self._warned: set[str] = set()
        self._device: torch.device | None = None  # where operators ran last

    def __deepcopy__(self, memo: Any) -> Engine:
        raise RuntimeError("a UNet with perfusion attached cannot be copied: perfusion.detach(pipe), copy, and attach to both.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a UNet with perfusion attached cannot be pickled: perfusion.detach(pipe) first.")

    @property
    def unet(self) -> torch.nn.Module:
        return self._unet()

    # clients

    @property
    def between_forwards(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, no other thread is in a forward of the UNet: for changes that a forward must not see half made."""
        return self._lock

    def add(self, client: Client) -> None:
        """A pipeline begins to use the UNet with concepts."""
        with self._lock:
            if not self.clients:
                self._handles = [self.fast_path.install(self._decide), self.unet.register_forward_hook(self._end, always_call=True)]
            self.clients.append(client)
            if client.exact and not self._hooks.installed:
                self._hooks.install()

    def remove(self, client: Client) -> None:
        with self._lock:
            self.clients.remove(client)
            self.forget()
            if not self.clients:
                self._hooks.remove()
                for handle in self._handles:
                    handle.remove()
                self._handles = []
                if self._graphs is not None:
                    self._graphs.remove()
                    self._graphs = None
                self.fast_path.reset()
                self.state.__init__()
            self.follow()

    def follow(self) -> None:
        """Own processors are in place exactly while a concept is loaded."""
        with self._lock:
            if self._given is not None or self._has_concepts():
                self._processors.put()
            else:
                self._processors.take_back()

    def _has_concepts(self) -> bool:
        return any(client.has_concepts() for client in self.clients)

    def begin_prompt(self, client: Client) -> None:
        """A client encodes a prompt in this thread: its requests go before those of others, and steps count anew."""
        self._run.client = client
        self.begin_run()

    def begin_run(self) -> None:
        """Steps count from 0 again."""
        self._run.changed, self._run.timestep, self._run.step = 0, None, -1

    def use_graphs(self, recorder: Recorder | None = None) -> None:
        """Record the UNet's forward as graphs and replay them. Without CUDA it says so, and the UNet runs as it is until it is there."""
        recorder = CudaRecorder() if recorder is None else recorder
        device = next(self.unet.parameters()).device
        if device.type != recorder.kind:
            warnings.warn(f"graphs=True needs the UNet on a CUDA device, and it is on {device}: it runs without graphs.", stacklevel=4)
        if self._graphs is None:
            self._graphs = UNetGraphs(self.unet, self.state, lambda: self._processors.placed, recorder)
            self._graphs.install()

    def forget(self) -> None:
        """Compute everything anew: concepts or settings have changed."""
        with self._lock:
            self._plans.clear()
            self._hooks.forget()
            self._run.changed = -1  # the next tensor is no new encoding
            self.fast_path.forget()

    def check_device(self) -> None:
        """Raises what kernels have noted on the device since the last check: a slot or an index out of range.

        Asked before each forward and after each call of a pipeline. It waits for nothing, so a forward that the device has not
        reached is told of by the next check. RuntimeError says what happened; everything is computed anew after it.
        """
        if self._device is None:
            return
        try:
            perfusion_kernels.check_device(self._device, synchronize=False)
        except RuntimeError as error:
            form, operators = self.form, OPERATORS.get(self.form, "the operators of the last forward with concepts")
            self.forget()
            raise advise(
                RuntimeError(f"What was drawn last may be wrong. The UNet's last form was {form!r} ({operators}), and {error}."),
                python=(
                    "Concepts and settings are as they were, and all that the device reads is written anew: draw again. If it comes "
                    "back, other code writes into memory of this handle; compute-sanitizer names the kernel."
                ),
                command="Run the command again; if it comes back, compute-sanitizer names the kernel.",
            ) from error

    @property
    def slots(self) -> Slots | None:
        """Keys and values of prompts; None before the first."""
        return self.fast_path.slots

    def memory(self) -> dict[str, int]:
        """Bytes that are held: slots, the layers' weights as one matrix, edits, recorded graphs."""
        return {**self.fast_path.memory(), "graphs": 0 if self._graphs is None else self._graphs.nbytes}

    def keys_values(self, encodings: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Edited K and V [R, T, O] of all layers, side by side, of encodings [R, T, D] at a step; no forward is run.

        For a UNet elsewhere that takes them as inputs (`perfusion.export`). Rows without a concept have the plain ones.
        """
        with self._lock, torch.no_grad():
            self.fast_path.follow_weights(encodings.device.type)
            self._hooks.asleep = True  # those on to_k and to_v, which are called here
            return self.fast_path.keys_values(Forward(self._plan(encodings), SLOTS, encodings, step))

    def give(self, rows: GivenRows | None) -> None:
        """What all forwards read from now on, whatever their encodings hold, until None: then the engine looks at encodings again.

        For a batch whose rows come and go between steps: each row's keys and values are made once (`keys_values`) and kept by
        whoever owns the row. UnsupportedPipeline where the layers cannot read them.
        """
        with self._lock:
            changed = (rows is None) != (self._given is None)
            self._given = rows
            if changed:
                self.follow()
                if rows is not None and (not self._processors.placed or self._processors.replaced()):
                    self._given = None
                    raise UnsupportedPipeline(f"keys and values cannot be given to this UNet: {self._blocked()}.")

    # one forward

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        """What the fast path is to prepare for a forward of the UNet; None where the pipeline's own attention runs."""
        self._lock.acquire()
        if not self.clients:  # they left while this thread waited, and the hook that ends the forward with them
            self._lock.release()
            return None
        self._depth += 1
        self.state.form, self._hooks.asleep = STOCK, True
        self.check_device()
        if self._given is not None:
            self._device = self._given.keys.device
            self._count(SLOTS, "keys and values were given")
            self.fast_path.show_given(self._given)
            return None
        encodings = self._call.encodings(args, kwargs)
        if encodings is None or not self._has_concepts():
            self._count(STOCK, "no concept is loaded")
            return None
        plan = self._plan(encodings)
        if not plan.rows:
            self._count(STOCK, "no row of the batch has a concept")
            return None
        self._device = encodings.device
        if plan.scheduled:
            self._count_step(self._call.argument("timestep", args, kwargs))
        reason = self._obstacle(plan, encodings, self._call.lora_scale(args, kwargs)) or self._call.mask_obstacle(args, kwargs, encodings)
        if reason is not None:
            self._compatible(plan, encodings, reason)
            return None
        padding = self._call.padding(args, kwargs, encodings)
        form, reason = self._form(plan, masked=plan.regional or padding is not None)
        self._count(form, reason)
        return Forward(plan, form, encodings, max(self._run.step, 0), self._call.size(args, kwargs), padding)

    def _form(self, plan: Plan, masked: bool) -> tuple[str, str]:
        """How a batch that may take the fast path takes it, and why."""
        if self._run.changed >= CHANGING and self.fast_path.fuses and not (masked or plan.locked):
            return FUSED, "the encodings change at every step"
        if plan.scheduled and not plan.locked:
            return SCHEDULE, "a setting follows the steps"
        return SLOTS, "the prompt stays the same over the steps"

    def _compatible(self, plan: Plan, encodings: Tensor, reason: str) -> None:
        if plan.regional:
            raise ValueError(f"regions need the fast path, and it is closed: {reason}. Remove what closes it, or leave the regions out.")
        if not self._hooks.installed:
            if any(client.compiled() for client in self.clients):
                raise UnsupportedPipeline(
                    f"the UNet is compiled, and this needs hooks in it ({reason}): attach with exact=True, and compile then."
                )
            self._hooks.install()
        if self._processors.replaced() and "processors" not in self._warned:
            self._warned.add("processors")
            warnings.warn(f"perfusion goes on with hooks on to_k and to_v: {reason}.", stacklevel=2)
        self._hooks.asleep = False
        if self._call.projects and torch.is_grad_enabled() and getattr(self.unet, "is_gradient_checkpointing", False):
            raise ValueError("a checkpointed layer runs again when its text is forgotten: call disable_gradient_checkpointing() first.")
        if plan.scheduled or self._text_stamp != (stamp := self._call.stamp()):
            self._text_stamp = self._call.stamp() if plan.scheduled else stamp
            self._hooks.forget()
        self._count("hooks", reason)
        self._hooks.begin(encodings)

    @torch.compiler.disable
    def _end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._depth:
            return
        if not self._hooks.asleep:
            self._hooks.end()
        self.state.form = STOCK
        self._depth -= 1
        self._lock.release()

    def _count(self, form: str, reason: str) -> None:
        self.form, self.reason = form, reason
        self.counts[form] += 1
        if self._graphs is not None:
            compiled = "the UNet is compiled" if any(client.compiled() for client in self.clients) else None
            given = "keys and values were given" if self._given is not None else None
            self._graphs.closed = compiled or given or (f"the form is {form}" if form in (FUSED, "hooks") else None)

    def _count_step(self, timestep: Any) -> None:
        """Steps are the timesteps of a run, which go down. Only schedules count them: reading one may wait for the device."""
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        run = self._run
        if run.timestep is None or value > run.timestep:
            run.step = 0
        elif value < run.timestep:
            run.step += 1
        run.timestep = value

    def _plan(self, encodings: Tensor) -> Plan:
        known = self._plans.get(encodings)
        if known is not None and known.is_of(encodings):
            self._run.changed = 0
            return known
        self._run.changed += 1
        plan = Plan(encodings, next(self._numbers))
        for client in sorted(self.clients, key=lambda client: client is not self._run.client):
            rows = client.rows_of(encodings) if client.has_concepts() else {}
            if rows:
                plan.describe(encodings, client, rows)
                self._held[encodings] = plan.held
                break
        unknown = [row for row in range(len(encodings)) if row not in plan.rows]
        for client in [plan.client] if plan.client is not None else [client for client in self.clients if client.has_concepts()]:
            if unknown:
                client.doubt(encodings, unknown)
        self._plans[encodings] = plan
        return plan

    # which path

    def explain(self) -> list[str]:
        """What the last forward did and why, and what stands in the way of something faster: a sentence each."""
        sentences = [what_ran(self.form, self.reason), outlook(self.unet, self._blocked())]
        if self._graphs is not None:
            why = self._graphs.reason
            sentences.append("The UNet was replayed as a graph." if why is None else f"The UNet ran without a graph: {why}.")
        return sentences

    def layer_paths(self) -> dict[str, tuple[str, str]]:
        """layer -> the path that a concept takes in it, "slots" or "hooks", and why, in the sentences of `explain`."""
        placed = self._processors.placed
        blocked = self._blocked() if placed else self._processors.obstacle() or offloaded(self.unet)
        return paths_of(self.unet, self.layers, self._processors, blocked)

    def _blocked(self) -> str | None:
        """What closes the fast path for every batch."""
        if not self._processors.placed:
            return self._processors.obstacle() or (None if self._has_concepts() else "no concept is loaded")
        return next(iter(self._processors.taken().values()), None) or offloaded(self.unet)

    def _obstacle(self, plan: Plan, encodings: Tensor, lora_scale: float) -> str | None:
        """Why a batch takes the compatibility path, or None."""
        if not self._processors.placed:
            self.follow()
        if plan.client.exact and len(plan.rows) < len(encodings):
            return "exact=True, and some rows have no concept"
        if torch.is_grad_enabled() and (encodings.requires_grad or getattr(self.unet, "is_gradient_checkpointing", False)):
            return "gradients of the encodings, or checkpointed ones, are wanted"
        if self._processors.replaced() or not self._processors.placed:
            return self._blocked()
        self.fast_path.follow_weights(encodings.device.type, lora_scale)
        return self.fast_path.closed

    # the compatibility path

    def _hook_edit(self, encodings: Tensor) -> HookEdit | None:
        plan = self._plan(encodings)
        if not plan.rows:
            return None
        rows = list(plan.rows)
        locked = {row: request.key_encoding for row, request in plan.rows.items() if request.key_encoding is not None}
        key_rows = {row: self._call.row(encoding, encodings) for row, encoding in locked.items()}
        tables = plan.tables_on(encodings.device)
        settings = plan.settings(rows, self._run.step, encodings.device)
        return hook_edit(self._call.text(encodings), torch.tensor(rows, device=encodings.device), tables, settings, key_rows)
