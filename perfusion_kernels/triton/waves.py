"""How many programs share out the tiles of a head, so that a GPU is full from the first to the last of them.

A GPU holds `at_once` programs. More of them run in waves, and a last wave of a few takes as long as a full one; each program loads the
keys and values of its head first, so more programs load more. csrc/edited_attention.cu weighs the same for the CUDA kernel.
"""

from functools import cache

import torch
import triton

from .shared_memory import Held, Tiles

PROGRAMS = 512  # where a device does not say how many it holds
REGISTERS = 168  # of a thread, about what ptxas takes for these kernels


def share(N: int, pairs: int, tiles: Tiles, held: Held, device: torch.device, load: int = 1) -> tuple[int, int]:
    """(programs, tiles for each of them) of N queries of each of `pairs` heads.

    tiles, held: the configuration, of BLOCK_N queries a tile, and the shared memory of its programs. load: what a program does before
    its first tile, as a number of tiles.
    """
    return _least_time(triton.cdiv(N, tiles["BLOCK_N"]), pairs, _at_once(tiles, held, device), load)


def _at_once(tiles: Tiles, held: Held, device: torch.device) -> int:
    """Programs that the device holds at once."""
    if device.type != "cuda" or torch.version.hip is not None:
        return PROGRAMS
    multiprocessors, registers, shared_memory = _of_cuda(device)
    by_registers = registers // (32 * tiles["num_warps"] * REGISTERS)
    return multiprocessors * max(1, min(by_registers, shared_memory // (held(tiles) + 1024)))


@cache
def _of_cuda(device: torch.device) -> tuple[int, int, int]:
    has = torch.cuda.get_device_properties(device)
    return has.multi_processor_count, has.regs_per_multiprocessor, has.shared_memory_per_multiprocessor


@cache
def _least_time(count: int, pairs: int, at_once: int, load: int) -> tuple[int, int]:
    """The programs that end first, of those the fewest: waves times what a program does."""

    def time(programs: int) -> int:
        return triton.cdiv(programs * pairs, at_once) * (triton.cdiv(count, programs) + load)

    programs = min(range(1, min(count, 2 * triton.cdiv(at_once, pairs)) + 1), key=time)
    each = triton.cdiv(count, programs)
    return triton.cdiv(count, each), each
