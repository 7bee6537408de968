"""The shared memory limit of a program, and the tile sizes that fit it.

Tiles that several products read, above all K and V of a head, are in shared memory on NVIDIA's GPUs, which allow a program
between 99 KiB (8.6, 8.9, 12.0) and 227 KiB (9.0, 10.0). Each list of tile sizes comes with an upper bound of what the compiler
allocates for them (tests/kernels/test_compile_matrix.py). On other GPUs such tiles stay in registers.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from ..constant_result import constant_result

Tiles = dict[str, int]
Held = Callable[[Tiles], int]  # an upper bound of the bytes of shared memory of a program with these tiles


@constant_result
def limit(device: torch.device) -> int | None:
    """Bytes for a program. None: these kernels cannot exceed the limit."""
    return None if device.type != "cuda" or torch.version.hip is not None else _of_cuda(device)


@cache
def _of_cuda(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fitting(tiles: Sequence[Tiles], held: Held, device: torch.device) -> tuple[Tiles, ...]:
    """The tile sizes whose programs fit into the device's shared memory."""
    most = limit(device)
    return tuple(each for each in tiles if most is None or held(each) <= most)


def unsupported(tiles: Sequence[Tiles], held: Held, device: torch.device) -> str | None:
    """Why no tiles of the list fit, or None."""
    if fitting(tiles, held, device):
        return None
    return (
        f"a program would hold {min(map(held, tiles))} bytes in shared memory, where {device} has {limit(device)};"
        " a shorter context, narrower heads or half precision would fit"
    )
