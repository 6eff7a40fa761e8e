"""The products of a consumer warpgroup of the linear on Hopper: 64 features of W x^T.

W is wgmma's A operand and x its B. Where both have as many bits W is read by wgmma where TMA has put it; where W has fewer it comes through
registers (linear_sm90_widen.py). x lies in chunks, rows of 128 bytes, 128-byte swizzle.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.linear_sm90_config import NARROW, ROW_BYTES, Config
from ftops.numba_kernels.linear_sm90_widen import make_widen

_SWIZZLED = np.uint64((1 << 62) | (64 << 32))  # a matrix descriptor's: 128-byte swizzle, groups of 8 rows 1024 bytes apart
_SHIFTED = np.uint32(0x3FFFF)
PART = 128  # columns of e4m3 by e4m3 that have sums of their own at a time


@cuda.jit(device=True, forceinline=True)
def descriptor(address):
    return np.uint64(_SWIZZLED | np.uint64((address & _SHIFTED) >> np.uint32(4)))


def make_multiply(config: Config) -> tuple[Callable, Callable]:
    """(place, multiply). place(base, group_shift, record) -> where a thread's part of W is in the first stage.

    multiply(acc, where, stage, x, group_shift, record, before, now): acc += W x^T of the stage `stage` bytes further, whose x is at
    shared address x. before, now: barriers that say of the stage before and of this one that nothing reads them any more, 0 where a thread
    is not to arrive there. The last group of products may still run when it returns: then `now`, which is to be given as the next `before`.
    """
    columns, wait_0, wait_1 = config.columns, hopper.WGMMA_WAIT[0], hopper.WGMMA_WAIT[1]
    add, chunk_units = np.uint32(1), ROW_BYTES * columns // 16

    @cuda.jit(device=True, forceinline=True)
    def release(before):
        if before != np.uint32(0):
            hopper.mbarrier_arrive(before)

    if config.kind == "16-bit" or config.narrow:
        product = hopper.wgmma_shared(NARROW.get(config.kind, config.dtype), columns)

        @cuda.jit(device=True, forceinline=True)
        def place(base, group_shift, record):
            return np.uint32(base + (np.uint32(cuda.threadIdx.x) >> np.uint32(7)) * np.uint32(64 * ROW_BYTES))

        if config.kind != "e4m3_e4m3":
            @cuda.jit(device=True, forceinline=True)
            def multiply(acc, where, stage, x, group_shift, record, before, now):
                a, b = descriptor(ptx.uniform(where + stage)), descriptor(ptx.uniform(x))
                hopper.wgmma_fence()
                for s in range(4):
                    product(acc, 0, a + np.uint64(2 * s), b + np.uint64(2 * s), add)  # of 32 bytes of k, two units
                hopper.wgmma_commit()
                wait_1()
                release(before)
                return now
            return place, multiply

        product, parts, sums = hopper.wgmma_shared(NARROW[config.kind], PART), columns // PART, PART // 2

        @cuda.jit(device=True, forceinline=True)
        def multiply(acc, where, stage, x, group_shift, record, before, now):
            """The tensor cores keep 13 bits behind the first of a sum of products of e4m3: only those of a stage are added there, of some
            columns at a time, while the other warpgroup multiplies."""
            part = cuda.local.array(sums, np.float32)
            a, b = descriptor(ptx.uniform(where + stage)), descriptor(ptx.uniform(x))
            for p in range(parts):
                columns_at = np.uint64(PART * ROW_BYTES // 16 * p)
                hopper.wgmma_fence()
                for s in range(4):
                    product(part, 0, a + np.uint64(2 * s), b + columns_at + np.uint64(2 * s), np.uint32(s))
                hopper.wgmma_commit()
                wait_0()
                if p == parts - 1:
                    release(now)
                for i in range(sums):
                    acc[p * sums + i] += part[i]
            return np.uint32(0)
        return place, multiply

    product, (place, widen) = hopper.wgmma_registers(config.dtype, columns, True), make_widen(config)
    each = config.depth // 32  # products of a group
    words = 4 * each

    @cuda.jit(device=True, forceinline=True)
    def start(acc, a, b, first):
        hopper.wgmma_fence()
        for s in range(each):
            unit = (first + s) // 4 * chunk_units + (first + s) % 4 * 2
            product(acc, 0, a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3], b + np.uint64(unit), add)
        hopper.wgmma_commit()

    @cuda.jit(device=True, forceinline=True)
    def multiply(acc, where, stage, x, group_shift, record, before, now):
        """Two groups in turn, each with registers of its own: one is widened while the other is multiplied."""
        even = cuda.local.array(words, np.uint32)
        odd = cuda.local.array(words, np.uint32)
        b = descriptor(ptx.uniform(x))
        widen(even, where, stage, 0, group_shift, record)
        start(acc, even, b, 0)
        wait_1()
        release(before)
        widen(odd, where, stage, each, group_shift, record)
        start(acc, odd, b, each)
        wait_1()
        return now

    return place, multiply
