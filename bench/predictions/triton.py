"""The Triton kernels, by their own lists of tiles and `waves.py`, and by what bench/kernels/compile_matrix.py found in their machine code.

From the machine code come registers and shared memory, so how many programs are resident. Staging is the compiler's; what it reaches of a
rate is assumed as a whole (`TRITON`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import plans, roofline
from bench.chips import CHIPS
from bench.plans import T
from bench.predictions import cuda
from bench.predictions.assumptions import DEPENDENT_LOAD, L2_LOAD, LIBRARY, PRODUCTS, REACHED, TRITON, TRITON_INSTRUCTIONS
from bench.predictions.row import row
from perfusion_kernels.triton import concept_gates, edited_attention, fused_edited_attention, rank_one, waves
from perfusion_kernels.triton import concept_gates_backward as gates_backward
from perfusion_kernels.triton import edited_attention_backward as attention_backward
from perfusion_kernels.triton import fused_edited_projection as fused_projection
from perfusion_kernels.triton.attention_tiles import padded, pieces

COMPILED = Path(__file__).parents[1] / "results/compile_matrix.jsonl"
HALF = torch.float16
PLACES = 0, 1, 8
REGISTERS = 65536  # of a multiprocessor
SMALL = {"small launches": 0.0}  # of torch: sums of a few parts, zeros


def rows() -> Iterator[dict]:
    for chip in CHIPS:
        for layer in plans.layers():
            for B in cuda.EDITED:
                yield from (attention(chip, layer, B, J) for J in PLACES)
                yield cuda.around_attention("triton", chip, layer, B, Attention(chip, layer, B).times(), TRITON)
                yield gradients_of_attention(chip, layer, B)
        for unet, D in roofline.TEXT_WIDTHS.items():
            O = cuda.columns(unet)
            for B in cuda.EDITED:
                yield gates(chip, D, B)
                yield gradients_of_gates(chip, D, B)
                yield projection(chip, D, O, B)
                yield fused_edited_projection(chip, D, O, B)
                yield gradients_of_projection(chip, D, O, B)
                yield from (fused(chip, layer, D, B) for layer in roofline.UNETS[unet])


@functools.cache
def compiled(capability: str, operator: str, d: int, kernel: str) -> dict:
    """What the compiler made of a kernel with two places."""
    for line in COMPILED.read_text(encoding="utf-8").splitlines():
        each = json.loads(line)
        wanted = (f"CUDA {capability}", operator, d, "fp16", 2, kernel)
        if tuple(each.get(name) for name in ("architecture", "operator", "head_dim", "dtype", "J", "kernel")) == wanted:
            return each
    raise LookupError(f"{COMPILED} has no {kernel} of {operator} at d = {d} for {capability}: bench/kernels/compile_matrix.py writes it")


@dataclass(frozen=True)
class Attention:
    """A launch whose programs load K and V of one head, edit them, and loop over tiles of its queries; and the like."""

    chip: str
    layer: roofline.Layer
    rows: int
    J: int = 0
    operator: str = "edited_attention"
    kernel: str = "_attend"
    list_of_tiles: Callable = edited_attention.tiles
    bytes_held: Callable = edited_attention.held
    products: float = 1.0  # matrix products of a tile, over those of attention
    load: int = 1  # cost of a program's loads before its first tile, in tiles

    @property
    def tiles(self) -> dict[str, int]:
        """The first of the list that the chip's shared memory holds, which an untuned installation takes."""
        tiles = self.list_of_tiles(T, self.layer.d, HALF)
        return next(each for each in tiles if self.held(each) <= CHIPS[self.chip].shared_per_block)

    def held(self, tiles: dict[str, int]) -> int:
        return self.bytes_held(T, self.layer.d, HALF)(tiles)

    @functools.cached_property
    def shared(self) -> tuple[int, int]:
        """(programs of a head, tiles of a program), as waves.py decides."""
        one = CHIPS[self.chip]
        resident = waves.resident(self.tiles, self.held, REGISTERS, one.shared_per_multiprocessor)
        count = -(-self.layer.N // self.tiles["BLOCK_N"])
        return waves.least_time(count, self.rows * self.layer.H, resident * one.multiprocessors, self.load)

    @property
    def programs(self) -> int:
        return self.shared[0] * self.rows * self.layer.H

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds, by what the compiler took."""
        one = CHIPS[self.chip]
        took = compiled(one.capability, self.operator, self.layer.d, self.kernel)
        by_registers = REGISTERS // (32 * took["warps"] * (-(-took["registers"] // 8) * 8))
        return min(by_registers, one.shared_per_multiprocessor // (took["shared_bytes"] + 1024))

    @property
    def waves(self) -> int:
        return -(-self.programs // (self.resident * CHIPS[self.chip].multiprocessors))

    @property
    def most_programs(self) -> int:
        """Programs of the most loaded multiprocessor."""
        return -(-self.programs // CHIPS[self.chip].multiprocessors)

    def fill(self) -> float:
        """Mean work of a multiprocessor over that of the most loaded."""
        count = -(-self.layer.N // self.tiles["BLOCK_N"])
        return count * self.rows * self.layer.H / CHIPS[self.chip].multiprocessors / (self.most_programs * self.shared[1])

    def cycles(self) -> dict[str, float]:
        """Of a multiprocessor for one tile, by resource. From 9.0 on, products of 64 rows and more are of a whole warpgroup, at the full
        rate, and load K and V from shared memory once; otherwise each warp loads all of them."""
        one, n, warps = CHIPS[self.chip], self.tiles["BLOCK_N"], self.tiles["num_warps"]
        keys, d = padded(T, self.layer.d)
        warpgroups = one.capability in ("9.0", "10.0") and n >= 64
        rate = one.dense / (2 * one.multiprocessors * one.clock) if warpgroups else one.tensor
        loads = n // 64 if warpgroups else warps
        return {
            "tensor cores": self.products * 2 * n * keys * d / rate,
            "shared memory": (self.products * loads * 2 * 2 * keys * d + 4 * 2 * n * d) / 128,  # K and V; queries and outputs, in and out
            "exponentials": n * keys / 16,
            "instructions": self.products * TRITON_INSTRUCTIONS * n / 16 * (2.2 * keys + 3.1 * d) / 4,
        }

    def times(self) -> dict[str, float]:
        """Seconds, by resource, of all but the edit."""
        one, layer = CHIPS[self.chip], self.layer
        moved = 2 * 2 * self.rows * layer.N * layer.C + self.programs * 2 * 2 * T * layer.d
        found = {name: self.most_programs * self.shared[1] * each / one.clock for name, each in self.cycles().items()}
        return {**found, "L2": moved / one.l2, "DRAM": self.work.bytes / one.dram}

    def edit_seconds(self) -> float:
        """Each place is a branch, which loads an index and then the tables' columns, for each piece of K and of V in turn. Instructions:
        two for an element and place, four for its conversions."""
        if self.J == 0:
            return 0.0
        one, (keys, d) = CHIPS[self.chip], padded(T, self.layer.d)
        count = 2 * sum(size > 0 for size in pieces(T)) * sum(size > 0 for size in pieces(self.layer.d))
        cycles = 2 * keys * d * (2 * self.J + 4) / 32 / 4
        return self.waves * count * self.J * L2_LOAD + self.most_programs * cycles / one.clock

    def before(self) -> dict[str, float]:
        """Seconds that nothing hides: the first loads of each wave beyond the first, and the edit."""
        return {"first loads": (self.waves - 1) * DEPENDENT_LOAD, "edit": self.edit_seconds()}

    def facts(self) -> dict:
        layer = self.layer
        found = dict(N=layer.N, H=layer.H, d=layer.d, J=self.J, rows=self.rows, tile_rows=self.tiles["BLOCK_N"], blocks=self.programs)
        return {**found, "resident": self.resident, "fill": round(self.fill(), 3)}

    @property
    def work(self) -> roofline.Work:
        return roofline.edited_attention(B=self.rows, N=self.layer.N, T=T, H=self.layer.H, d=self.layer.d, J=self.J)


def attention(chip: str, layer: roofline.Layer, B: int, J: int = 0) -> dict:
    one = Attention(chip, layer, B, J)
    times = {name: seconds / TRITON for name, seconds in one.times().items()}
    return row("triton", "edited_attention", chip, one.facts(), [times], one.work, before=one.before())


def fused(chip: str, layer: roofline.Layer, D: int, B: int) -> dict:
    """A program projects K, then V, of its head: [80, d] in steps over D, whose loads the compiler overlaps."""
    one, step = CHIPS[chip], 32
    functions = fused_edited_attention.tiles, fused_edited_attention.held
    call = Attention(chip, layer, B, 1, "fused_edited_attention", "_project_and_attend", *functions, load=D // step)
    keys, d = padded(T, layer.d)
    times = {name: seconds / TRITON for name, seconds in call.times().items()}
    times["tensor cores"] += call.most_programs * 2 * keys * d * D / (PRODUCTS * one.tensor) / one.clock
    work = roofline.fused_edited_attention(B=B, N=layer.N, T=T, D=D, H=layer.H, d=layer.d, J=1)
    times["DRAM"] = work.bytes / one.dram / TRITON
    times["latency"] = call.waves * 2 * D // step * L2_LOAD / 2  # two stages: a step waits for half of a load
    return row("triton", "fused_edited_attention", chip, {**call.facts(), "D": D}, [times], work, before=call.before())


def gradients_of_attention(chip: str, layer: roofline.Layer, B: int) -> dict:
    """dq by one launch, dK and dV by another, of three and four products where attention has two. Without an edit, which adds the launches
    of rank_one.py."""
    one = CHIPS[chip]
    functions = attention_backward.tiles_by_query, attention_backward.held_by_query
    by_query = Attention(chip, layer, B, 0, "edited_attention, backward", "_by_query", *functions, products=1.5)
    work = roofline.edited_attention_backward(B=B, N=layer.N, T=T, H=layer.H, d=layer.d)
    first = {name: seconds / TRITON for name, seconds in by_query.times().items()}
    first["DRAM"] = 3 * 2 * B * layer.N * layer.C / one.dram / TRITON  # query and gradient in, dq out
    second = dict(first)
    for name in ("tensor cores", "shared memory", "instructions"):
        second[name] *= 4 / 3
    second["DRAM"] *= 2 / 3
    launches = [_longest(first, "dq"), _longest(second, "dK and dV")]
    return row("triton", "edited_attention_backward", chip, by_query.facts(), launches, work, before=by_query.before())


def _longest(times: dict[str, float], what: str) -> dict[str, float]:
    """A launch of several, by its resource."""
    bound = max(times, key=times.get)
    return {f"{what}: {bound}": times[bound]}


def gates(chip: str, D: int, B: int) -> dict:
    """`concept_gates` of one concept a row: programs of a few tokens, which wait for the loads of each step over D."""
    one, work = CHIPS[chip], roofline.concept_gates(B=B, T=T, D=D, J=1)
    programs, latency = _steps(D, B, concept_gates.STAGES)
    times = {"latency": latency, "DRAM": work.bytes / one.dram / TRITON}
    return row("triton", "concept_gates", chip, dict(D=D, J=1, rows=B, blocks=programs), [times], work)


def _steps(D: int, B: int, stages: int) -> tuple[int, float]:
    """Programs, all of them resident, and seconds of the loop over D of each, whose loads are in flight for all stages but one."""
    tiles = concept_gates.tiles(1)[0]
    return -(-T // tiles["BLOCK_T"]) * B, (-(-D // tiles["BLOCK_D"]) / (stages - 1) + 1) * DEPENDENT_LOAD


def gradients_of_gates(chip: str, D: int, B: int) -> dict:
    """Sums and solves again and de by token, then the tables' gradients by concept, then those of shared slots."""
    one, work = CHIPS[chip], roofline.concept_gates_backward(B=B, T=T, D=D, J=1)
    programs, latency = _steps(D, B, gates_backward.STAGES)
    tokens = -(-T // concept_gates.tiles(1)[0]["BLOCK_T"]) * DEPENDENT_LOAD
    by_concept = tokens + work.bytes / one.dram / TRITON
    by_token = latency + -(-D // concept_gates.tiles(1)[0]["BLOCK_D"]) * L2_LOAD  # a second time over D, for the encodings' gradient
    launches = [{"by token": by_token}, {"by concept": by_concept}, {"by slot": DEPENDENT_LOAD}, *[SMALL] * 4]
    return row("triton", "concept_gates_backward", chip, dict(D=D, J=1, rows=B, blocks=programs), launches, work)


def projection(chip: str, D: int, O: int, B: int) -> dict:
    """The library's product, and a pass that edits the results in place."""
    one, work = CHIPS[chip], roofline.edited_projection(B=B, T=T, D=D, O=O, J=1)
    results = 2 * B * T * O
    product = max(2 * B * T * D * O / (LIBRARY * one.dense), (2 * (B * T * D + D * O) + results) / one.dram / REACHED)
    update = 2 * results / (one.l2 if results <= one.cache else one.dram) / TRITON + 2 * DEPENDENT_LOAD
    facts = dict(D=D, O=O, J=1, rows=B, blocks=-(-O // rank_one.TILES[0]["BLOCK_O"]) * -(-T // rank_one.TILES[0]["BLOCK_T"]) * B)
    return row("triton", "edited_projection", chip, facts, [{"product": product}, {"edit": update}], work)


def fused_edited_projection(chip: str, D: int, O: int, B: int) -> dict:
    """One launch: a program has 77 tokens of one row, as 64 + 16, and BLOCK_O columns."""
    one, work = CHIPS[chip], roofline.edited_projection(B=B, T=T, D=D, O=O, J=1)
    width, keys = fused_projection.tiles(HALF)[0]["BLOCK_O"], sum(pieces(T))
    programs = -(-O // width) * B
    most = -(-programs // one.multiprocessors)
    times = {
        "tensor cores": most * keys * width * D / (PRODUCTS * one.tensor) / one.clock,
        "DRAM": work.bytes / one.dram / TRITON,
        "L2": 2 * D * programs * (keys + width) / one.l2 / TRITON,
    }
    facts = dict(D=D, O=O, J=1, rows=B, blocks=programs, fill=round(programs / one.multiprocessors / most, 3))
    return row("triton", "fused_edited_projection", chip, facts, [times], work, before={"edit": 2 * 2 * L2_LOAD})


def gradients_of_projection(chip: str, D: int, O: int, B: int) -> dict:
    """dY W by the library, and one pass over dY for gates, components and both tables. dW is not asked for."""
    one, work = CHIPS[chip], roofline.edited_projection_backward(B=B, T=T, D=D, O=O, J=1)
    gradient = 2 * B * T * O
    product = max(2 * B * T * D * O / (LIBRARY * one.dense), (gradient + 2 * (D * O + B * T * D)) / one.dram / REACHED)
    parts = 2 * 4 * B * T * -(-O // rank_one.TILES[0]["BLOCK_O"])
    sums = (gradient + 2 * parts + 16 * B * O) / one.dram / TRITON + -(-T // rank_one.TILES[0]["BLOCK_T"]) * DEPENDENT_LOAD
    slots = 16 * B * O / one.dram / TRITON + DEPENDENT_LOAD
    launches = [{"product": product}, {"gradients": sums}, {"by slot": slots}, *[SMALL] * 6]
    return row("triton", "edited_projection_backward", chip, dict(D=D, O=O, J=1, rows=B), launches, work)
