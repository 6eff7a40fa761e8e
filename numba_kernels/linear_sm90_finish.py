"""What follows the product of the linear on Hopper: scale, bias, activation, residual, and the rows of out.

A thread holds features g and g + 8 of its warp's 16, rows 8 j + 2 t, + 1 of x, for every j: registers 4 j .. 4 j + 3, lane = 4 g + t.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.activation import make_activate
from ftops.numba_kernels.linear_sm90_config import Config


def make_finish(config: Config) -> tuple[Callable, Callable]:
    """(end, end_shared): out[first_row : first_row + columns, first : first + 64] from a warpgroup's sums, to rows and features that exist.

    end(acc, ...): from its registers. end_shared(acc, base, block, blocks, ...): from those of all blocks of a cluster, through the shared
    memory of their stages, which no more is in use: each block does its share of the columns, and adds in the order of the blocks.
    A fragment, rows g and g + 8 of W times 8 of x, is rounded, turned, and halves are traded between neighbours: the four lanes of a row
    of x then write 32 bytes, a whole sector. What is added last comes the same way back.
    """
    tiles, scaled, dtype = config.columns // 8, config.bits == 8, config.dtype
    low, high, pair, turn = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.PAIR[dtype], ptx.movmatrix_trans
    neighbour, activate, consumers, own_bytes = ptx.shuffle_xor[1], make_activate(4), np.uint32(256), np.uint32(16 * 256)

    @cuda.jit(device=True, forceinline=True)
    def traded(word):
        return ptx.f32_bits(neighbour(ptx.bits_f32(word)))

    @cuda.jit(device=True, forceinline=True)
    def fetch(at, here, wide, left):
        """Four neighbouring values of 16 bits, as two words."""
        if wide:
            return hopper.ld_written_64_if(at, here)
        first = hopper.ld_written_16_if(at, here)
        second = hopper.ld_written_16_if(at + np.uint64(2), np.uint32(here != np.uint32(0) and left > np.int32(1)))
        third = hopper.ld_written_16_if(at + np.uint64(4), np.uint32(here != np.uint32(0) and left > np.int32(2)))
        fourth = hopper.ld_written_16_if(at + np.uint64(6), np.uint32(here != np.uint32(0) and left > np.int32(3)))
        return np.uint32(first | second << np.uint32(16)), np.uint32(third | fourth << np.uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def put(at, first, second, here, wide, left):
        if wide:
            ptx.st_global_64_if(at, first, second, here)
        else:
            ptx.st_global_16_if(at, first, here)
            ptx.st_global_16_if(at + np.uint64(2), first >> np.uint32(16), np.uint32(here != np.uint32(0) and left > np.int32(1)))
            ptx.st_global_16_if(at + np.uint64(4), second, np.uint32(here != np.uint32(0) and left > np.int32(2)))
            ptx.st_global_16_if(at + np.uint64(6), second >> np.uint32(16), np.uint32(here != np.uint32(0) and left > np.int32(3)))

    @cuda.jit(device=True, forceinline=True)
    def emit(v, scale_0, scale_1, bias_0, bias_1, form, linear, cubic, residual_at, out_at, here, wide, left):
        odd = np.uint32(cuda.threadIdx.x) & np.uint32(1) != np.uint32(0)
        for r in range(4):
            bias = bias_0 if r < 2 else bias_1
            v[r] = ptx.fma(v[r], scale_0 if r < 2 else scale_1, bias) if scaled else v[r] + bias
        if form >= 0:
            activate(v, form, linear, cubic)
        if residual_at != np.uint64(0):
            first, second = fetch(residual_at, here, wide, left)
            given = traded(first if odd else second)
            upper, lower = turn(given if odd else first), turn(second if odd else given)
            v[0] += low(upper)
            v[1] += high(upper)
            v[2] += low(lower)
            v[3] += high(lower)
        upper, lower = turn(pair(v[0], v[1])), turn(pair(v[2], v[3]))
        given = traded(upper if odd else lower)
        put(out_at, given if odd else upper, lower if odd else given, here, wide, left)

    @cuda.jit(device=True, forceinline=True)
    def locate(first, first_row, features, scale_gl, bias_gl, residual_gl, residual_stride, out_gl):
        """Scales and biases of a thread's two features; where its part of the first fragment is in the residual and in out; its row there,
        and how many features are left from its first on."""
        thread = np.uint32(cuda.threadIdx.x)
        lane = thread & np.uint32(31)
        first = np.int32(first + np.int32((thread >> np.uint32(5)) * np.uint32(16)))
        g = np.int32(lane >> np.uint32(2))
        upper = np.uint64(np.uint32(min(np.int32(first + g), np.int32(features - np.int32(1)))))
        lower = np.uint64(np.uint32(min(np.int32(first + g + np.int32(8)), np.int32(features - np.int32(1)))))
        scale_0, scale_1, bias_0, bias_1 = np.float32(1), np.float32(1), np.float32(0), np.float32(0)
        if scaled:
            scale_0 = ptx.ld_written_f32(scale_gl + np.uint64(4) * upper)
            scale_1 = ptx.ld_written_f32(scale_gl + np.uint64(4) * lower)
        if bias_gl != np.uint64(0):
            bias_0 = low(ptx.ld_written_16(bias_gl + np.uint64(2) * upper))
            bias_1 = low(ptx.ld_written_16(bias_gl + np.uint64(2) * lower))
        feature = np.int32(first + np.int32(np.uint32(8) * (lane & np.uint32(1)) + np.uint32(2) * (lane & np.uint32(2))))
        row, along = np.int32(first_row + g), np.uint64(2) * np.uint64(np.uint32(feature))
        residual_at = np.uint64(0)
        if residual_gl != np.uint64(0):
            residual_at = residual_gl + np.uint64(2) * np.uint64(np.uint32(row)) * np.uint64(residual_stride) + along
        out_at = out_gl + np.uint64(2) * np.uint64(np.uint32(row)) * np.uint64(np.uint32(features)) + along
        return scale_0, scale_1, bias_0, bias_1, residual_at, out_at, row, np.int32(features - feature)

    @cuda.jit(device=True, forceinline=True)
    def end(acc, first, first_row, rows, features, scale_gl, bias_gl, residual_gl, residual_stride, out_gl, wide, form, linear, cubic):
        scale_0, scale_1, bias_0, bias_1, residual_at, out_at, row, left = locate(
            first, first_row, features, scale_gl, bias_gl, residual_gl, residual_stride, out_gl)
        out_step, residual_step = np.uint64(16) * np.uint64(np.uint32(features)), np.uint64(0)
        if residual_gl != np.uint64(0):
            residual_step = np.uint64(16) * np.uint64(residual_stride)
        v = cuda.local.array(4, np.float32)
        # Eight fragments at a time, then the next eight take their place: 32 of them written out would be 100 KB of machine code.
        waiting = ptx.here(np.uint32(tiles // 8))
        while waiting != np.uint32(0):
            for j in range(8):
                for r in range(4):
                    v[r] = acc[4 * j + r]
                here = np.uint32(row < rows and left > np.int32(0))
                emit(v, scale_0, scale_1, bias_0, bias_1, form, linear, cubic, residual_at, out_at, here, wide, left)
                residual_at, out_at, row = residual_at + residual_step, out_at + out_step, np.int32(row + np.int32(8))
            for i in range(4 * tiles - 32):
                acc[i] = acc[i + 32]
            waiting = ptx.here(np.uint32(waiting - np.uint32(1)))

    @cuda.jit(device=True, forceinline=True)
    def end_shared(acc, base, block, blocks, first, first_row, rows, features, scale_gl, bias_gl, residual_gl, residual_stride, out_gl,
                   wide, form, linear, cubic):
        mine = np.uint32(base + np.uint32(16) * np.uint32(cuda.threadIdx.x))
        hopper.bar_sync(np.uint32(1), consumers)  # the other warpgroup's products have read the stages, too
        for j in range(tiles):
            ptx.st_shared_128(mine + np.uint32(j) * own_bytes, ptx.f32_bits(acc[4 * j]), ptx.f32_bits(acc[4 * j + 1]),
                              ptx.f32_bits(acc[4 * j + 2]), ptx.f32_bits(acc[4 * j + 3]))
        hopper.cluster_arrive()
        hopper.cluster_wait()
        share = ptx.div_u32(np.uint32(tiles), blocks)
        j = np.uint32(block * share)
        scale_0, scale_1, bias_0, bias_1, residual_at, out_at, row, left = locate(
            first, np.int32(first_row + np.int32(np.uint32(8) * j)), features, scale_gl, bias_gl, residual_gl, residual_stride, out_gl)
        v = cuda.local.array(4, np.float32)
        for _ in range(share):
            for r in range(4):
                v[r] = np.float32(0)
            for other in range(blocks):
                more = hopper.ld_cluster_f32x4(np.uint32(mine + j * own_bytes), np.uint32(other))
                for r in range(4):
                    v[r] += more[r]
            here = np.uint32(row < rows and left > np.int32(0))
            emit(v, scale_0, scale_1, bias_0, bias_1, form, linear, cubic, residual_at, out_at, here, wide, left)
            out_at += np.uint64(16) * np.uint64(np.uint32(features))
            if residual_gl != np.uint64(0):
                residual_at += np.uint64(16) * np.uint64(residual_stride)
            j, row = np.uint32(j + np.uint32(1)), np.int32(row + np.int32(8))
        hopper.cluster_arrive()
        hopper.cluster_wait()  # the others have read what this block holds

    return end, end_shared
