"""Data of GPUs for the kernels' plans and predictions. The only such table in bench/."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench import roofline

# Bytes of shared memory that a block may have, by compute capability; CUDA C Programming Guide, "Technical specifications per compute
# capability".
SHARED_PER_BLOCK = {"8.0": 166912, "8.6": 101376, "8.9": 101376, "9.0": 232448, "10.0": 232448, "12.0": 101376}
RESERVED = 1024  # bytes of each block's, for the system


@dataclass(frozen=True)
class Chip:
    """Numbers marked [assumed] are not published."""

    capability: str
    multiprocessors: int
    cache: int  # bytes of L2
    clock: float  # Hz
    dram: float  # bytes/s
    l2: float  # bytes/s, read [assumed]
    dense: float  # FLOP/s of 16-bit matrix products
    tensor: int  # multiply-adds a cycle and multiprocessor by mma.sync; of H100, H200 and B200 [assumed], 0.62 and 0.5 of wgmma's

    @property
    def shared_per_block(self) -> int:
        return SHARED_PER_BLOCK[self.capability]

    @property
    def shared_per_multiprocessor(self) -> int:
        """Bytes: those of the largest block, and what the system reserves for it."""
        return self.shared_per_block + RESERVED

    def machine(self) -> dict[str, int]:
        """The device attributes that the host build of the kernels is configured with."""
        names = ("multiprocessors", "shared_per_block", "shared_per_multiprocessor", "cache")
        return {name: getattr(self, name) for name in names}

    def floor(self, work: roofline.Work) -> float:
        """Lower bound in seconds: of DRAM, or of the tensor cores at their full rate."""
        return max(work.bytes / self.dram, work.tensor / self.dense)


CHIPS = {
    "A100": Chip("8.0", 108, 40 << 20, 1.41e9, 1.56e12, 3.5e12, 312e12, 1024),
    "RTX 4090": Chip("8.9", 128, 72 << 20, 2.52e9, 1.01e12, 4.0e12, 165e12, 256),
    "A10": Chip("8.6", 72, 6 << 20, 1.70e9, 0.60e12, 1.5e12, 125e12, 512),
    "H100": Chip("9.0", 132, 50 << 20, 1.755e9, 3.35e12, 6.0e12, 989e12, 1270),
    "H200": Chip("9.0", 132, 50 << 20, 1.755e9, 4.80e12, 6.0e12, 989e12, 1270),
    "B200": Chip("10.0", 148, 126 << 20, 1.85e9, 7.70e12, 10.0e12, 2250e12, 2048),
}


def of_device(name: str) -> str | None:
    """The chip of `CHIPS` that torch calls `name`, as "NVIDIA H200"; None for others, and for variants of these with other rates."""
    other_form = r"( 80GB)? (PCIe|NVL|Laptop|D\b)|-\w+-80GB"
    return next((chip for chip in CHIPS if re.search(rf"\b{chip}\b(?!{other_form})", name)), None)
