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
from ftops.numba_kernels.rows import DTYPES, ITEM, make_convert, make_io, words_of

# (accesses of a thread, threads of a row, rows of a block), the last also for longer rows. Two accesses are for heads of 128, where half
# the arithmetic would be on nothing, three for rows of 768. One element an access: odd lengths are rare, and get few variants.
WIDE_SIZES = ((2, 8, 16), (4, 8, 16), (3, 32, 4), (4, 32, 4), (4, 128, 1), (4, 256, 1), (4, 512, 1))
NARROW_SIZES = ((16, 32, 4), (16, 64, 1), (16, 256, 1))
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
    sizes = WIDE_SIZES if vec * ITEM[dtype] == 16 else NARROW_SIZES
    for accesses, threads, rows in sizes:
        if length <= accesses * threads * vec:
            return Config(dtype, vec, accesses, threads, rows)
    return Config(dtype, vec, *sizes[-1], True)


def configs() -> Iterator[Config]:
    """Every Config that `pick` can give."""
    for dtype in DTYPES:
        for vec, sizes in ((16 // ITEM[dtype], WIDE_SIZES), (1, NARROW_SIZES)):
            longest = [accesses * threads * vec for accesses, threads, _ in sizes]
            yield from (pick(dtype, length, vec) for length in (*longest, longest[-1] + vec))


@functools.cache
def make_tile(config: Config) -> tuple[Callable, Callable, Callable, Callable, Callable]:
    """(place, within, fetch, gather, prefetch) of a tile.

    place(rows, length) -> (row, element of the thread's first access, elements from there to the row's end): the other accesses follow
    `step` apart. Beyond the last row that is 0: such threads read and write nothing but take part in the sums. within(remains) is what a
    tile may hold of it, `left` below, in 32 bits since each access is compared with it.
    fetch(address, left, words) loads the thread's accesses from `address`; beyond `left` elements there is nothing, and the words are 0.
    gather(x_at, residual_at, sum_at, done, left, words) loads x from element `done` on, adds the residual if residual_at is not 0, rounds,
    and writes the sum if sum_at is not 0. prefetch(address, left) asks for what fetch will read, without holding registers.
    """
    vec, item, each, accesses = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), config.accesses
    kept, step, tile, rows_a_block = each * accesses, config.threads * vec, config.threads * vec * accesses, config.rows
    mask, shift = config.threads - 1, config.threads.bit_length() - 1
    load, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)

    @cuda.jit(device=True, forceinline=True)
    def place(rows, length):
        thread = np.uint32(cuda.threadIdx.x)
        row = np.int64(cuda.blockIdx.x) * np.int64(rows_a_block) + np.int64(thread >> np.uint32(shift))
        first = np.int64((thread & np.uint32(mask)) * np.uint32(vec))
        return row, first, length - first if row < rows else np.int64(0)

    @cuda.jit(device=True, forceinline=True)
    def within(remains):
        return np.int32(min(remains, np.int64(tile)))

    @cuda.jit(device=True, forceinline=True)
    def fetch(address, left, words):
        for access in range(accesses):
            load(address + np.uint64(access * step * item), access * step < left, words, access * each)

    @cuda.jit(device=True, forceinline=True)
    def gather(x_at, residual_at, sum_at, done, left, words):
        ahead = np.uint64(done * item)
        fetch(x_at + ahead, left, words)
        if residual_at != np.uint64(0):
            others = cuda.local.array(kept, np.uint32)
            ours = cuda.local.array(vec, np.float32)
            theirs = cuda.local.array(vec, np.float32)
            fetch(residual_at + ahead, left, others)
            for access in range(accesses):
                unpack(words, access * each, ours, 0)
                unpack(others, access * each, theirs, 0)
                for i in range(vec):
                    ours[i] += theirs[i]
                pack(ours, 0, words, access * each)
                store(sum_at + ahead + np.uint64(access * step * item), access * step < left and sum_at != np.uint64(0), words,
                      access * each)

    @cuda.jit(device=True, forceinline=True)
    def prefetch(address, left):
        for access in range(accesses):
            if access * step < left:
                ptx.prefetch_l2(address + np.uint64(access * step * item))

    return place, within, fetch, gather, prefetch
