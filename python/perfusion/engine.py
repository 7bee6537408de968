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

import itertools
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfusion.attention_processor import FUSED, SCHEDULE, SLOTS, STOCK, AttentionState, ConceptAttnProcessor
from perfusion.base import UnsupportedPipeline, cross_attention_layers, layer_width
from perfusion.batch_plan import Client, GivenRows, Plan
from perfusion.batched_projection import BatchedProjection, layer_obstacle, obstacle
from perfusion.denoiser_call import DenoiserCall, load
from perfusion.edit import edit_encodings, gates_of, spread
from perfusion.layer_state import offloaded_block, projection_stamp
from perfusion.projection_hooks import HookEdit, ProjectionHooks, hook_edit
from perfusion.regions import key_regions, query_regions
from perfusion.slots import Slots
from perfusion.unet_graphs import CudaRecorder, Recorder, UNetGraphs

__all__ = ["Client", "Engine", "GivenRows", "engine_of"]

# processors whose work ours does: the rest keep their place, and concepts take the compatibility path
REPLACED = ("AttnProcessor", "AttnProcessor2_0")
CHANGING = 3  # forwards in a row with new encodings, after which they are taken to change at every step

_ENGINES: Any = weakref.WeakKeyDictionary()


def engine_of(unet: torch.nn.Module) -> Engine:
    """The engine of a UNet, the same for all pipelines that share it."""
    if unet not in _ENGINES:
        _ENGINES[unet] = Engine(unet)
    return _ENGINES[unet]


class Engine:
    """Of one UNet, from the first client's `add` to the last one's `remove`. Forwards of several threads wait for each other."""

    def __init__(self, unet: torch.nn.Module):
        self._unet = weakref.ref(unet)
        self.layers, self._call = cross_attention_layers(unet), DenoiserCall(unet)
        self.clients: list[Client] = []
        self.state = AttentionState()
        self.slots: Slots | None = None
        self.by_index: bool | None = None  # whether rows read slots by a device index; None: on accelerators
        self.form, self.reason = STOCK, "no forward yet"
        self.counts = {STOCK: 0, SLOTS: 0, SCHEDULE: 0, FUSED: 0, "hooks": 0}  # forwards of the UNet by form
        self.step = -1
        self._hooks = ProjectionHooks(unet, self._hook_edit, driven=True)
        self._processors: list[tuple[Any, ConceptAttnProcessor]] = []
        self._batched: BatchedProjection | None = None
        self._stamp: tuple[Any, ...] = ()
        self._text_stamp: tuple[Any, ...] = ()
        self._plans: Any = WeakTensorKeyDictionary()
        self._held: Any = WeakTensorKeyDictionary()  # encodings -> their concepts, which stay where they are whatever is computed anew
        self._numbers = itertools.count()
        self._index: dict[int, Tensor] = {}
        self._changed = 0
        self._timestep: float | None = None
        self._shown: Any = None  # (plan, kind) of the keys and values that the layers read
        self._gates_of: Any = None  # (plan, step) of the gates
        self._tables_of: Plan | None = None
        self._closed: str | None = None
        self._lock, self._depth = threading.RLock(), 0
        self._handles: list[Any] = []
        self._given: GivenRows | None = None
        self._graphs: UNetGraphs | None = None
        self._recent = threading.local()
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: Any) -> Engine:
        raise RuntimeError("a UNet with perfusion attached cannot be copied: perfusion.detach(pipe), copy, and attach to both.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a UNet with perfusion attached cannot be pickled: perfusion.detach(pipe) first.")

    @property
    def unet(self) -> torch.nn.Module:
        return self._unet()

    # clients

    def add(self, client: Client) -> None:
        """A pipeline begins to use the UNet with concepts."""
        if not self.clients:
            begin = self.unet.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._handles = [begin, self.unet.register_forward_hook(self._end, always_call=True)]
        self.clients.append(client)
        if client.exact and not self._hooks.installed:
            self._hooks.install()

    def remove(self, client: Client) -> None:
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
            self.slots = self._batched = None
            self._stamp = ()
            self.state.__init__()
        self.follow()

    def follow(self) -> None:
        """Own processors are in place exactly while a concept is loaded."""
        if self._given is not None or any(client.has_concepts() for client in self.clients):
            if not self._processors and self._replaceable() is None:
                for number, layer in enumerate(self.layers.values()):
                    own = ConceptAttnProcessor(layer.processor, self.state, number)
                    self._processors.append((layer, own))
                    layer.processor = own
        else:
            for layer, own in self._processors:
                if layer.processor is own:  # what somebody else put there is theirs
                    layer.processor = own.stock
            self._processors = []

    def begin_prompt(self, client: Client) -> None:
        """A client encodes a prompt in this thread: its requests go before those of others, and steps count anew."""
        self._recent.client = client
        self.begin_run()

    def begin_run(self) -> None:
        """Steps count from 0 again."""
        self._changed, self._timestep, self.step = 0, None, -1

    def use_graphs(self, recorder: Recorder | None = None) -> None:
        """Record the UNet's forward as graphs and replay them. Without CUDA it says so, and the UNet runs as it is until it is there."""
        recorder = CudaRecorder() if recorder is None else recorder
        device = next(self.unet.parameters()).device
        if device.type != recorder.kind:
            warnings.warn(f"graphs=True needs the UNet on a CUDA device, and it is on {device}: it runs without graphs.", stacklevel=4)
        if self._graphs is None:
            self._graphs = UNetGraphs(self.unet, self.state, lambda: [own for _, own in self._processors], recorder)
            self._graphs.install()

    def forget(self) -> None:
        """Compute everything anew: concepts or settings have changed."""
        with self._lock:
            self._plans.clear()
            self._hooks.forget()
            self._changed = -1  # the next tensor is no new encoding
            self._forget_slots()

    def _forget_slots(self) -> None:
        self._shown = self._gates_of = self._tables_of = None
        for plan in self._plans.values():
            plan.shown = None
        if self.slots is not None:
            self.slots.clear()

    def memory(self) -> dict[str, int]:
        """Bytes that are held: slots, the layers' weights as one matrix, edits, recorded graphs."""
        batched = self._batched
        weights = 0 if batched is None else batched.key_weight.nbytes + batched.value_weight.nbytes
        tables = sum(each.nbytes for each in (self.state.gates, self.state.components) if each is not None)
        graphs = 0 if self._graphs is None else self._graphs.nbytes
        return {"slots": 0 if self.slots is None else self.slots.nbytes, "weights": weights, "edit": tables, "graphs": graphs}

    def keys_values(self, encodings: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Edited K and V [R, T, O] of all layers, side by side, of encodings [R, T, D] at a step; no forward is run.

        For a UNet elsewhere that takes them as inputs (`perfusion.export`). Rows without a concept have the plain ones.
        """
        with self._lock, torch.no_grad():
            self._follow_weights(encodings.device.type)
            self._hooks.asleep = True  # those on to_k and to_v, which are called here
            plan, before = self._plan(encodings), self.step
            if not plan.rows:
                return self._project(*[self._call.text(encodings)] * 2)
            try:
                self.step = step
                distinct = list(dict.fromkeys(plan.contents))
                keys, values = self._edited(plan, encodings, distinct)
            finally:
                self.step = before
            where = torch.tensor([distinct.index(row) for row in plan.contents], device=keys.device)
            return keys[where], values[where]

    def give(self, rows: GivenRows | None) -> None:
        """What all forwards read from now on, whatever their encodings hold, until None: then the engine looks at encodings again.

        For a batch whose rows come and go between steps: each row's keys and values are made once (`keys_values`) and kept by
        whoever owns the row. UnsupportedPipeline where the layers cannot read them.
        """
        changed = (rows is None) != (self._given is None)
        self._given = rows
        if changed:
            self.follow()
            if rows is not None and (not self._processors or self._processors_replaced()):
                self._given = None
                raise UnsupportedPipeline(f"keys and values cannot be given to this UNet: {self._blocked()}.")

    def _show_given(self, rows: GivenRows) -> None:
        widths = [layer_width(layer) for layer in self.layers.values()]

        def split(table: Tensor) -> list[Tensor]:
            return [piece.unflatten(-1, (layer.heads, -1)) for piece, layer in zip(table.split(widths, -1), self.layers.values())]

        state = self.state
        state.keys, state.values, state.slots = split(rows.keys), split(rows.values), None
        state.query_regions, state.key_regions, state.form = rows.query_regions, rows.key_regions, SLOTS
        self._shown = self._gates_of = None
        self._count(SLOTS, "keys and values were given")
        for _, own in self._processors:
            own.follow()

    # one forward

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._lock.acquire()
        self._depth += 1
        self.state.form, self._hooks.asleep = STOCK, True
        if self._given is not None:
            self._show_given(self._given)
            return
        encodings = self._call.encodings(args, kwargs)
        if encodings is None or not any(client.has_concepts() for client in self.clients):
            self._count(STOCK, "no concept is loaded")
            return
        plan = self._plan(encodings)
        if not plan.rows:
            self._count(STOCK, "no row of the batch has a concept")
            return
        if plan.scheduled:
            self._count_step(self._call.argument("timestep", args, kwargs))
        reason = self._obstacle(plan, encodings) or self._call.mask_obstacle(args, kwargs, encodings)
        if reason is None:
            self._fast(plan, encodings, self._call.size(args, kwargs), self._call.padding(args, kwargs, encodings))
        else:
            self._compatible(plan, encodings, reason)

    def _compatible(self, plan: Plan, encodings: Tensor, reason: str) -> None:
        if plan.regional:
            raise ValueError(f"regions need the fast path, and it is closed: {reason}. Remove what closes it, or leave the regions out.")
        if not self._hooks.installed:
            if any(client.compiled() for client in self.clients):
                raise UnsupportedPipeline(
                    f"the UNet is compiled, and this needs hooks in it ({reason}): attach with exact=True, and compile then."
                )
            self._hooks.install()
        if self._processors_replaced() and "processors" not in self._warned:
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
        if self._timestep is None or value > self._timestep:
            self.step = 0
        elif value < self._timestep:
            self.step += 1
        self._timestep = value

    def _plan(self, encodings: Tensor) -> Plan:
        known = self._plans.get(encodings)
        if known is not None and known.is_of(encodings):
            self._changed = 0
            return known
        self._changed += 1
        plan = Plan(encodings, next(self._numbers))
        recent = getattr(self._recent, "client", None)
        for client in sorted(self.clients, key=lambda client: client is not recent):
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
        path = {
            STOCK: "The pipeline's own attention ran",
            SLOTS: "Keys and values were read from slots",
            SCHEDULE: "The edit of the step was applied as keys and values were loaded",
            FUSED: "Projection, edit and attention ran in one call",
            "hooks": "The compatibility path ran: hooks on to_k and to_v",
        }
        sentences = [f"{path[self.form]}: {self.reason}."]
        sentences.append(self._outlook(self._blocked(), obstacle(self.unet, frozen=False)))
        if self._graphs is not None:
            why = self._graphs.reason
            sentences.append("The UNet was replayed as a graph." if why is None else f"The UNet ran without a graph: {why}.")
        return sentences

    def layer_paths(self) -> dict[str, tuple[str, str]]:
        """layer -> the path that a concept takes in it, "slots" or "hooks", and why, in the sentences of `explain`."""
        blocked = self._blocked() if self._processors else self._replaceable() or self._offloaded()
        taken = self._taken()
        called, first = obstacle(self.unet, frozen=False), next(iter(self.layers.values()))
        found = {}
        for name, layer in self.layers.items():
            own = layer_obstacle(name, layer, first, frozen=False) or called
            sentence = self._outlook(blocked and (taken.get(name) or _processor_obstacle(name, layer) or blocked), own)
            found[name] = ("slots" if blocked is None else "hooks"), sentence
        return found

    @staticmethod
    def _outlook(blocked: str | None, called: str | None) -> str:
        if blocked is not None:
            return f"The fast path is closed: {blocked}."
        if called is not None:
            return f"Projections are called layer by layer, once per prompt: {called}."
        return "Projections of all layers are two products, once per prompt."

    def _replaceable(self) -> str | None:
        return next(filter(None, (_processor_obstacle(name, layer) for name, layer in self.layers.items())), None)

    def _processors_replaced(self) -> bool:
        return any(layer.processor is not own for layer, own in self._processors)

    def _blocked(self) -> str | None:
        """What closes the fast path for every batch."""
        if not self._processors:
            return self._replaceable() or (None if any(client.has_concepts() for client in self.clients) else "no concept is loaded")
        return next(iter(self._taken().values()), None) or self._offloaded()

    def _taken(self) -> dict[str, str]:
        """The layers whose processor is ours no more, and a sentence of each."""
        replaced = {name: layer.processor for name, (layer, own) in zip(self.layers, self._processors) if layer.processor is not own}
        return {name: f"layer {name} was given another processor, {type(each).__name__}" for name, each in replaced.items()}

    def _offloaded(self) -> str | None:
        block = offloaded_block(self.unet)
        return None if block is None else f"{block} is offloaded as a block"

    def _obstacle(self, plan: Plan, encodings: Tensor) -> str | None:
        """Why a batch takes the compatibility path, or None."""
        if not self._processors:
            self.follow()
        if plan.client.exact and len(plan.rows) < len(encodings):
            return "exact=True, and some rows have no concept"
        if torch.is_grad_enabled() and (encodings.requires_grad or getattr(self.unet, "is_gradient_checkpointing", False)):
            return "gradients of the encodings, or checkpointed ones, are wanted"
        if self._processors_replaced() or not self._processors:
            return self._blocked()
        self._follow_weights(encodings.device.type)
        return self._closed

    def _follow_weights(self, kind: str) -> None:
        """Everything that was made from the layers' weights, anew where these have changed. kind: of the device."""
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        stamp = (autocast, *projection_stamp(list(self.layers.values())), *self._call.stamp())
        if stamp != self._stamp:
            self._stamp, self._batched = stamp, None
            self._closed = self._blocked()
            self._forget_slots()
            if self._closed is None and obstacle(self.unet, frozen=False) is None:
                self._batched = BatchedProjection(self.unet, frozen=False)

    # the fast path

    def _fast(self, plan: Plan, encodings: Tensor, size: tuple[int, int], padding: Tensor | None) -> None:
        with torch.no_grad():
            masked = plan.regional or padding is not None
            fusable = self._batched is not None and not self._batched.biased and not (masked or plan.locked)
            if self._changed >= CHANGING and fusable:
                self._fuse(plan, encodings)
                form, reason = FUSED, "the encodings change at every step"
            elif plan.scheduled and not plan.locked:
                self._fill(plan, encodings, ("unedited", 0), self._unedited)
                self._edit_step(plan, encodings)
                form, reason = SCHEDULE, "a setting follows the steps"
            else:
                self._write(plan, encodings)
                form, reason = SLOTS, "the prompt stays the same over the steps"
            self.state.query_regions = self.state.key_regions = None
            if masked:
                if not plan.regions or plan.regions[0] != size or plan.regions[1] is not padding:
                    queries = query_regions(plan.rows, len(encodings), size, encodings.device)
                    keys = key_regions(plan.rows, encodings.shape[:2], encodings.device, padding)
                    plan.regions = (size, padding, queries, keys)
                self.state.query_regions, self.state.key_regions = plan.regions[2:]
        self._count(form, reason)
        self.state.form = form
        for _, own in self._processors:
            own.follow()

    def _write(self, plan: Plan, encodings: Tensor) -> None:
        """Edited keys and values of the batch into slots, unless they are there."""
        step = max(self.step, 0) if plan.scheduled else 0
        self._fill(plan, encodings, ("edited", step), self._edited)

    def _edited(self, plan: Plan, encodings: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Edited K and V [n, T, O] of some rows."""
        settings, tables = plan.settings(rows, self.step, encodings.device), plan.tables_on(encodings.device)
        text = self._call.text(encodings)
        edited = edit_encodings(text[rows].detach(), tables, settings)
        for place, row in enumerate(rows):
            request = plan.rows.get(row)
            if request is not None and request.key_encoding is not None:
                edited.keys[place] = self._call.row(request.key_encoding, encodings).to(edited.keys)
                if edited.key_gates is not None:
                    edited.key_gates[place] = 0
        if self._batched is not None:
            return self._batched.keys_values(edited, text.dtype, tables, settings.index)
        keys, values = self._project(edited.keys.to(text.dtype), edited.values.to(text.dtype))
        values = values + spread(edited.gates, tables.value_outputs, settings.index).to(values)
        if edited.key_gates is not None:
            keys = keys + spread(edited.key_gates, tables.key_outputs, settings.index).to(keys)
        return keys, values

    def _unedited(self, plan: Plan, encodings: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        chosen = self._call.text(encodings)[rows].detach()
        return self._project(chosen, chosen)

    def _fill(self, plan: Plan, encodings: Tensor, kind: tuple[str, int], compute: Any) -> None:
        """Each row's keys and values into a slot, computed for the distinct rows that are in none, and shown to the layers."""
        if self._shown == (plan, kind):
            return
        length, device = encodings.shape[1], encodings.device
        if self.slots is None or not self.slots.fits(length, device):
            self.slots = Slots(length, [(layer.heads, layer_width(layer)) for layer in self.layers.values()], device)
        contents = [(plan.number, *kind, row) for row in plan.contents]
        plan.slots, missing = self.slots.place(contents)
        if missing:
            plan.shown = None
            try:
                keys, values = compute(plan, encodings, [content[-1] for content in missing])
                self.slots.write(list(missing.values()), keys, values)
            except BaseException:
                self.slots.clear()  # what was promised a place did not get there
                raise
        self._show(plan)
        self._shown = (plan, kind)

    def _show(self, plan: Plan) -> None:
        state, slots = self.state, self.slots
        if self._uses_index(slots.device):
            state.keys, state.values = slots.split(slots.keys), slots.split(slots.values)
            count = len(plan.slots)
            if count not in self._index:
                with torch.inference_mode(False):
                    self._index[count] = torch.zeros(count, dtype=torch.int32, device=slots.device)
                torch._dynamo.mark_static_address(self._index[count])
            self._index[count].copy_(torch.tensor(plan.slots, dtype=torch.int32))
            state.slots = self._index[count]
        else:  # in host memory rows are gathered once per prompt, which saves a copy in each layer at each step
            if plan.shown is None:
                plan.shown = tuple(slots.gathered(table, plan.slots) for table in (slots.keys, slots.values))
            (state.keys, state.values), state.slots = plan.shown, None

    def _show_tables(self, plan: Plan, encodings: Tensor) -> None:
        """W i* and o* of the plan's concepts for every layer."""
        if self._tables_of is plan:
            return
        tables = plan.tables_on(encodings.device)
        dtype = self._call.text(encodings).dtype
        targets, superclasses = (table[None].to(dtype) for table in (tables.targets, tables.superclasses))
        zero = torch.zeros_like(targets[:, :1])  # what a bias adds is no part of W i* and W s
        projected = self._project(torch.cat([targets, superclasses, zero], 1), torch.cat([targets, zero], 1))
        keys, values = (table[:, :-1] - table[:, -1:] for table in projected)
        count = len(plan.names)
        outputs = keys[0, count:]
        if tables.unlocked is not None:
            outputs = torch.where(tables.unlocked[:, None], tables.key_outputs.to(outputs), outputs)
        widths = [layer_width(layer) for layer in self.layers.values()]
        padding = max(plan.least, 1 << (count - 1).bit_length()) - count  # few different shapes, so few compiled graphs

        def split(table: Tensor) -> list[Tensor]:
            return [_any_number(plan, piece, 0) for piece in torch.nn.functional.pad(table, (0, 0, 0, padding)).split(widths, -1)]

        state = self.state
        state.key_outputs, state.key_targets = split(outputs), split(keys[0, :count])
        state.value_outputs, state.value_targets = split(tables.value_outputs.to(outputs)), split(values[0])
        self._tables_of = plan

    def _edit_step(self, plan: Plan, encodings: Tensor) -> None:
        """Gates and components of this step, row by row as the layers read keys and values."""
        self._show_tables(plan, encodings)
        if self._gates_of == (plan, self.step):
            return
        if self._uses_index(encodings.device):
            rows = dict(zip(plan.slots, plan.contents))
            count, where = self.slots.capacity, list(rows)
            chosen = list(rows.values())
        else:
            chosen = list(range(len(plan.contents)))
            count, where = len(chosen), chosen
        settings = plan.settings(chosen, self.step, encodings.device)
        with torch.autocast(encodings.device.type, enabled=False):
            gates, components = gates_of(self._call.text(encodings)[chosen].detach(), plan.tables_on(encodings.device), settings)
        state, shape, at = self.state, (count, *gates.shape[1:]), torch.tensor(where, device=gates.device)
        held = state.gates
        if held is None or (held.shape, held.dtype, held.device) != (shape, gates.dtype, gates.device):
            with torch.inference_mode(False):
                state.gates, state.components = (torch.zeros(shape, dtype=gates.dtype, device=gates.device) for _ in range(2))
                state.index = torch.full((count, shape[-1]), -1, dtype=torch.int32, device=gates.device)
        for table, new in ((state.gates, gates), (state.components, components), (state.index, settings.index)):
            _any_number(plan, table, -1).index_copy_(0, at, new)
        self._gates_of = (plan, self.step)

    def _fuse(self, plan: Plan, encodings: Tensor) -> None:
        """Gates and components of encodings that are new at this step; no row is projected here."""
        self._show_tables(plan, encodings)
        settings = plan.settings(range(len(encodings)), self.step, encodings.device)
        with torch.autocast(encodings.device.type, enabled=False):
            gates, components = gates_of(self._call.text(encodings).detach(), plan.tables_on(encodings.device), settings)
        tables = (_any_number(plan, each, -1) for each in (gates, components, settings.index))
        self.state.gates, self.state.components, self.state.index = tables
        self._gates_of = self._shown = None

    def _project(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [n, T, O] of all layers: two products, or to_k and to_v of every layer called once, with all that is attached to them."""
        if self._batched is not None:
            return self._batched.plain(keys, values)
        load(self.unet)
        pairs = [(layer.to_k(keys), layer.to_v(values)) for layer in self.layers.values()]
        return torch.cat([key for key, _ in pairs], -1), torch.cat([value for _, value in pairs], -1)

    def _uses_index(self, device: torch.device) -> bool:
        return device.type != "cpu" if self.by_index is None else self.by_index

    # the compatibility path

    def _hook_edit(self, encodings: Tensor) -> HookEdit | None:
        plan = self._plan(encodings)
        if not plan.rows:
            return None
        rows = list(plan.rows)
        locked = {row: request.key_encoding for row, request in plan.rows.items() if request.key_encoding is not None}
        key_rows = {row: self._call.row(encoding, encodings) for row, encoding in locked.items()}
        tables = plan.tables_on(encodings.device)
        settings = plan.settings(rows, self.step, encodings.device)
        return hook_edit(self._call.text(encodings), torch.tensor(rows, device=encodings.device), tables, settings, key_rows)


def _any_number(plan: Plan, table: Tensor, dim: int) -> Tensor:
    """Where the UNet is compiled: say that a table holds any number of concepts, so that one graph serves all."""
    if plan.least > 1:
        torch._dynamo.maybe_mark_dynamic(table, dim % table.dim())
    return table


def _processor_obstacle(name: str, layer: torch.nn.Module) -> str | None:
    """Why the processor of a layer cannot give way to ours, or None."""
    processor = layer.processor.stock if type(layer.processor) is ConceptAttnProcessor else layer.processor
    if type(processor).__name__ not in REPLACED:
        return f"layer {name} has a processor of its own, {type(processor).__name__}"
    if layer.residual_connection or layer.rescale_output_factor != 1 or layer.norm_cross:
        return f"layer {name} does more than attention"
    if any(getattr(layer, part, None) is not None for part in ("spatial_norm", "group_norm", "norm_q", "norm_k")):
        return f"layer {name} normalises"
    return None
