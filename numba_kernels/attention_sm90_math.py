"""What a consumer warpgroup of attention on Hopper computes of its 64 rows: S = Q K^T, the online softmax, O += P V, and sums of P.

Tiles lie in shared memory as TMA writes them: 64-column chunks of 128-byte rows, 128-byte swizzle, one chunk after the other. A thread
holds columns 8 j + 2 t, + 1 of rows g and g + 8 of its warp's 16 rows, for every j: registers 4 j .. 4 j + 3, lane = 4 g + t.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.attention_sm90_config import NARROW, Config

# Matrix descriptors: 128-byte swizzle, groups of 8 rows 1024 bytes apart; bits 16 to 29: from one 64-column chunk to the next, in 16 bytes,
# read for MN-major operands alone.
_SWIZZLED = (1 << 62) | (64 << 32)
# A base stays while no score of the row is beyond it by more than 2 ** 8, so that O is seldom rescaled. It is what FlashAttention-4 does.
SLACK = {"16-bit": np.float32(8), NARROW: np.float32(0)}
# The base of a row that has seen nothing: finite, since -inf - -inf is NaN, and below whatever may come.
LOWEST = np.float32(-3e38)
# A base may be any score of the row, as long as P stays within the dtype and sums within float32: the most that a thread's share of a row
# of one tile may add up to before the row is measured anew.
LOOSE = ptx.half_constant({"float16": 2.0 ** 15, "bfloat16": 2.0 ** 60})
# A number of e4m3 is nearly its own logarithm: its bits, as an integer, are 8 * (log2 + 7) with the line 1 + f for the curve 2 ** f. So
# many times the smallest float16 have the same bits.
# A base is set so that the highest P is 2 ** this. For e4m3: 3 octaves below the 448 that it may grow to, 12 above 2 ** -6, below which
# bits are lost; and where the line is above the curve by as much as it is on average, or the highest P would have 4 % less than its share.
HIGHEST_P = {"16-bit": np.float32(0), NARROW: np.float32(5.75)}
CODES_OCTAVE, CODE_OF_ONE, LAST_CODE = np.float32(8 * 2.0 ** -24), np.float32(56 * 2.0 ** -24), 126


def make_products(config: Config) -> tuple[Callable, Callable, Callable, Callable]:
    """(take_q, scores, column_major, accumulate).

    take_q(query, tile): this warpgroup's rows of Q, at shared address `tile`, to registers as A fragments, if they are kept there.
    scores(score, query, q_tile, k_tile): score = Q K^T, Q from registers or from q_tile. column_major(address): descriptor of V.
    accumulate(out, prob, v): out += P V. Products start one wgmma group, whose registers must not be touched before it is waited for.
    """
    depth = 32 if config.narrow else 16  # of a product: 32 bytes
    steps, key_steps = config.head_dim // depth, config.keys // depth
    q_chunk, k_chunk = config.rows * 128 // 16, config.keys * 128 // 16
    # From one product of P V to the next, and to the fourth after it: down the rows of V, or along those of V turned.
    v_step, v_leap = (2, config.v_chunk_bytes // 16) if config.narrow else (128, 4 * 128)
    product, product_q = hopper.wgmma_shared(config.dtype, config.keys), hopper.wgmma_registers(config.dtype, config.keys, True)
    product_p, q_registers = hopper.wgmma_registers(config.dtype, config.v_columns, False), config.q_registers
    plain, strided = np.uint64(_SWIZZLED), np.uint64(_SWIZZLED | (0 if config.narrow else k_chunk << 16))
    mask = np.uint32(0x3FFFF)

    @cuda.jit(device=True, forceinline=True)
    def row_major(address):
        return np.uint64(plain | np.uint64((address & mask) >> np.uint32(4)))

    @cuda.jit(device=True, forceinline=True)
    def column_major(address):
        return np.uint64(strided | np.uint64((address & mask) >> np.uint32(4)))

    @cuda.jit(device=True, forceinline=True)
    def take_q(query, tile):
        thread = np.uint32(cuda.threadIdx.x)
        row = np.uint32((thread >> np.uint32(1)) & np.uint32(48)) | (thread & np.uint32(15))
        line, low, high = np.uint32(tile + row * np.uint32(128)), row & np.uint32(7), (thread >> np.uint32(4)) & np.uint32(1)
        for d in range(steps):
            at = np.uint32(line + np.uint32(d // 4 * q_chunk * 16) + np.uint32(16) * (np.uint32(np.uint32(d % 4 * 2) + high) ^ low))
            query[4 * d], query[4 * d + 1], query[4 * d + 2], query[4 * d + 3] = ptx.ldmatrix_x4(at)

    @cuda.jit(device=True, forceinline=True)
    def scores(score, query, q_tile, k_tile):
        k = row_major(ptx.uniform(k_tile))
        hopper.wgmma_fence()
        if q_registers:
            for d in range(steps):
                product_q(score, 0, query[4 * d], query[4 * d + 1], query[4 * d + 2], query[4 * d + 3],
                          k + np.uint64(d // 4 * k_chunk + d % 4 * 2), np.uint32(d))
        else:
            q = row_major(ptx.uniform(q_tile))
            for d in range(steps):
                within = d % 4 * 2
                product(score, 0, q + np.uint64(d // 4 * q_chunk + within), k + np.uint64(d // 4 * k_chunk + within), np.uint32(d))
        hopper.wgmma_commit()

    @cuda.jit(device=True, forceinline=True)
    def accumulate(out, prob, v):
        hopper.wgmma_fence()
        for s in range(key_steps):
            product_p(out, 0, prob[4 * s], prob[4 * s + 1], prob[4 * s + 2], prob[4 * s + 3],
                      v + np.uint64(s // 4 * v_leap + s % 4 * v_step), np.uint32(1))
        hopper.wgmma_commit()

    return take_q, scores, column_major, accumulate


def make_softmax(config: Config) -> tuple[Callable, Callable, Callable, Callable, Callable, Callable]:
    """(sample, highest, settle, powers, rescale, pack).

    A row is measured from a base: P = 2 ** (factor * score - base). sample(score), highest(score): the highest of a few and of all scores
    of a thread's two rows. settle(high_0, high_1, base, factor, slack) -> (r0, r1): a base raised to the highest of the quad where that is
    beyond it by more than slack, r what O and the sums so far must be multiplied by. powers(score, base, factor) -> (sum_0, sum_1,
    outgrown): score := P, the sums of the two rows, and not 0 where the tile must be measured anew; in 8 bits P is pairs of codes, and P V
    gives the sums. rescale(out, total, r0, r1), unless all of the warp are 1. pack(prob, score): P in the dtype, as the A fragments of P V.
    """
    tiles, out_tiles = config.keys // 8, config.v_columns // 8
    quad_1, quad_2 = ptx.shuffle_xor[1], ptx.shuffle_xor[2]
    pair = ptx.PAIR[config.out_dtype]
    step, highest_p, quads = max(1, tiles // 2), HIGHEST_P[config.dtype], tiles // 2

    @cuda.jit(device=True, forceinline=True)
    def raised(old, high, factor, slack):
        high = ptx.maximum(high, quad_1(high))
        high = ptx.maximum(high, quad_2(high)) * factor - highest_p
        return high if high - old > slack else old

    @cuda.jit(device=True, forceinline=True)
    def sample(score):
        high_0, high_1 = ptx.maximum(score[0], score[1]), ptx.maximum(score[2], score[3])
        for j in range(step, tiles, step):
            high_0 = ptx.maximum(high_0, ptx.maximum(score[4 * j], score[4 * j + 1]))
            high_1 = ptx.maximum(high_1, ptx.maximum(score[4 * j + 2], score[4 * j + 3]))
        return high_0, high_1

    @cuda.jit(device=True, forceinline=True)
    def highest(score):
        even_0, odd_0, even_1, odd_1 = score[0], score[1], score[2], score[3]
        for j in range(1, tiles):
            even_0 = ptx.maximum(even_0, score[4 * j])
            odd_0 = ptx.maximum(odd_0, score[4 * j + 1])
            even_1 = ptx.maximum(even_1, score[4 * j + 2])
            odd_1 = ptx.maximum(odd_1, score[4 * j + 3])
        return ptx.maximum(even_0, odd_0), ptx.maximum(even_1, odd_1)

    @cuda.jit(device=True, forceinline=True)
    def settle(high_0, high_1, base, factor, slack):
        new_0, new_1 = raised(base[0], high_0, factor, slack), raised(base[1], high_1, factor, slack)
        r0, r1 = ptx.exp2(base[0] - new_0), ptx.exp2(base[1] - new_1)
        base[0], base[1] = new_0, new_1
        return r0, r1

    @cuda.jit(device=True, forceinline=True)
    def powers(score, base, factor):
        base_0, base_1 = base[0], base[1]
        for i in range(4):
            score[i] = ptx.exp2(ptx.fma(score[i], factor, -(base_0 if i < 2 else base_1)))
        sum_0, sum_1, sum_2, sum_3 = score[0], score[1], score[2], score[3]
        for j in range(1, tiles):
            score[4 * j] = ptx.exp2(ptx.fma(score[4 * j], factor, -base_0))
            score[4 * j + 1] = ptx.exp2(ptx.fma(score[4 * j + 1], factor, -base_0))
            score[4 * j + 2] = ptx.exp2(ptx.fma(score[4 * j + 2], factor, -base_1))
            score[4 * j + 3] = ptx.exp2(ptx.fma(score[4 * j + 3], factor, -base_1))
            sum_0 += score[4 * j]
            sum_1 += score[4 * j + 1]
            sum_2 += score[4 * j + 2]
            sum_3 += score[4 * j + 3]
        sum_0, sum_1 = sum_0 + sum_1, sum_2 + sum_3
        return sum_0, sum_1, np.uint32(sum_0 > LOOSE or sum_1 > LOOSE)

    @cuda.jit(device=True, forceinline=True)
    def codes(score, base, factor):
        slope = factor * CODES_OCTAVE
        from_0, from_1 = ptx.fma(base[0], -CODES_OCTAVE, CODE_OF_ONE), ptx.fma(base[1], -CODES_OCTAVE, CODE_OF_ONE)
        highest = np.uint32(0)
        for j in range(tiles):
            upper = hopper.f16_pair_relu(ptx.fma(score[4 * j], slope, from_0), ptx.fma(score[4 * j + 1], slope, from_0))
            lower = hopper.f16_pair_relu(ptx.fma(score[4 * j + 2], slope, from_1), ptx.fma(score[4 * j + 3], slope, from_1))
            highest = hopper.max_u16_pair(hopper.max_u16_pair(upper, lower), highest)
            score[4 * j], score[4 * j + 2] = ptx.bits_f32(upper), ptx.bits_f32(lower)
        outgrown = np.uint32(highest + np.uint32(0x10001 * (0x7FFF - LAST_CODE))) & np.uint32(0x80008000)
        return np.float32(0), np.float32(0), outgrown

    @cuda.jit(device=True, forceinline=True)
    def rescale(out, total, r0, r1):
        if ptx.ballot(np.uint32(r0 != np.float32(1) or r1 != np.float32(1))) != np.uint32(0):
            total[0] *= r0
            total[1] *= r1
            for j in range(out_tiles):
                out[4 * j] *= r0
                out[4 * j + 1] *= r0
                out[4 * j + 2] *= r1
                out[4 * j + 3] *= r1

    @cuda.jit(device=True, forceinline=True)
    def pack(prob, score):
        for i in range(2 * tiles):
            prob[i] = pair(score[2 * i], score[2 * i + 1])

    @cuda.jit(device=True, forceinline=True)
    def pack_narrow(prob, score):
        for i in range(quads):
            for h in range(2):
                at = 8 * i + 2 * h
                prob[2 * i + h] = ptx.permute(ptx.f32_bits(score[at]), ptx.f32_bits(score[at + 4]), np.uint32(0x6420))

    if config.narrow:
        return sample, highest, settle, codes, rescale, pack_narrow
    return sample, highest, settle, powers, rescale, pack


def make_sums(config: Config) -> tuple[Callable, Callable, Callable]:
    """(no_sums, some_sums, all_sums) of P in 8 bits, of a thread's two rows. Left in the tensor cores they would lose what lies 14 bits
    below them, of products that are all positive: a fifteenth of 4096 keys, a quarter of 16384. There is no register for them; they wait
    in shared memory.

    no_sums(base): at first. all_sums(out, base, r0, r1) -> (sums so far, with what P V has added since the last time) * r. some_sums(...,
    waiting): the same in every fourth tile, and where r is not 1.
    """
    sums_at, behind = np.uint32(config.sums_at), config.v_columns // 2

    @cuda.jit(device=True, forceinline=True)
    def place(base):
        return np.uint32(base + sums_at + np.uint32(8) * ptx.here(np.uint32(cuda.threadIdx.x)))

    @cuda.jit(device=True, forceinline=True)
    def no_sums(base):
        ptx.st_shared_64(place(base), np.uint32(0), np.uint32(0))

    @cuda.jit(device=True, forceinline=True)
    def all_sums(out, base, r0, r1):
        at = place(base)
        upper, lower = ptx.ld_shared_64(at)
        sum_0, sum_1 = (ptx.bits_f32(upper) + out[behind - 4]) * r0, (ptx.bits_f32(lower) + out[behind - 2]) * r1
        ptx.st_shared_64(at, ptx.f32_bits(sum_0), ptx.f32_bits(sum_1))
        for i in range(behind - 4, behind):
            out[i] = np.float32(0)
        return sum_0, sum_1

    @cuda.jit(device=True, forceinline=True)
    def some_sums(out, base, r0, r1, waiting):
        moved = ptx.ballot(np.uint32(r0 != np.float32(1) or r1 != np.float32(1)))
        if waiting & np.int32(3) == np.int32(0) or moved != np.uint32(0):
            all_sums(out, base, r0, r1)

    return no_sums, some_sums, all_sums


def make_clear(config: Config) -> Callable:
    """clear(tile, first): a warpgroup sets rows first .. keys - 1 of a tile of V to 0, since 0 * what lies there might be NaN."""
    parts, keys = config.chunks, config.keys

    @cuda.jit(device=True, forceinline=True)
    def clear(tile, first):
        zero = np.uint32(0)
        thread = np.uint32(cuda.threadIdx.x) & np.uint32(127)
        at = np.uint32(np.uint32(first) * np.uint32(128) + thread * np.uint32(16))
        while at < np.uint32(keys * 128):
            for c in range(parts):
                ptx.st_shared_128(tile + np.uint32(c * keys * 128) + at, zero, zero, zero, zero)
            at += np.uint32(2048)
        hopper.fence_proxy_async()

    return clear
