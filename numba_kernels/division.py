"""Division by a number that the host knows: a product and a shift."""
from __future__ import annotations

import functools

import numpy as np
from numba import cuda


@functools.lru_cache(4096)
def inverse(divisor: int) -> int:
    """What `divide` takes in place of a divisor: a factor below 2 ** 32, and above it how far to shift (Granlund & Montgomery, 1994)."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1 | shift << 32


@cuda.jit(device=True, forceinline=True)
def divide(n, by):
    """n // divisor for n below 2 ** 31, by = inverse(divisor): 3 instructions. A division is 20, one waiting for the other."""
    return np.uint32((np.uint64(np.uint32(n)) * np.uint64(np.uint32(by))) >> np.uint64(by >> 32))
