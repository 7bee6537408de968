"""The normal numbers that `torch.randn` draws from a CPU generator, in numpy: a seed means the same picture with and without torch."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["randn"]


def randn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` to within float32's rounding of log, sin and cos.

    That is the Mersenne twister, seeded by the seed's low 32 bits, 24 bits of each number, and Box-Muller over blocks of 16: eight
    radii, then eight angles. The last 16 numbers are one block of their own where 16 does not divide the count. ValueError below
    16 numbers, which torch draws in another way.
    """
    count = math.prod(shape)
    if count < 16:
        raise ValueError(f"randn: at least 16 numbers are drawn at once, got the shape {shape}")
    bits = np.random.RandomState(seed & 0xFFFFFFFF)
    uniform = _uniform(bits, count)
    numbers = uniform.copy()
    whole = count - count % 16
    numbers[:whole] = _box_muller(uniform[:whole])
    if count % 16:
        numbers[-16:] = _box_muller(_uniform(bits, 16))
    return numbers.reshape(shape)


def _uniform(bits: np.random.RandomState, count: int) -> np.ndarray:
    """float32 in [0, 1), 24 bits each."""
    raw = bits.randint(0, 2**32, size=count, dtype=np.uint32)
    return (raw & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    first, second = uniform.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * math.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
