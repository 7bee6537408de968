"""How the compiled `edited_attention` shares its tiles out over a chip, and what time that should take.

The plan is the library's own (csrc/, built for the CPU). The rest is arithmetic over the numbers of bench/chips.py and
bench/predictions/assumptions.py. Nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench import roofline
from bench.chips import CHIPS
from bench.predictions.assumptions import DEPENDENT_LOAD

T = 77
KEYS = 80  # T as the kernels pad it
ROWS = (1, 2, 4, 8, 16, 32, 64)
# Instructions of a warp in the edit of K and V, in the disassembly for 9.0: for 32 pieces of 4 tokens x 8 columns, without concepts and
# more for each; and to load 32 such pieces of the tables.
EDIT_TILE, EDIT_PLACE, EDIT_LOAD = 90, 100, 100


@dataclass(frozen=True)
class Plan:
    """One launch: `layer` for `rows` of a UNet's batch on `chip`, each row with J concepts of its own."""

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
    J: int = 0

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

    def ranges(self) -> list[tuple[int, int]]:
        """Each block's tiles, as [first, end) of the tiles of all heads: range_of_block of csrc/edited_attention.cuh."""
        if self.splits:
            parts = [self.of_head * part // self.splits for part in range(self.splits + 1)]
            return [(head * self.of_head + a, head * self.of_head + b) for head in range(self.heads) for a, b in zip(parts, parts[1:])]
        each, more = divmod(self.tiles, self.blocks)
        firsts = [block * each + min(block, more) for block in range(self.blocks + 1)]
        return list(zip(firsts, firsts[1:]))

    def loads(self) -> list[int]:
        """How many heads' K and V each block loads."""
        return [(end - 1) // self.of_head - first // self.of_head + 1 for first, end in self.ranges()]

    def most_loaded(self) -> tuple[int, int]:
        """Tiles, and heads whose K and V are loaded, of the most loaded multiprocessor; blocks are assigned round-robin."""
        number = CHIPS[self.chip].multiprocessors
        tiles, loads = [0] * number, [0] * number
        for block, ((first, end), loaded) in enumerate(zip(self.ranges(), self.loads())):
            tiles[block % number] += end - first
            loads[block % number] += loaded
        return max(tiles), max(loads)

    def fill(self) -> float:
        """Mean work of a multiprocessor over that of the most loaded."""
        return self.tiles / CHIPS[self.chip].multiprocessors / self.most_loaded()[0]

    @property
    def rounds(self) -> int:
        """Tiles of a warp, at most."""
        return -(-max(end - first for first, end in self.ranges()) // self.warps)

    def cycles(self) -> dict[str, float]:
        """Of a multiprocessor for one warp's tile, by resource."""
        d, m, chip = self.layer.d, self.m, CHIPS[self.chip]
        products = 2 * 16 * m * KEYS * d
        fragments = 2 * 2 * KEYS * d + 3 * 2 * 16 * m * d + 2 * 16 * m * d  # K, V; queries in and out, outputs in; outputs out
        return {
            "tensor cores": products / chip.tensor,
            "shared memory": fragments / 128,
            "exponentials": 16 * m * KEYS / 16,
            "instructions": m * (2.2 * KEYS + 3.1 * d) / 4 + 30,
        }

    def edit_cycles(self) -> float:
        """Of a multiprocessor for the edit of one head's K and V: instructions of csrc/edited_tiles.cuh as the disassembly has them,
        four schedulers at one a cycle."""
        d, J = self.layer.d, self.J
        elements = 2 * KEYS // 4 * d // 8  # pieces of 4 tokens x 8 columns, of both sides
        loaded = J * (2 * 2 * d // 8 + KEYS // 4)  # pieces of the tables and of the coefficients
        return (elements * (EDIT_TILE + EDIT_PLACE * J) + loaded * EDIT_LOAD) / 32 / 4 if J else 0.0

    def times(self) -> dict[str, float]:
        """Seconds, by resource, of all but the edit. Queries are assumed to come from DRAM."""
        chip, layer = CHIPS[self.chip], self.layer
        head = 2 * 2 * T * layer.d + self.J * (2 * 2 * 2 * layer.d + 2 * 4 * T)  # K and V; tables and coefficients
        requested = 2 * 2 * self.rows * layer.N * layer.C + sum(self.loads()) * head
        found = {name: self.most_loaded()[0] * cycles / chip.clock for name, cycles in self.cycles().items()}
        return {**found, "L2": requested / chip.l2, "DRAM": self.work.bytes / chip.dram}

    def edit_seconds(self) -> float:
        """Of the edit, during which a block has no tile yet: that of the slot's index before its tables, and the instructions."""
        return DEPENDENT_LOAD + self.most_loaded()[1] * self.edit_cycles() / CHIPS[self.chip].clock if self.J else 0.0

    @property
    def work(self) -> roofline.Work:
        return roofline.edited_attention(B=self.rows, N=self.layer.N, T=T, H=self.layer.H, d=self.layer.d, J=self.J)


def plan(host, chip: str, layer: roofline.Layer, rows: int, J: int = 0) -> Plan:
    """The library's plan of a call; host: tests/cuda_host/host.py's."""
    host.configure(**{**CHIPS[chip].machine(), "cache": 0})
    tensors = {}
    if J:
        table = torch.empty(1, dtype=torch.half).expand(rows * J, layer.H * layer.d)
        tensors = dict.fromkeys(("key_outputs", "key_targets", "value_outputs", "value_targets"), table)
        tensors["index"] = torch.empty(1, dtype=torch.int32).expand(rows, J)
    made = host.planned("edited_attention", tensors, B=rows, N=layer.N, T=T, H=layer.H, d=layer.d)
    names = ("warps", "m", "stages", "splits", "blocks", "resident", "bytes")
    return Plan(chip, layer, rows, *(made[name] for name in names), J)


def layers() -> list[roofline.Layer]:
    return list(dict.fromkeys(layer for unet in roofline.UNETS.values() for layer in unet))
