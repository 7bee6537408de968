"""The number of programs that share the tiles of a head, chosen such that the last wave is full.

A GPU holds `at_once` resident programs; more run in waves, and a partial last wave takes as long as a full one. On the other hand each
program first loads the keys and values of its head, so more programs load more. csrc/edited_attention.cu makes this trade-off for the
CUDA kernel.
"""

from functools import cache

import torch
import triton

from .shared_memory import Held, Tiles

PROGRAMS = 512  # resident programs of a device whose limits are not known
REGISTERS = 168  # per thread, an estimate of what ptxas allocates to these kernels


def share(N: int, pairs: int, tiles: Tiles, held: Held, device: torch.device, load: int = 1) -> tuple[int, int]:
    """(programs per head, tiles per program) for N queries of each of `pairs` heads.

    tiles, held: the configuration, of BLOCK_N queries a tile, and the shared memory of its programs. load: the cost of a program's
    loads before its first tile, in tiles.
    """
    return least_time(triton.cdiv(N, tiles["BLOCK_N"]), pairs, _at_once(tiles, held, device), load)


def _at_once(tiles: Tiles, held: Held, device: torch.device) -> int:
    """Resident programs of the device: one wave."""
    if device.type != "cuda" or torch.version.hip is not None:
        return PROGRAMS
    multiprocessors, registers, shared_memory = _of_cuda(device)
    return multiprocessors * resident(tiles, held, registers, shared_memory)


def resident(tiles: Tiles, held: Held, registers: int, shared_memory: int) -> int:
    """Resident programs of a multiprocessor with so many registers and bytes of shared memory."""
    by_registers = registers // (32 * tiles["num_warps"] * REGISTERS)
    return max(1, min(by_registers, shared_memory // (held(tiles) + 1024)))


@cache
def _of_cuda(device: torch.device) -> tuple[int, int, int]:
    has = torch.cuda.get_device_properties(device)
    return has.multi_processor_count, has.regs_per_multiprocessor, has.shared_memory_per_multiprocessor


@cache
def least_time(count: int, pairs: int, at_once: int, load: int) -> tuple[int, int]:
    """Minimises waves times the work of a program, with the fewest programs on a tie. Returns (programs, tiles per program)."""

    def time(programs: int) -> int:
        return triton.cdiv(programs * pairs, at_once) * (triton.cdiv(count, programs) + load)

    programs = min(range(1, min(count, 2 * triton.cdiv(at_once, pairs)) + 1), key=time)
    each = triton.cdiv(count, programs)
    return triton.cdiv(count, each), each
