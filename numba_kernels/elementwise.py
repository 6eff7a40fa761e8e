"""A block's tile of a matrix, for kernels that compute every element from its own row and column.

The 256 threads of a block are `width` columns (of 16-byte accesses) by 256 / width rows; each takes the same column of several such row
groups, so that it loads a bias once, has several rows on their way at once, and no thread divides for every access. Where few blocks
would come of that, it takes fewer.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.rows import DTYPES, ITEM

THREADS = 256
COALESCED = 8  # threads of a row, if it is that long: 128 bytes, a cache line


@dataclass(frozen=True)
class Config:
    """dtype; vec: elements an access, 16 bytes of them or one; rows: of a thread, at most."""

    dtype: str
    vec: int
    rows: int


@functools.cache
def pick(dtype: str, vec: int, inputs: int) -> Config:
    """Four 16-byte loads on their way a thread, `inputs` of them for an access of the result; eight rows of one element, 16 would spill."""
    return Config(dtype, vec, 4 // inputs if vec * ITEM[dtype] == 16 else 8)


def configs(inputs: int) -> Iterator[Config]:
    """Every Config that `pick` can give."""
    for dtype in DTYPES:
        yield from (pick(dtype, 16 // ITEM[dtype], inputs), pick(dtype, 1, inputs))


@functools.cache
def tiling(length: int, vec: int) -> tuple[int, int]:
    """(log2 of `width`, tiles a row): the widest tile that leaves at most an eighth of the threads idle, else the least idle one."""
    accesses = -(-length // vec)
    widths = [1 << shift for shift in range(THREADS.bit_length()) if 1 << shift >= min(COALESCED, accesses)]
    used = {width: accesses / (-(-accesses // width) * width) for width in widths}
    width = max((w for w in widths if used[w] >= 0.875), default=max(widths, key=lambda w: used[w]))
    return width.bit_length() - 1, -(-accesses // width)


def blocks(rows: int, shift: int, tiles: int, rows_a_thread: int, wanted: int) -> tuple[int, int]:
    """(blocks that cover `rows` rows of `tiles` tiles, rows a thread takes): one, if `wanted` blocks or fewer come of that."""
    apart = THREADS >> shift
    if -(-rows // apart) * tiles <= wanted:
        rows_a_thread = 1
    return -(-rows // (rows_a_thread * apart)) * tiles, rows_a_thread


def make_place(config: Config) -> Callable:
    """place(shift, tiles, rows, length, each) -> (first row, element in it, rows between a thread's rows, rows from the first on).

    each: rows a thread takes. The last result is at most what a block takes, and 0 beyond `length`.
    """
    vec = config.vec

    @cuda.jit(device=True, forceinline=True)
    def place(shift, tiles, rows, length, each):
        thread, block = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockIdx.x)
        group = ptx.div_u32(block, tiles)
        apart = np.uint32(THREADS) >> shift
        row = np.int64(group) * np.int64(apart * each) + np.int64(thread >> shift)
        column = (np.int64(block - group * tiles) << np.int64(shift)) + np.int64(thread & ((np.uint32(1) << shift) - np.uint32(1)))
        column *= np.int64(vec)
        return row, column, np.int32(apart), np.int32(min(rows - row, np.int64(apart * each)) if column < length else 0)
    return place
