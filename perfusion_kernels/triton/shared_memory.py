"""What a program may hold in shared memory, and which tile sizes keep within it.

Tiles that several products read, K and V of a head above all, stay in shared memory on NVIDIA's GPUs, which have between 99 KiB
(8.6, 8.9, 12.0) and 227 KiB (9.0, 10.0) for a program. Beside each list of tile sizes stands how much a program of
theirs holds, no less than the compiler takes (tests/kernels/test_compile_matrix.py). On other GPUs such tiles stay in registers.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from ..constant_result import constant_result

Tiles = dict[str, int]
Held = Callable[[Tiles], int]  # bytes of shared memory that a program with such tiles takes


@constant_result
def limit(device: torch.device) -> int | None:
    """Bytes for a program, or None: no limit that these kernels could exceed."""
    return None if device.type != "cuda" or torch.version.hip is not None else _of_cuda(device)


@cache
def _of_cuda(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fitting(tiles: Sequence[Tiles], held: Held, device: torch.device) -> tuple[Tiles, ...]:
    """Those of which a program holds no more than there is."""
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
