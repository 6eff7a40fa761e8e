"""A row of a tensor spread over a group of threads: what the kernels that normalise rows share.

A thread has four 16-byte loads on their way at once, or sixteen of one element. A row that fits them (up to 32 KiB) stays in registers
between the sums and the scaling, so that memory is read once; a longer one is read again, from L2.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.rows import ITEM, make_convert, make_io, words_of

FEW_ROWS = 1024  # up to here every row finds the weights in memory, not in L2: they are asked for together with the row


@dataclass(frozen=True)
class Config:
    """dtype; vec: elements an access; accesses: of a thread; threads: of a row; rows: of a block; reread: the row does not fit."""

    dtype: str
    vec: int
    accesses: int
    threads: int
    rows: int
    reread: bool = False


@functools.cache
def pick(dtype: str, length: int, vec: int) -> Config:
    """The fewest threads whose accesses hold the row: with fewer of them waiting at a barrier, more rows are on their way at once."""
    accesses = 4 if vec * ITEM[dtype] == 16 else 16  # of one element: rows of an odd length are rare, and get three sizes
    sizes = ((8, 16), (32, 4), (128, 1), (256, 1), (512, 1)) if accesses == 4 else ((32, 4), (256, 1))
    for threads, rows in sizes:
        if length <= accesses * threads * vec:
            return Config(dtype, vec, accesses, threads, rows)
    return Config(dtype, vec, accesses, sizes[-1][0], 1, True)


def configs() -> Iterator[Config]:
    """Every Config that `pick` can give."""
    for dtype, item in ITEM.items():
        vec = 16 // item
        yield from (pick(dtype, 4 * threads * vec, vec) for threads in (8, 32, 128, 256, 512, 1024))
        yield from (pick(dtype, 16 * threads, 1) for threads in (32, 256, 512))


@functools.cache
def make_tile(config: Config) -> tuple[Callable, Callable, Callable, Callable]:
    """(place, fetch, gather, prefetch) of a tile.

    place() -> (row in the block, element in the row) of a thread's first access; the others follow `step` apart.

    fetch(address, left, words) loads the thread's accesses from `address`; beyond `left` elements there is nothing, and the words are 0.
    gather(x_at, residual_at, sum_at, left, words) loads x, adds the residual if residual_at is not 0, rounds, and writes the sum if sum_at
    is not 0. prefetch(address, left) asks for what fetch will read, without holding registers.
    """
    vec, item, each, accesses = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), config.accesses
    kept, step, mask, shift = each * accesses, config.threads * vec, config.threads - 1, config.threads.bit_length() - 1
    load, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)

    @cuda.jit(device=True, forceinline=True)
    def place():
        thread = np.uint32(cuda.threadIdx.x)
        return thread >> np.uint32(shift), (thread & np.uint32(mask)) * np.uint32(vec)

    @cuda.jit(device=True, forceinline=True)
    def fetch(address, left, words):
        for access in range(accesses):
            load(address + np.uint64(access * step * item), access * step < left, words, access * each)

    @cuda.jit(device=True, forceinline=True)
    def gather(x_at, residual_at, sum_at, left, words):
        fetch(x_at, left, words)
        if residual_at != np.uint64(0):
            others = cuda.local.array(kept, np.uint32)
            ours = cuda.local.array(vec, np.float32)
            theirs = cuda.local.array(vec, np.float32)
            fetch(residual_at, left, others)
            for access in range(accesses):
                unpack(words, access * each, ours, 0)
                unpack(others, access * each, theirs, 0)
                for i in range(vec):
                    ours[i] += theirs[i]
                pack(ours, 0, words, access * each)
                store(sum_at + np.uint64(access * step * item), access * step < left and sum_at != np.uint64(0), words, access * each)

    @cuda.jit(device=True, forceinline=True)
    def prefetch(address, left):
        for access in range(accesses):
            if access * step < left:
                ptx.prefetch_l2(address + np.uint64(access * step * item))

    return place, fetch, gather, prefetch
