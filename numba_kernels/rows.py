"""Device helpers for kernels that walk the rows of a tensor: 16-byte accesses, float32 values, sums over the threads of a row.

Elements travel as 32-bit words: what was loaded keeps its own size in registers until it is used.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx

DTYPES = ("float32", *ptx.HALVES)
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "16-bit": 2}
DTYPE_NAME = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def words_of(dtype: str, vec: int) -> int:
    """32-bit registers that one access of `vec` elements fills."""
    return max(1, vec * ITEM[dtype] // 4)


@functools.cache
def make_io(dtype: str, vec: int) -> tuple[Callable, Callable]:
    """(load, store) of one access, `vec` elements: 16 bytes at an address that 16 divides, or one element.

    load(address, live, words, at) fills words[at:] where live, with zeros elsewhere; store(address, live, words, at) writes where live.
    Loads do not take the read-only path: the kernel before, which need not have ended when this one starts, may have written what is read.
    """
    if vec * ITEM[dtype] == 16:
        @cuda.jit(device=True, forceinline=True)
        def load(address, live, words, at):
            words[at], words[at + 1], words[at + 2], words[at + 3] = ptx.ld_written_128_if(address, live)

        @cuda.jit(device=True, forceinline=True)
        def store(address, live, words, at):
            ptx.st_global_128_if(address, words[at], words[at + 1], words[at + 2], words[at + 3], live)
    else:
        fetch, put = (ptx.ld_written_32_if, ptx.st_global_32_if) if dtype == "float32" else (ptx.ld_written_16_if, ptx.st_global_16_if)

        @cuda.jit(device=True, forceinline=True)
        def load(address, live, words, at):
            words[at] = fetch(address, live)

        @cuda.jit(device=True, forceinline=True)
        def store(address, live, words, at):
            put(address, words[at], live)
    return load, store


@functools.cache
def make_convert(dtype: str, vec: int) -> tuple[Callable, Callable]:
    """(unpack, pack) of one access: unpack(words, at, values, to) gives `vec` float32, pack(values, at, words, to) rounds them back."""
    if dtype == "float32":
        @cuda.jit(device=True, forceinline=True)
        def unpack(words, at, values, to):
            for i in range(vec):
                values[to + i] = ptx.bits_f32(words[at + i])

        @cuda.jit(device=True, forceinline=True)
        def pack(values, at, words, to):
            for i in range(vec):
                words[to + i] = ptx.f32_bits(values[at + i])
        return unpack, pack

    low, high, pair = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.PAIR[dtype]
    if vec == 1:
        @cuda.jit(device=True, forceinline=True)
        def unpack(words, at, values, to):
            values[to] = low(words[at])

        @cuda.jit(device=True, forceinline=True)
        def pack(values, at, words, to):
            words[to] = pair(values[at], np.float32(0))
    else:
        @cuda.jit(device=True, forceinline=True)
        def unpack(words, at, values, to):
            for i in range(vec // 2):
                values[to + 2 * i], values[to + 2 * i + 1] = low(words[at + i]), high(words[at + i])

        @cuda.jit(device=True, forceinline=True)
        def pack(values, at, words, to):
            for i in range(vec // 2):
                words[to + i] = pair(values[at + 2 * i], values[at + 2 * i + 1])
    return unpack, pack


def make_sum(threads: int) -> tuple[Callable, Callable]:
    """(total, totals): total(x) is the sum of x over each `threads` neighbouring threads, given to all: 8, 32, or a block of 64, 128, 256
    or 512 (one barrier); totals(x, y) gives two sums at once.

    Each for one place in the kernel, passed once: what it keeps in shared memory is not guarded against a second pass.
    """
    warps = threads // 32
    x1, x2, x4, x8, x16 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))

    @cuda.jit(device=True, forceinline=True)
    def two(x):
        return x + x1(x)

    @cuda.jit(device=True, forceinline=True)
    def four(x):
        return two(x + x2(x))

    @cuda.jit(device=True, forceinline=True)
    def eight(x):
        return four(x + x4(x))

    @cuda.jit(device=True, forceinline=True)
    def sixteen(x):
        return eight(x + x8(x))

    @cuda.jit(device=True, forceinline=True)
    def warp(x):
        return sixteen(x + x16(x))

    if threads <= 32:
        within = {8: eight, 32: warp}[threads]

        @cuda.jit(device=True, forceinline=True)
        def both(x, y):
            return within(x), within(y)
        return within, both
    over_warps = {2: two, 4: four, 8: eight, 16: sixteen}[warps]

    @cuda.jit(device=True, forceinline=True)
    def block(x):
        partial = cuda.shared.array(warps, np.float32)
        thread = np.uint32(cuda.threadIdx.x)
        x = warp(x)
        if thread & np.uint32(31) == 0:
            partial[thread >> np.uint32(5)] = x
        cuda.syncthreads()
        return over_warps(partial[thread & np.uint32(warps - 1)])

    @cuda.jit(device=True, forceinline=True)
    def block_both(x, y):
        partial_x, partial_y = cuda.shared.array(warps, np.float32), cuda.shared.array(warps, np.float32)
        thread = np.uint32(cuda.threadIdx.x)
        x, y = warp(x), warp(y)
        if thread & np.uint32(31) == 0:
            partial_x[thread >> np.uint32(5)], partial_y[thread >> np.uint32(5)] = x, y
        cuda.syncthreads()
        return over_warps(partial_x[thread & np.uint32(warps - 1)]), over_warps(partial_y[thread & np.uint32(warps - 1)])

    return block, block_both


@cuda.jit(device=True, forceinline=True)
def rsqrt(x):
    """1 / sqrt(x) to one unit in the last place; the instruction alone is two off."""
    y = ptx.rsqrt(x)
    better = ptx.fma(y * np.float32(0.5), ptx.fma(-x * y, y, np.float32(1)), y)
    return better if y > np.float32(0) and y < np.float32(np.inf) else y


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x[..., N] as (tensor whose rows are one stride apart and dense inside, that stride in elements); copies only if it must."""
    if x.dim() == 1:
        return (x if x.stride(0) == 1 else x.contiguous()), x.shape[0]
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        stride = None
        expected = None
        for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if stride is None:
                stride = expected = step
            if step != expected:
                break
            expected = step * size
        else:
            return x, x.shape[-1] if stride is None else stride
    return x.contiguous(), x.shape[-1]


def widest(item: int, multiples: int) -> int:
    """Elements of `item` bytes an access takes: 16 bytes of them if 16 divides every address, length and stride (bytes), otherwise one.

    multiples: all of them joined by `|`, which 16 divides where it divides each.
    """
    return 1 if multiples & 15 else 16 // item
