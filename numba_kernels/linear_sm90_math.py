"""What a consumer warpgroup of the linear on Hopper computes: 64 features of W x^T, and what follows the product.

W is wgmma's A operand and x its B: a thread holds features g and g + 8 of its warp's 16, rows 8 j + 2 t, + 1 of x, for every j, in
registers 4 j .. 4 j + 3, lane = 4 g + t. W of 16 bits is read by wgmma where TMA has put it; of 8 bits it is widened on its way to
registers. x lies in chunks of 64 values of k, rows of 128 bytes, 128-byte swizzle.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.activation import make_activate
from ftops.numba_kernels.linear_dequantise import FIRST_DOUBLED, SECOND_DOUBLED, make_pair
from ftops.numba_kernels.linear_sm90_config import Config

_SWIZZLED = np.uint64((1 << 62) | (64 << 32))  # a matrix descriptor's: 128-byte swizzle, groups of 8 rows 1024 bytes apart
_SHIFTED = np.uint32(0x3FFFF)


@cuda.jit(device=True, forceinline=True)
def descriptor(address):
    return np.uint64(_SWIZZLED | np.uint64((address & _SHIFTED) >> np.uint32(4)))


def make_place(config: Config) -> Callable:
    """place_w(base) -> (address, selector) of a thread's part of W in the first stage, for `multiply`."""
    pitch, shift = np.uint32(config.depth * config.item), np.uint32(0 if config.depth == 128 else 1)  # of rows of 128 or 64 bytes
    mask = np.uint32(7 if config.depth == 128 else 3)

    if config.kind == "16-bit":
        @cuda.jit(device=True, forceinline=True)
        def place_w(base):
            return np.uint32(base + (np.uint32(cuda.threadIdx.x) >> np.uint32(7)) * np.uint32(64 * 128)), np.uint32(0)
    else:
        @cuda.jit(device=True, forceinline=True)
        def place_w(base):
            """Of 16 values of k a lane takes 2 t, 2 t + 1 and those 8 further: halves of two words that it shares with a neighbour."""
            thread = np.uint32(cuda.threadIdx.x)
            g, t = (thread >> np.uint32(2)) & np.uint32(7), thread & np.uint32(3)
            row = np.uint32((thread >> np.uint32(5)) * np.uint32(16) + g)
            swizzle = np.uint32(((g >> shift) & mask) << np.uint32(4))
            address = np.uint32(base + row * pitch + swizzle + np.uint32(4) * (t >> np.uint32(1)))
            return address, SECOND_DOUBLED if t & np.uint32(1) != np.uint32(0) else FIRST_DOUBLED
    return place_w


def make_multiply(config: Config) -> Callable:
    """multiply(acc, w, selector, x, before): acc += W x^T of one stage, at shared addresses w (this thread's, from place_w) and x.

    The last group of products is still running when it returns. When none of the stage before is, a thread whose `before` is not 0
    arrives at that barrier.
    """
    columns, depth = config.columns, config.depth
    wait_1 = hopper.WGMMA_WAIT[1]
    add, chunk_units = np.uint32(1), 128 * columns // 16

    @cuda.jit(device=True, forceinline=True)
    def release(before):
        if before != np.uint32(0):
            hopper.mbarrier_arrive(before)

    if config.kind == "16-bit":
        product = hopper.wgmma_shared(config.dtype, columns)

        @cuda.jit(device=True, forceinline=True)
        def multiply(acc, w, selector, x, before):
            a, b = descriptor(ptx.uniform(w)), descriptor(ptx.uniform(x))
            hopper.wgmma_fence()
            for s in range(4):
                product(acc, 0, a + np.uint64(2 * s), b + np.uint64(2 * s), add)  # 16 values of k are 32 bytes, two units
            hopper.wgmma_commit()
            wait_1()
            release(before)
        return multiply

    product, pair = hopper.wgmma_registers(config.dtype, columns, True), make_pair(config.kind, config.dtype)
    each, below = depth // 32, np.uint32(8 * depth)  # products of a group; bytes to the row 8 further
    words = 4 * each

    @cuda.jit(device=True, forceinline=True)
    def widen(a, w, selector, first):
        """Products first .. first + each - 1."""
        for s in range(each):
            at = np.uint32(w ^ np.uint32(16 * (first + s)))
            for i in range(4):  # in the order of the fragment: rows g, g + 8, then both 8 values of k further
                word = ptx.ld_shared_32(at + np.uint32(i % 2) * below + np.uint32(8 * (i // 2)))
                a[4 * s + i] = pair(ptx.permute(word, word, selector))

    @cuda.jit(device=True, forceinline=True)
    def start(acc, a, b, first):
        hopper.wgmma_fence()
        for s in range(each):
            unit = (first + s) // 4 * chunk_units + (first + s) % 4 * 2
            product(acc, 0, a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3], b + np.uint64(unit), add)
        hopper.wgmma_commit()

    @cuda.jit(device=True, forceinline=True)
    def multiply(acc, w, selector, x, before):
        """Two groups in turn, each with registers of its own: one is widened while the other is multiplied."""
        even = cuda.local.array(words, np.uint32)
        odd = cuda.local.array(words, np.uint32)
        b = descriptor(ptx.uniform(x))
        widen(even, w, selector, 0)
        start(acc, even, b, 0)
        wait_1()
        release(before)
        widen(odd, w, selector, each)
        start(acc, odd, b, each)
        wait_1()

    return multiply


def make_finish(config: Config) -> tuple[Callable, Callable]:
    """(end, end_shared): out[first_row : first_row + columns, first : first + 64] from a warpgroup's sums, to rows and features that exist.

    end(acc, ...): from its registers. end_shared(acc, base, block, blocks, ...): from those of all blocks of a cluster, through the shared
    memory of their stages, which no more is in use: each block does its share of the columns, and adds in the order of the blocks.
    A fragment, rows g and g + 8 of W times 8 of x, is rounded, turned, and halves are traded between neighbours: the four lanes of a row
    of x then write 32 bytes, a whole sector. What is added last comes the same way back.
    """
    tiles, scaled, dtype = config.columns // 8, config.item == 1, config.dtype
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
    def end_part(acc, first, row, residual_at, out_at, others):
        scale_0, scale_1, bias_0, bias_1, form, linear, cubic, residual_step, out_step, rows, wide, left = others
        v = cuda.local.array(4, np.float32)
        for j in range(first, first + 8):
            for r in range(4):
                v[r] = acc[4 * j + r]
            here = np.uint32(row + np.int32(8 * j) < rows and left > np.int32(0))
            emit(v, scale_0, scale_1, bias_0, bias_1, form, linear, cubic, residual_at, out_at, here, wide, left)
            residual_at, out_at = residual_at + residual_step, out_at + out_step
        return residual_at, out_at

    @cuda.jit(device=True, forceinline=True)
    def end(acc, first, first_row, rows, features, scale_gl, bias_gl, residual_gl, residual_stride, out_gl, wide, form, linear, cubic):
        scale_0, scale_1, bias_0, bias_1, residual_at, out_at, row, left = locate(
            first, first_row, features, scale_gl, bias_gl, residual_gl, residual_stride, out_gl)
        out_step, residual_step = np.uint64(16) * np.uint64(np.uint32(features)), np.uint64(0)
        if residual_gl != np.uint64(0):
            residual_step = np.uint64(16) * np.uint64(residual_stride)
        others = scale_0, scale_1, bias_0, bias_1, form, linear, cubic, residual_step, out_step, rows, wide, left
        # Written out: LLVM keeps a longer loop as one, and acc in local memory with it.
        residual_at, out_at = end_part(acc, 0, row, residual_at, out_at, others)
        if tiles > 8:
            residual_at, out_at = end_part(acc, 8, row, residual_at, out_at, others)
        if tiles > 16:
            residual_at, out_at = end_part(acc, 16, row, residual_at, out_at, others)
            residual_at, out_at = end_part(acc, 24, row, residual_at, out_at, others)

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
