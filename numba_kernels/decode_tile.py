"""What a warp of decode_mma does with 16 keys: q's rows staged as B fragments, copies into its ring, scores, softmax, outputs.

K is the A operand and q the B operand of mma.m16n8k16: s^T = K q^T, o^T = V^T p^T, which pads the rows to 8 and not to 16. 8-bit caches
widen to float16 on the way from shared memory to the tensor cores.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.division import divide
from ftops.numba_kernels.narrow import make_widen

KEYS = 16  # keys a warp takes at a time: the k of one mma of p v
SCALES_BYTES = 2 * 4 * KEYS  # of the keys and values of a stage, where each has its own
NOTHING = -1e30  # a maximum before any key; finite, so that no difference of two is NaN
SLACK = 8.0  # p may reach 2 ** 8 before the maximum moves: rescaling is rare, and the sums are float32


@dataclass(frozen=True)
class Config:
    """dtype of the matrix products; cache: "16-bit", "int8" or "float8_e4m3fn"; rows a block: 8 or 16; warps a block; stages of a ring;
    token_scales: an 8-bit cache has a scale a token and head."""

    dtype: str
    cache: str
    head_dim: int
    rows: int
    warps: int
    stages: int
    token_scales: bool = False

    @property
    def row_bytes(self) -> int:
        return self.head_dim * (2 if self.cache == "16-bit" else 1)

    @property
    def q_in_registers(self) -> bool:
        return self.head_dim * self.rows <= 2560

    @property
    def resident(self) -> int:
        """Blocks that the registers of a multiprocessor hold: 8 rows are compiled for three, of 16 each thread may take 255."""
        return 3 if self.rows == 8 else 8 // self.warps

    def shared(self) -> tuple[int, int, int, int, int, int]:
        """Offsets of each warp's maxima and sums, valid-key bits, q, its factors, scales of tokens, the end. The warps' outputs reuse
        the rings."""
        sums = self.warps * self.rows * 4 * (self.head_dim + 4)
        bits = max(self.warps * self.stages * 2 * KEYS * self.row_bytes, sums + self.warps * self.rows * 8)
        q = bits + -(-4 * self.warps * self.stages // 16) * 16
        factors = q + self.rows * self.head_dim * 2
        scales = factors + 4 * self.rows
        return sums, bits, q, factors, scales, scales + (self.warps * self.stages * SCALES_BYTES if self.token_scales else 0)


def swizzle(units: int) -> tuple[int, int]:
    """(shift, mask): 16-byte unit u of row r lies at u ^ ((r >> shift) & mask), so that 8 rows of one unit meet 8 different bank groups."""
    common = 8 if units % 8 == 0 else 4 if units % 4 == 0 else 2 if units % 2 == 0 else 1
    return {8: 0, 4: 1, 2: 2, 1: 3}[common], common - 1


def lanes_a_row(units: int) -> int:
    """Lanes that copy one row: all of its units at once if they are a power of two, else pieces of at least 64 bytes."""
    power = units & -units
    return min(32, power if power >= 4 or units < 4 else 8 if units == 5 else 4)


@cuda.jit(device=True, forceinline=True)
def lookup(table_gl, batch, key, page_size, per_page, load):
    """(page, slot) of a key, by `load` of the table. A contiguous cache is a pool of one page a sequence."""
    page, slot = np.uint32(batch), np.uint32(key)
    if table_gl != 0:
        index = divide(key, per_page)
        page, slot = load(table_gl + 4 * np.int64(index)), np.uint32(key - index * page_size)
    return page, slot


def make_stage_q(config: Config) -> Callable:
    row_tiles_n, wide = config.rows // 8, config.cache == "16-bit"
    q_units, q_threads = config.head_dim // 8, 32 * config.warps // config.rows
    pair, one = ptx.PAIR[config.dtype], np.float32(1)
    xor_1, xor_2, xor_4, xor_8 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8))

    @cuda.jit(device=True, forceinline=True)
    def stage_q(q_gl, q_sh, factor_sh, thread, valid, head_dim, scale, kind):
        """q's rows into shared memory as B fragments: word (step, n, g, t, half) is values 16 step + 8 half + 2 t of row 8 n + g.

        Beside an 8-bit cache lane t takes values 4 t .. 4 t + 3, as ldmatrix gives the bytes of K, and bfloat16 becomes float16 under a
        power of two that brings the row's largest value to [1, 2); the row's factor is scale over that power.
        """
        row, first = thread // q_threads, thread % q_threads
        to_sh = q_sh + 256 * (row >> 3) + 32 * (row & 7)
        top = np.int64(0)
        for unit in range(first, q_units, q_threads):
            words = (np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0))
            if valid and 8 * unit < head_dim:
                words = ptx.ld_written_128(q_gl + 16 * unit)
            unit_sh = to_sh + 256 * row_tiles_n * (unit >> 1)
            if wide:
                for i in range(4):
                    ptx.st_shared_32(unit_sh + 4 * (unit & 1) + 8 * i, words[i])
            else:
                ptx.st_shared_128(unit_sh + 16 * (unit & 1), words[0], words[1], words[2], words[3])
                for i in range(4):
                    top = max(top, max(words[i] & 0x7FFF0000, (words[i] << 16) & 0x7FFF0000))
        if not wide:
            largest = ptx.bits_f32(top)
            if q_threads >= 16:
                largest = ptx.maximum(largest, xor_8(largest))
            if q_threads >= 8:
                largest = ptx.maximum(largest, xor_4(largest))
            largest = ptx.maximum(largest, xor_2(largest))
            largest = ptx.maximum(largest, xor_1(largest))
            power = one
            if kind == 2:
                exponent = ptx.f32_bits(largest) & 0x7F800000
                power, inverse = ptx.bits_f32(exponent), ptx.bits_f32(0x7F000000 - exponent)
                for unit in range(first, q_units, q_threads):
                    unit_sh = to_sh + 256 * row_tiles_n * (unit >> 1) + 16 * (unit & 1)
                    words = ptx.ld_shared_128(unit_sh)
                    for i in range(4):
                        ptx.st_shared_32(unit_sh + 4 * i, pair(ptx.bf16_low(words[i]) * inverse, ptx.bf16_high(words[i]) * inverse))
            if first == 0:
                ptx.st_shared_f32(factor_sh + 4 * row, scale * power)

    return stage_q


@functools.cache
def make_copy_keys(row_bytes: int) -> Callable:
    units = row_bytes // 16
    (shift, mask), lanes = swizzle(units), lanes_a_row(units)
    rows_a_copy, columns, copies = 32 // lanes, -(-units // lanes), -(-KEYS * lanes // 32)
    half_stage, last_column_full = KEYS * row_bytes, units % lanes == 0
    absent, sixteen, none = np.uint32(0xFFFFFFFF), np.uint32(16), np.uint32(0)

    @cuda.jit(device=True, forceinline=True)
    def copy_keys(k_gl, v_gl, stage_sh, bits_sh, lane, valid, k_unit, v_unit, real_units):
        """Starts the copies of 16 keys. Lane l has that of key l & 15: k_unit and v_unit x 16 bytes after k_gl and v_gl, if it is valid.

        What is not valid or past real_units becomes zeros: of that nothing is read, wherever it would lie.
        """
        bits = np.uint32(ptx.ballot(1 if valid else 0) & 0xFFFF)
        if lane == 0:
            ptx.st_shared_32(bits_sh, bits)
        k_unit, v_unit, column = np.uint32(k_unit), np.uint32(v_unit) if valid else absent, np.int32(lane % lanes)
        k_gl, v_gl = k_gl + (column << 4), v_gl + (column << 4)
        for i in range(copies):
            row = i * rows_a_copy + lane // lanes
            row_k, row_v = ptx.shuffle_index(k_unit, row), ptx.shuffle_index(v_unit, row)
            row_sh, turn = stage_sh + row * row_bytes, (row >> shift) & mask
            for j in range(columns):
                if last_column_full or column + j * lanes < units:
                    size = sixteen if row_v != absent and np.int32(column + j * lanes) < real_units else none
                    to_sh = row_sh + (((column + j * lanes) ^ turn) << 4)
                    ptx.cp_async_16(to_sh, k_gl + (np.int64(row_k) << 4) + 16 * j * lanes, size)
                    ptx.cp_async_16(to_sh + half_stage, v_gl + (np.int64(row_v) << 4) + 16 * j * lanes, size)

    return copy_keys


@cuda.jit(device=True, forceinline=True)
def copy_scales(scale_gl, to_sh, lane, valid, index):
    """Starts the copy of a lane's own scale of a token, after copy_keys of that token. Of what is not valid it is 1."""
    if valid:
        ptx.cp_async_4(np.int32(to_sh + 4 * lane), scale_gl + 4 * index)
    else:
        ptx.st_shared_f32(np.int32(to_sh + 4 * lane), np.float32(1))


def make_scores(config: Config, chains: int) -> Callable:
    """scores(score, ...) leaves s as `chains` sums, so that many mma are on their way at once: score[4 * chains * n :] is of row tile n."""
    steps, row_tiles_n, row_bytes, wide = config.head_dim // 16, config.rows // 8, config.row_bytes, config.cache == "16-bit"
    (shift, mask), q_registers = swizzle(row_bytes // 16), config.q_in_registers
    mma, (widen_pairs, _) = ptx.MMA[config.dtype], make_widen(config.cache)

    @cuda.jit(device=True, forceinline=True)
    def score_step(score, j, a0, a1, a2, a3, q, q_sh):
        for n in range(row_tiles_n):
            if q_registers:
                mma(score, 4 * (n * chains + j % chains), a0, a1, a2, a3, q[2 * (j * row_tiles_n + n)], q[2 * (j * row_tiles_n + n) + 1])
            else:
                b = ptx.ld_shared_64(q_sh + 256 * (j * row_tiles_n + n))
                mma(score, 4 * (n * chains + j % chains), a0, a1, a2, a3, b[0], b[1])

    @cuda.jit(device=True, forceinline=True)
    def scores(score, k_sh, lane, q, q_sh):
        """score += K q^T: keys g and g + 8 by rows 2 t and 2 t + 1, as mma lays out its result."""
        row, high = lane & 15, lane >> 4
        row_sh, turn = k_sh + row * row_bytes, (row >> shift) & mask
        if wide:
            for j in range(steps):
                a = ptx.ldmatrix_x4(row_sh + (((high + 2 * j) ^ turn) << 4))
                score_step(score, j, a[0], a[1], a[2], a[3], q, q_sh)
        else:
            for j in range((steps + 1) // 2):
                unit = high + 2 * j if 2 * j + 1 < steps else 2 * j
                words = ptx.ldmatrix_x4(row_sh + ((unit ^ turn) << 4))
                a0, a2 = widen_pairs(words[0])
                a1, a3 = widen_pairs(words[1])
                score_step(score, 2 * j, a0, a1, a2, a3, q, q_sh)
                if 2 * j + 1 < steps:
                    a0, a2 = widen_pairs(words[2])
                    a1, a3 = widen_pairs(words[3])
                    score_step(score, 2 * j + 1, a0, a1, a2, a3, q, q_sh)

    return scores


def make_outputs(config: Config) -> Callable:
    steps, row_tiles_n, row_bytes, wide = config.head_dim // 16, config.rows // 8, config.row_bytes, config.cache == "16-bit"
    shift, mask = swizzle(row_bytes // 16)
    mma, (_, widen_columns) = ptx.MMA[config.dtype], make_widen(config.cache)

    @cuda.jit(device=True, forceinline=True)
    def output_step(acc, j, a0, a1, a2, a3, p):
        for n in range(row_tiles_n):
            mma(acc, 4 * (j * row_tiles_n + n), a0, a1, a2, a3, p[2 * n], p[2 * n + 1])

    @cuda.jit(device=True, forceinline=True)
    def outputs(acc, v_sh, lane, p):
        """acc += V^T p^T: 16 of head_dim by 8 rows an mma. Bytes are transposed in pairs: a0 has the even ones of 16, a1 the odd ones."""
        row, high = lane & 15, lane >> 4
        if wide:
            row, high = (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1
        row_sh, turn = v_sh + row * row_bytes, (row >> shift) & mask
        if wide:
            for j in range(steps):
                a = ptx.ldmatrix_x4_trans(row_sh + (((high + 2 * j) ^ turn) << 4))
                output_step(acc, j, a[0], a[1], a[2], a[3], p)
        else:
            for j in range((steps + 1) // 2):
                unit = high + 2 * j if 2 * j + 1 < steps else 2 * j
                words = ptx.ldmatrix_x4_trans(row_sh + ((unit ^ turn) << 4))
                a0, a1 = widen_columns(words[0])
                a2, a3 = widen_columns(words[1])
                output_step(acc, 2 * j, a0, a1, a2, a3, p)
                if 2 * j + 1 < steps:
                    a0, a1 = widen_columns(words[2])
                    a2, a3 = widen_columns(words[3])
                    output_step(acc, 2 * j + 1, a0, a1, a2, a3, p)

    return outputs


@functools.cache
def make_softmax(dtype: str, head_dim: int, rows: int, token_scales: bool) -> Callable:
    steps, row_tiles_n = head_dim // 16, rows // 8
    n_x, n_row, n_acc, last_row_tile = 4 * row_tiles_n, 2 * row_tiles_n, 4 * steps * row_tiles_n, row_tiles_n - 1
    slack, pair = np.float32(SLACK), ptx.PAIR[dtype]
    xor_4, xor_8, xor_16 = (ptx.shuffle_xor[n] for n in (4, 8, 16))

    @cuda.jit(device=True, forceinline=True)
    def softmax(x, acc, top, total, p, inverse):
        """p := exp2(x - top) as B fragments, total += p. The maximum moves, and what was summed is rescaled, only past SLACK.

        Scales of tokens: x has the logarithm of its value's scale in it, so that p is weight times scale, however small or large that is,
        and within float16; the total is of weights, p times inverse[0] of key g and inverse[1] of key g + 8.
        """
        rescale = cuda.local.array(n_row, np.float32)
        rises = np.uint32(0)
        for r in range(n_row):
            if ptx.maximum(x[2 * (r & 2) + (r & 1)], x[2 * (r & 2) + (r & 1) + 2]) > top[r] + slack:
                rises = np.uint32(1)
        if ptx.ballot(rises) != 0:
            for r in range(n_row):
                highest = ptx.maximum(x[2 * (r & 2) + (r & 1)], x[2 * (r & 2) + (r & 1) + 2])
                highest = ptx.maximum(highest, xor_4(highest))
                highest = ptx.maximum(highest, xor_8(highest))
                highest = ptx.maximum(ptx.maximum(highest, xor_16(highest)), top[r])
                rescale[r] = ptx.exp2(top[r] - highest)
                top[r] = highest
                total[r] *= rescale[r]
            for i in range(n_acc):
                acc[i] *= rescale[2 * (i >> 2 & last_row_tile) + (i & 1)]
        for i in range(n_x):
            x[i] = ptx.exp2(x[i] - top[2 * (i >> 2) + (i & 1)])
            if token_scales:
                total[2 * (i >> 2) + (i & 1)] = ptx.fma(x[i], inverse[(i >> 1) & 1], total[2 * (i >> 2) + (i & 1)])
            else:
                total[2 * (i >> 2) + (i & 1)] += x[i]
        for i in range(n_row):
            p[i] = ptx.movmatrix_trans(pair(x[2 * i], x[2 * i + 1]))

    return softmax
