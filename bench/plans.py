"""How `edited_attention` shares a layer out over a chip, and what time that should take: predictions for a first run to judge.

    PYTHONPATH=.:python python bench/plans.py --out bench/predictions.jsonl     # needs g++, for the plan itself; no GPU

The plan is the library's own (csrc/edited_attention.cu, built for the CPU). The rest is arithmetic over the numbers of `CHIPS`, of which
those marked [assumed] are not published. Nothing here was measured, and no row is a speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import floors

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
    tensor: int  # multiply-adds a cycle and multiprocessor by mma.sync; of H100, H200 and B200 [assumed], 0.62 and 0.5 of wgmma's


CHIPS = {
    "A100": Chip(108, 166912, 167936, 40 << 20, 1.41e9, 1.56e12, 3.5e12, 1024),
    "RTX 4090": Chip(128, 101376, 102400, 72 << 20, 2.52e9, 1.01e12, 4.0e12, 256),
    "A10": Chip(72, 101376, 102400, 6 << 20, 1.70e9, 0.60e12, 1.5e12, 512),
    "H100": Chip(132, 232448, 233472, 50 << 20, 1.755e9, 3.35e12, 6.0e12, 1270),
    "H200": Chip(132, 232448, 233472, 50 << 20, 1.755e9, 4.80e12, 6.0e12, 1270),
    "B200": Chip(148, 232448, 233472, 126 << 20, 1.85e9, 7.70e12, 10.0e12, 2048),
}
LATENCY = 2.0e-6  # of a launch in a graph, of K, V and the first queries, and of a tile behind them, on any chip [assumed]


@dataclass(frozen=True)
class Plan:
    """One launch: `layer` for `rows` of a UNet's batch on `chip`."""

    chip: str
    layer: floors.Layer
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
        """Each block's tiles, as [first, end) in the line of all heads' tiles: stretch_of of csrc/edited_attention.cuh."""
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
        work = floors.edited_attention(B=self.rows, N=layer.N, T=T, H=layer.H, d=layer.d)
        loaded = sum((end - 1) // self.of_head - first // self.of_head + 1 for first, end in self.stretches())
        asked = 2 * 2 * self.rows * layer.N * layer.C + loaded * 2 * 2 * T * layer.d
        found = {name: tiles * cycles / chip.clock for name, cycles in self.cycles().items()}
        return {**found, "second-level cache": asked / chip.second_level, "memory": work.bytes / chip.memory}

    def row(self) -> dict:
        layer, times = self.layer, self.times()
        bound = max(times, key=times.get)
        floor = floors.edited_attention(B=self.rows, N=layer.N, T=T, H=layer.H, d=layer.d).bytes / CHIPS[self.chip].memory
        predicted = times[bound] + LATENCY
        return {
            "kernel": "edited_attention", "chip": self.chip, "N": layer.N, "H": layer.H, "d": layer.d, "rows": self.rows,
            "tile_rows": 16 * self.m, "blocks": self.blocks, "resident": self.resident, "stages": self.stages, "splits": self.splits,
            "fill": round(self.fill(), 3), "bound": bound, "microseconds": round(1e6 * predicted, 2),
            "of_floor": round(floor / predicted, 3), "measured": False,
        }  # fmt: skip


def plan(host, chip: str, layer: floors.Layer, rows: int) -> Plan:
    """The library's plan of a call without an edit; host: tests/cuda_host/host.py's."""
    one = CHIPS[chip]
    host.configure(one.multiprocessors, one.shared_per_block, shared_per_multiprocessor=one.shared_per_multiprocessor)
    made = host.planned("edited_attention", {}, B=rows, N=layer.N, T=T, H=layer.H, d=layer.d)
    names = ("warps", "m", "stages", "splits", "blocks", "resident", "bytes")
    return Plan(chip, layer, rows, *(made[name] for name in names))


def layers() -> list[floors.Layer]:
    return list(dict.fromkeys(layer for unet in floors.UNETS.values() for layer in unet))


def predictions(host) -> Iterator[dict]:
    for chip in CHIPS:
        for layer in layers():
            for rows in ROWS:
                yield plan(host, chip, layer, rows).row()


if __name__ == "__main__":
    from tests.cuda_host.build import build_module
    from tests.cuda_host.host import Host

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "predictions.jsonl")
    out = parser.parse_args().out
    out.write_text("".join(json.dumps(row) + "\n" for row in predictions(Host(build_module()))), encoding="utf-8")
    print(out)
