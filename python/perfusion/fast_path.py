"""`FastPath`: gives the layers of one UNet their keys, values and tables before a forward, so that they only have to attend.

It computes what a forward wants and nothing twice: K and V of a prompt once for its distinct rows, in slots; W i* and o* of its
concepts once; gates once, or at each step under a schedule. What a forward wants, and whether this path is open to it, the engine says.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.attention_processor import FUSED, SCHEDULE, SLOTS, AttentionState
from perfusion.base import layer_width
from perfusion.batch_plan import GivenRows, Plan
from perfusion.batched_projection import BatchedProjection, obstacle
from perfusion.denoiser_call import DenoiserCall, load
from perfusion.edit import edit_encodings, gates_of, spread
from perfusion.layer_state import lora_scaled, offloaded_block, projection_stamp
from perfusion.own_processors import OwnProcessors
from perfusion.regions import key_regions, query_regions
from perfusion.slots import Slots

__all__ = ["FastPath", "Forward", "offloaded"]

Args, Kwargs = tuple[Any, ...], dict[str, Any]


@dataclasses.dataclass(eq=False)
class Forward:
    """What one forward of the UNet is to run: one of the forms SLOTS, SCHEDULE and FUSED, at a step of its run, from 0.

    encodings [R, T, D']: what the denoiser was given. size: height and width of the latents. padding [R, T]: bit sets, or None.
    """

    plan: Plan
    form: str
    encodings: Tensor
    step: int
    size: tuple[int, int] = (0, 0)
    padding: Tensor | None = None


class FastPath:
    """closed: what in the UNet closes this path to every batch, read by `follow_weights`; None where it is open."""

    def __init__(
        self,
        unet: torch.nn.Module,
        layers: Mapping[str, torch.nn.Module],
        call: DenoiserCall,
        state: AttentionState,
        processors: OwnProcessors,
    ):
        self._unet, self._layers, self._call, self._state, self._processors = weakref.ref(unet), layers, call, state, processors
        self._widths = [layer_width(layer) for layer in layers.values()]
        self.closed: str | None = None
        self.by_index: bool | None = None  # whether rows read slots by a device index; None: on accelerators
        self.reset()

    def reset(self) -> None:
        """Hold nothing, as before the first forward."""
        self.slots: Slots | None = None
        self._batched: BatchedProjection | None = None
        self._stamp: tuple[Any, ...] = ()
        self._lora_scale = 1.0
        self._index: dict[int, Tensor] = {}
        self._gathered: Any = weakref.WeakKeyDictionary()  # plan -> its keys and values, where rows do not read slots by index
        self.forget()

    def forget(self) -> None:
        """Compute everything anew. What was allocated stays, at its addresses."""
        self._shown: Any = None  # (plan, kind) of the keys and values that the layers read
        self._gates_of: Any = None  # (plan, step) of the gates
        self._tables_of: Plan | None = None
        self._gathered.clear()
        if self.slots is not None:
            self.slots.clear()

    def memory(self) -> dict[str, int]:
        """Bytes that are held: slots, the layers' weights as one matrix, edits."""
        batched = self._batched
        weights = 0 if batched is None else batched.key_weight.nbytes + batched.value_weight.nbytes
        tables = sum(each.nbytes for each in (self._state.gates, self._state.components) if each is not None)
        return {"slots": 0 if self.slots is None else self.slots.nbytes, "weights": weights, "edit": tables}

    def follow_weights(self, kind: str, lora_scale: float = 1.0) -> None:
        """Everything that was made from the layers' weights, anew where these have changed. kind: of the device."""
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._lora_scale = lora_scale
        stamp = (autocast, lora_scale, *projection_stamp(list(self._layers.values())), *self._call.stamp())
        if stamp != self._stamp:
            self._stamp, self._batched, self.closed = stamp, None, offloaded(self._unet())
            self.forget()
            if self.closed is None and obstacle(self._unet(), frozen=False) is None:
                self._batched = BatchedProjection(self._unet(), frozen=False)

    @property
    def fuses(self) -> bool:
        """Whether projection, edit and attention may be one call: where the weights may be read, and nothing is added to what they give."""
        return self._batched is not None and not self._batched.biased

    # before a forward

    def install(self, decide: Callable[[Args, Kwargs], Forward | None]) -> Any:
        """Ask `decide` before each forward of the UNet and do what it says, None for nothing; what is returned removes this again."""

        @torch.compiler.disable
        def begin(module: torch.nn.Module, args: Args, kwargs: Kwargs) -> None:
            forward = decide(args, kwargs)
            if forward is not None:
                with torch.no_grad():
                    self._prepare(forward)
                self._begin(forward.form)

        return self._unet().register_forward_pre_hook(begin, with_kwargs=True)

    def _prepare(self, forward: Forward) -> None:
        plan, state = forward.plan, self._state
        if forward.form == FUSED:
            self._show_tables(forward)
            state.gates, state.components, state.index = self._gates(forward, range(len(forward.encodings)))
            self._gates_of = self._shown = None
        elif forward.form == SCHEDULE:
            self._fill(forward, ("unedited", 0), self._unedited)
            self._show_tables(forward)
            self._edit_step(forward)
        else:
            self._fill(forward, ("edited", forward.step if plan.scheduled else 0), self._edited)
        state.query_regions = state.key_regions = None
        if plan.regional or forward.padding is not None:
            if not plan.regions or plan.regions[0] != forward.size or plan.regions[1] is not forward.padding:
                encodings = forward.encodings
                queries = query_regions(plan.rows, len(encodings), forward.size, encodings.device)
                keys = key_regions(plan.rows, encodings.shape[:2], encodings.device, forward.padding)
                plan.regions = (forward.size, forward.padding, queries, keys)
            state.query_regions, state.key_regions = plan.regions[2:]

    def show_given(self, rows: GivenRows) -> None:
        """Have the layers read keys and values that somebody else keeps."""
        state = self._state
        state.keys, state.values, state.slots = self._by_head(rows.keys), self._by_head(rows.values), None
        state.query_regions, state.key_regions = rows.query_regions, rows.key_regions
        self._shown = self._gates_of = None
        self._begin(SLOTS)

    def _begin(self, form: str) -> None:
        self._state.form = form
        self._processors.follow()

    def _by_head(self, table: Tensor) -> list[Tensor]:
        """A table [R, T, O] as one view [R, T, H, d] per layer."""
        pieces = table.split(self._widths, -1)
        return [piece.unflatten(-1, (layer.heads, -1)) for piece, layer in zip(pieces, self._layers.values())]

    # keys and values

    def keys_values(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """K and V [R, T, O] of all layers, side by side, with the edit of this step; rows without a concept have the plain ones."""
        plan = forward.plan
        if not plan.rows:
            return self._unedited(forward, range(len(forward.encodings)))
        distinct = list(dict.fromkeys(plan.contents))
        keys, values = self._edited(forward, distinct)
        where = torch.tensor([distinct.index(row) for row in plan.contents], device=keys.device)
        return keys[where], values[where]

    def _edited(self, forward: Forward, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Edited K and V [n, T, O] of some rows."""
        plan, encodings = forward.plan, forward.encodings
        settings, tables = plan.settings(rows, forward.step, encodings.device), plan.tables_on(encodings.device)
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

    def _unedited(self, forward: Forward, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = self._call.text(forward.encodings)[rows].detach()
        return self._project(chosen, chosen)

    def _project(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [n, T, O] of all layers: two products, or to_k and to_v of every layer called once, with all that is attached to them."""
        if self._batched is not None:
            return self._batched.plain(keys, values)
        load(self._unet())
        with lora_scaled(self._layers.values(), self._lora_scale):
            pairs = [(layer.to_k(keys), layer.to_v(values)) for layer in self._layers.values()]
        return torch.cat([key for key, _ in pairs], -1), torch.cat([value for _, value in pairs], -1)

    def _fill(self, forward: Forward, kind: tuple[str, int], compute: Callable[[Forward, Sequence[int]], tuple[Tensor, Tensor]]) -> None:
        """Each row's keys and values into a slot, computed for the distinct rows that are in none, and shown to the layers."""
        plan, encodings = forward.plan, forward.encodings
        if self._shown == (plan, kind):
            return
        length, device = encodings.shape[1], encodings.device
        if self.slots is None or not self.slots.fits(length, device):
            self.slots = Slots(length, sum(self._widths), device)
        contents = [(plan.number, *kind, row) for row in plan.contents]
        plan.slots, missing = self.slots.place(contents)
        if missing:
            self._gathered.pop(plan, None)
            try:
                keys, values = compute(forward, [content[-1] for content in missing])
                self.slots.write(list(missing.values()), keys, values)
            except BaseException:
                self.slots.clear()  # what was promised a place did not get there
                raise
        self._show(plan)
        self._shown = (plan, kind)

    def _show(self, plan: Plan) -> None:
        state, slots = self._state, self.slots
        if self._uses_index(slots.device):
            state.keys, state.values = self._by_head(slots.keys), self._by_head(slots.values)
            count = len(plan.slots)
            if count not in self._index:
                with torch.inference_mode(False):
                    self._index[count] = torch.zeros(count, dtype=torch.int32, device=slots.device)
                torch._dynamo.mark_static_address(self._index[count])
            self._index[count].copy_(torch.tensor(plan.slots, dtype=torch.int32))
            state.slots = self._index[count]
            return
        # in host memory rows are gathered once per prompt, which saves a copy in each layer at each step; contiguous, so that a
        # layer reads no more pages than its own keys fill
        if plan not in self._gathered:
            where = torch.tensor(plan.slots, device=slots.device)
            self._gathered[plan] = [
                [piece[where].contiguous() for piece in self._by_head(table)] for table in (slots.keys, slots.values)
            ]
        (state.keys, state.values), state.slots = self._gathered[plan], None

    def _uses_index(self, device: torch.device) -> bool:
        return device.type != "cpu" if self.by_index is None else self.by_index

    # the edit of the forms that apply it as they attend

    def _gates(self, forward: Forward, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Gates and components [n, T, J] of some rows at this step, and their concepts [n, J]."""
        plan, device = forward.plan, forward.encodings.device
        settings = plan.settings(rows, forward.step, device)
        text = self._call.text(forward.encodings)[rows].detach()
        with torch.autocast(device.type, enabled=False):
            gates, components = gates_of(text, plan.tables_on(device), settings)
        return tuple(_any_number(plan, each, -1) for each in (gates, components, settings.index))

    def _edit_step(self, forward: Forward) -> None:
        """Gates and components of this step, row by row as the layers read keys and values."""
        plan = forward.plan
        if self._gates_of == (plan, forward.step):
            return
        if self._uses_index(forward.encodings.device):
            rows = dict(zip(plan.slots, plan.contents))
            count, where, chosen = self.slots.capacity, list(rows), list(rows.values())
        else:
            count, where = len(plan.contents), list(range(len(plan.contents)))
            chosen = where
        tables = self._gates(forward, chosen)
        gates, _, index = tables
        state, shape, at = self._state, (count, *gates.shape[1:]), torch.tensor(where, device=gates.device)
        held = state.gates
        if held is None or (held.shape, held.dtype, held.device) != (shape, gates.dtype, gates.device):
            with torch.inference_mode(False):
                state.gates, state.components = (torch.zeros(shape, dtype=gates.dtype, device=gates.device) for _ in range(2))
                state.index = torch.full((count, shape[-1]), -1, dtype=torch.int32, device=gates.device)
        for table, new in zip((state.gates, state.components, state.index), tables):
            _any_number(plan, table, -1).index_copy_(0, at, new)
        self._gates_of = (plan, forward.step)

    def _show_tables(self, forward: Forward) -> None:
        """W i* and o* of the plan's concepts for every layer."""
        plan, encodings = forward.plan, forward.encodings
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
        padding = max(plan.least, 1 << (count - 1).bit_length()) - count  # few different shapes, so few compiled graphs

        def split(table: Tensor) -> list[Tensor]:
            pieces = torch.nn.functional.pad(table, (0, 0, 0, padding)).split(self._widths, -1)
            return [_any_number(plan, piece, 0) for piece in pieces]

        state = self._state
        state.key_outputs, state.key_targets = split(outputs), split(keys[0, :count])
        state.value_outputs, state.value_targets = split(tables.value_outputs.to(outputs)), split(values[0])
        self._tables_of = plan


def offloaded(unet: torch.nn.Module) -> str | None:
    """What of a UNet is offloaded as a block, in a sentence, or None."""
    block = offloaded_block(unet)
    return None if block is None else f"{block} is offloaded as a block"


def _any_number(plan: Plan, table: Tensor, dim: int) -> Tensor:
    """Where the UNet is compiled: say that a table holds any number of concepts, so that one graph serves all."""
    if plan.least > 1:
        torch._dynamo.maybe_mark_dynamic(table, dim % table.dim())
    return table
