"""How the kernels share their work out over a chip, and what time that should take: predictions for a first run to judge.

    PYTHONPATH=.:python python bench/plans.py --out bench/predictions.jsonl     # needs g++, for the plan itself; no GPU

The plans are the library's own (csrc/, built for the CPU). The rest is arithmetic over the numbers of `CHIPS`, of which
those marked [assumed] are not published. Nothing here was measured, and no row is a speed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import roofline

T = 77
ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Chip:
    multiprocessors: int
    shared_per_block: int  # bytes
    shared_per_multiprocessor: int
    cache: int  # bytes of the second level
    clock: float  # Hz
    memory: float  # bytes/s
    second_level: float  # bytes/s, read [assumed]
    dense: float  # FLOP/s of 16-bit matrix products
    tensor: int  # multiply-adds a cycle and multiprocessor by mma.sync; of H100, H200 and B200 [assumed], 0.62 and 0.5 of wgmma's

    def floor(self, work: roofline.Work) -> float:
        """Seconds that no kernel can beat: memory's, or the tensor cores' at their full rate."""
        return max(work.bytes / self.memory, work.tensor / self.dense)


CHIPS = {
    "A100": Chip(108, 166912, 167936, 40 << 20, 1.41e9, 1.56e12, 3.5e12, 312e12, 1024),
    "RTX 4090": Chip(128, 101376, 102400, 72 << 20, 2.52e9, 1.01e12, 4.0e12, 165e12, 256),
    "A10": Chip(72, 101376, 102400, 6 << 20, 1.70e9, 0.60e12, 1.5e12, 125e12, 512),
    "H100": Chip(132, 232448, 233472, 50 << 20, 1.755e9, 3.35e12, 6.0e12, 989e12, 1270),
    "H200": Chip(132, 232448, 233472, 50 << 20, 1.755e9, 4.80e12, 6.0e12, 989e12, 1270),
    "B200": Chip(148, 232448, 233472, 126 << 20, 1.85e9, 7.70e12, 10.0e12, 2250e12, 2048),
}
LIBRARY = 0.7  # of the dense rate, in a library's products of a layer's size [assumed]
LATENCY = 2.0e-6  # of a launch in a graph, of its first loads, and of what is done behind them, on any chip [assumed]
REACHED = 0.85  # of the rate of the resource that binds [assumed]
PRODUCTS = 0.5  # of the tensor cores' rate, in the products of csrc/matrix_product.cuh, whose loads do not hide [assumed]


def chip(device: str) -> str | None:
    """The chip of `CHIPS` that torch calls `device`, as "NVIDIA H200"; None for others, and for forms of these with other rates."""
    other_form = r"( 80GB)? (PCIe|NVL|Laptop|D\b)|-\w+-80GB"
    return next((name for name in CHIPS if re.search(rf"\b{name}\b(?!{other_form})", device)), None)


@dataclass(frozen=True)
class Plan:
    """One launch: `layer` for `rows` of a UNet's batch on `chip`."""

    chip: str
    layer: roofline.Layer
    rows: int
    warps: int
    m: int
    stages: int
    splits: int
    blocks: int
    resident: int  # blocks that a multiprocessor holds
    bytes: int

    @property
    def heads(self) -> int:
        return self.rows * self.layer.H

    @property
    def of_head(self) -> int:
        return -(-self.layer.N // (16 * self.m))

    @property
    def tiles(self) -> int:
        return self.heads * self.of_head

    @property
    def at_once(self) -> int:
        return self.resident * CHIPS[self.chip].multiprocessors

    def stretches(self) -> list[tuple[int, int]]:
        """Each block's tiles, as [first, end) in the line of all heads' tiles: range_of_block of csrc/edited_attention.cuh."""
        if self.splits:
            parts = [self.of_head * part // self.splits for part in range(self.splits + 1)]
            return [(head * self.of_head + a, head * self.of_head + b) for head in range(self.heads) for a, b in zip(parts, parts[1:])]
        each, more = divmod(self.tiles, self.blocks)
        firsts = [block * each + min(block, more) for block in range(self.blocks + 1)]
        return list(zip(firsts, firsts[1:]))

    def busiest(self) -> tuple[int, int]:
        """Tiles, and heads whose K and V are loaded, of the busiest multiprocessor; blocks are dealt out in turn."""
        number = CHIPS[self.chip].multiprocessors
        tiles, loads = [0] * number, [0] * number
        for block, (first, end) in enumerate(self.stretches()):
            tiles[block % number] += end - first
            loads[block % number] += (end - 1) // self.of_head - first // self.of_head + 1
        return max(tiles), max(loads)

    def fill(self) -> float:
        """Mean work of a multiprocessor over that of the busiest."""
        return self.tiles / CHIPS[self.chip].multiprocessors / self.busiest()[0]

    @property
    def rounds(self) -> int:
        """Tiles of a warp, at most."""
        return -(-max(end - first for first, end in self.stretches()) // self.warps)

    def cycles(self) -> dict[str, float]:
        """Of a multiprocessor for one warp's tile, by what it needs of it."""
        d, keys, m, chip = self.layer.d, 80, self.m, CHIPS[self.chip]
        products = 2 * 16 * m * keys * d
        fragments = 2 * 2 * keys * d + 3 * 2 * 16 * m * d + 2 * 16 * m * d  # K, V; queries in and out, outputs in; outputs out
        return {
            "tensor cores": products / chip.tensor,
            "shared memory": fragments / 128,
            "exponentials": 16 * m * keys / 16,
            "instructions": m * (2.2 * keys + 3.1 * d) / 4 + 30,
        }

    def times(self) -> dict[str, float]:
        """Seconds, by resource; the largest and LATENCY are the prediction. Queries are taken to come from memory."""
        chip, layer = CHIPS[self.chip], self.layer
        tiles, loads = self.busiest()
        work = roofline.edited_attention(B=self.rows, N=layer.N, T=T, H=layer.H, d=layer.d)
        loaded = sum((end - 1) // self.of_head - first // self.of_head + 1 for first, end in self.stretches())
        asked = 2 * 2 * self.rows * layer.N * layer.C + loaded * 2 * 2 * T * layer.d
        found = {name: tiles * cycles / chip.clock for name, cycles in self.cycles().items()}
        return {**found, "second-level cache": asked / chip.second_level, "memory": work.bytes / chip.memory}

    def row(self) -> dict:
        layer, times = self.layer, self.times()
        bound = max(times, key=times.get)
        floor = CHIPS[self.chip].floor(roofline.edited_attention(B=self.rows, N=layer.N, T=T, H=layer.H, d=layer.d))
        predicted = times[bound] / REACHED + LATENCY
        return {
            "kernel": "edited_attention", "chip": self.chip, "N": layer.N, "H": layer.H, "d": layer.d, "rows": self.rows,
            "tile_rows": 16 * self.m, "blocks": self.blocks, "resident": self.resident, "stages": self.stages, "splits": self.splits,
            "fill": round(self.fill(), 3), "bound": bound, "microseconds": round(1e6 * predicted, 2),
            "of_floor": round(floor / predicted, 3), "measured": False,
        }  # fmt: skip


def projections(host, chip: str, unet: str, rows: int) -> Iterator[dict]:
    """K, or V, of a whole model: `edited_projection` and `fused_edited_projection`, which differ in a rounding."""
    one, D, O = CHIPS[chip], roofline.TEXT_WIDTHS[unet], sum(layer.count * layer.C for layer in roofline.UNETS[unet])
    host.configure(one.multiprocessors, one.shared_per_block, shared_per_multiprocessor=one.shared_per_multiprocessor)
    made = host.planned("edited_projection", {}, B=rows, T=T, D=D, O=O)
    tiles = made["row_tiles"] * made["column_tiles"]
    work = roofline.edited_projection(B=rows, T=T, D=D, O=O)
    of_busiest = -(-tiles // one.multiprocessors)
    times = {
        "tensor cores": of_busiest * made["rows"] * made["columns"] * D / (PRODUCTS * one.tensor * one.clock),
        "memory": work.bytes / one.memory / REACHED,
        "second-level cache": 2 * D * tiles * (made["rows"] + made["columns"]) / one.second_level / REACHED,
    }
    fill = tiles / one.multiprocessors / of_busiest
    for kernel in ("edited_projection", "fused_edited_projection"):
        facts = dict(D=D, O=O, rows=rows, tile_rows=made["rows"], blocks=tiles, fill=round(fill, 3))
        yield _row(kernel, chip, facts, times, one.floor(work))


def fused(host, chip: str, layer: roofline.Layer, D: int, rows: int) -> dict:
    """`fused_edited_attention`: a projection for each block, then its tiles of 16 rows."""
    one = CHIPS[chip]
    host.configure(one.multiprocessors, one.shared_per_block, shared_per_multiprocessor=one.shared_per_multiprocessor)
    made = host.planned("fused_edited_attention", {}, B=rows, N=layer.N, T=T, D=D, H=layer.H, d=layer.d)
    blocks = rows * layer.H * made["splits"]
    of_busiest, columns = -(-blocks // one.multiprocessors), -(-layer.d // 16) * 16
    attention = Plan(chip, layer, rows, made["warps"], 1, made["stages"], made["splits"], blocks, 1, made["bytes"])
    work = roofline.fused_edited_attention(B=rows, N=layer.N, T=T, D=D, H=layer.H, d=layer.d)
    of_tiles = max(attention.cycles().values()) * attention.busiest()[0]
    times = {
        "tensor cores": (of_busiest * 2 * 80 * columns * D / (PRODUCTS * one.tensor) + of_tiles) / one.clock,
        "memory": work.bytes / one.memory / REACHED,
    }
    facts = dict(N=layer.N, H=layer.H, d=layer.d, D=D, rows=rows, blocks=blocks, splits=made["splits"], fill=round(attention.fill(), 3))
    return _row("fused_edited_attention", chip, facts, times, one.floor(work))


def gates(chip: str, D: int, rows: int) -> dict:
    """`concept_gates` of one concept a row: five blocks a prompt, whose slices of D follow each other, eight warps at a time."""
    one = CHIPS[chip]
    work = roofline.concept_gates(B=rows, T=T, D=D, J=1)
    turns = -(-5 * rows // one.multiprocessors) * -(-D // 512)
    times = {"latency": turns * 0.6e-6, "memory": work.bytes / one.memory / REACHED}  # a slice's way [assumed]
    return _row("concept_gates", chip, dict(D=D, J=1, rows=rows, blocks=5 * rows), times, one.floor(work))


def around_attention(host, chip: str, layer: roofline.Layer, rows: int) -> dict:
    """`cross_attention_layer`: the library's product, `edited_attention`, the library's product with bias and residual. Queries and
    attention's result go through the second-level cache where both fit there."""
    one, M, C = CHIPS[chip], rows * layer.N, layer.C
    between = one.second_level if 2 * 2 * M * C <= one.cache else one.memory
    attention = plan(host, chip, layer, rows).times()
    if between == one.second_level:
        del attention["memory"]

    def product(tensors: int) -> float:
        """tensors: of M x C, in memory; one more is another launch's."""
        return max(2 * M * C * C / (LIBRARY * one.dense), 2 * ((tensors * M * C + C * C) / one.memory + M * C / between) / REACHED)

    times = {"to_q": product(1), "edited_attention": max(attention.values()) / REACHED, "to_out": product(2)}
    work = roofline.cross_attention_layer(B=rows, N=layer.N, C=C, T=T, H=layer.H, d=layer.d)
    return _launches("cross_attention_layer", chip, dict(N=layer.N, C=C, H=layer.H, d=layer.d, rows=rows), times, one.floor(work))


def backward(host, chip: str, unet: str, rows: int) -> dict:
    """The derivatives of `edited_projection` for a whole model's keys or values, one concept a row: four launches."""
    one, D, O = CHIPS[chip], roofline.TEXT_WIDTHS[unet], sum(layer.count * layer.C for layer in roofline.UNETS[unet])
    host.configure(one.multiprocessors, one.shared_per_block, shared_per_multiprocessor=one.shared_per_multiprocessor)
    half = torch.empty(1, dtype=torch.half)
    tensors = {"encodings": half.expand(rows, T, D), "weight": half.expand(O, D), "gradient": half.expand(rows, T, O)}
    splits = host.workspace_bytes("edited_projection_backward", **tensors) // (4 * rows * T * D)
    works = roofline.edited_projection_backward_launches(B=rows, T=T, D=D, O=O, J=1, splits=splits)
    names = "encodings' gradient", "sum of its parts", "gradients of the coefficients", "gradients of the tables"
    times = {name: work.bytes / one.memory / REACHED for name, work in zip(names, works, strict=True)}
    tiles = -(-rows * T // 80) * -(-D // 128) * splits
    products = -(-tiles // one.multiprocessors) * 80 * 128 * O / splits / (PRODUCTS * one.tensor * one.clock)
    times[names[0]] = max(times[names[0]], products)
    least = roofline.edited_projection_backward(B=rows, T=T, D=D, O=O, J=1)
    return _launches("edited_projection_backward", chip, dict(D=D, O=O, rows=rows, splits=splits), times, one.floor(least))


def _launches(kernel: str, chip: str, facts: dict, times: dict[str, float], floor: float) -> dict:
    """Of launches that follow each other; `bound` is the longest."""
    predicted = sum(times.values()) + len(times) * LATENCY
    found = {"bound": max(times, key=times.get), "microseconds": round(1e6 * predicted, 2), "of_floor": round(floor / predicted, 3)}
    return {"kernel": kernel, "chip": chip, **facts, **found, "measured": False}


def _row(kernel: str, chip: str, facts: dict, times: dict[str, float], floor: float) -> dict:
    bound = max(times, key=times.get)
    predicted = times[bound] + LATENCY
    found = {"bound": bound, "microseconds": round(1e6 * predicted, 2), "of_floor": round(floor / predicted, 3), "measured": False}
    return {"kernel": kernel, "chip": chip, **facts, **found}


def plan(host, chip: str, layer: roofline.Layer, rows: int, tall: bool = True) -> Plan:
    """The library's plan of a call without an edit; host: tests/cuda_host/host.py's. tall: with tiles of 32 rows where it takes them."""
    one = CHIPS[chip]
    host.configure(one.multiprocessors, one.shared_per_block, shared_per_multiprocessor=one.shared_per_multiprocessor)
    made = host.planned("edited_attention", {}, B=rows, N=layer.N, T=T, H=layer.H, d=layer.d)
    names = ("warps", "m", "stages", "splits", "blocks", "resident", "bytes")
    found = Plan(chip, layer, rows, *(made[name] for name in names))
    if tall or found.m == 1:
        return found
    # a query so short that tiles of 16 rows are taken has the same warps, stages and resident blocks
    short = plan(host, chip, replace(layer, N=16), 1)
    return replace(found, m=1, warps=short.warps, stages=short.stages, resident=short.resident, bytes=short.bytes)


def layers() -> list[roofline.Layer]:
    return list(dict.fromkeys(layer for unet in roofline.UNETS.values() for layer in unet))


def predictions(host) -> Iterator[dict]:
    for chip in CHIPS:
        for layer in layers():
            for rows in ROWS:
                yield plan(host, chip, layer, rows).row()
                yield around_attention(host, chip, layer, rows)
        for unet, D in roofline.TEXT_WIDTHS.items():
            for rows in (2, 16):
                yield gates(chip, D, rows)
                yield from projections(host, chip, unet, rows)
                yield backward(host, chip, unet, rows)
                yield from (fused(host, chip, layer, D, rows) for layer in roofline.UNETS[unet])


if __name__ == "__main__":
    from tests.cuda_host.build import build_module
    from tests.cuda_host.host import Host

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "predictions.jsonl")
    out = parser.parse_args().out
    out.write_text("".join(json.dumps(row) + "\n" for row in predictions(Host(build_module()))), encoding="utf-8")
    print(out)
