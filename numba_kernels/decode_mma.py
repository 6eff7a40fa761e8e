"""decode_attention on tensor cores: softmax(scale q k^T) v of a few new tokens over a long cache, split over the keys. sm_80 and up.

A block takes 8 or 16 rows (new tokens x the query heads of one kv head, which share one read of K and V) and one of `splits` ranges of
keys. Each warp walks its own 16 keys of every tile with its own cp.async ring, running maximum and sum, and meets the others only at the
end, so nothing in the loop waits for a barrier. K is the A operand and q the B operand of mma.m16n8k16: s^T = K q^T, o^T = V^T p^T, which
pads the rows to 8 and not to 16. 8-bit caches widen to float16 on the way from shared memory to the tensor cores.
Floor: bytes of the keys and values that are seen / read bandwidth.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.decode_common import LOG2E, SIGNATURE, capped, load_bias, make_key_range, row_of, store_result
from ftops.numba_kernels.narrow import make_widen

HEAD_DIMS = (32, 64, 80, 96, 128, 160, 192, 256)
KEYS = 16  # keys a warp takes at a time: the k of one mma of p v
RING_BYTES = 64 * 1024  # three blocks a Hopper multiprocessor, one where a block may have 99 KiB
NOTHING = -1e30  # a maximum before any key; finite, so that no difference of two is NaN
SLACK = 8.0  # p may reach 2 ** 8 before the maximum moves: rescaling is rare, and the sums are float32


@dataclass(frozen=True)
class Config:
    """dtype of the matrix products; cache: "16-bit", "int8" or "float8_e4m3fn"; rows a block: 8 or 16; warps a block; stages of a ring."""

    dtype: str
    cache: str
    head_dim: int
    rows: int
    warps: int
    stages: int

    @property
    def row_bytes(self) -> int:
        return self.head_dim * (2 if self.cache == "16-bit" else 1)

    @property
    def q_in_registers(self) -> bool:
        return self.head_dim * self.rows <= 2560

    def shared(self) -> tuple[int, int, int, int, int]:
        """Offsets of: every warp's maxima and sums (their outputs, from 0 on, reuse the rings), valid-key bits, q, q's factors, the end."""
        sums = self.warps * self.rows * 4 * (self.head_dim + 4)
        bits = max(self.warps * self.stages * 2 * KEYS * self.row_bytes, sums + self.warps * self.rows * 8)
        q = bits + -(-4 * self.warps * self.stages // 16) * 16
        factors = q + self.rows * self.head_dim * 2
        return sums, bits, q, factors, factors + 4 * self.rows


def pick(dtype: str, cache: str, head_dim: int, rows: int) -> Config:
    """Four warps if two stages then fit RING_BYTES, otherwise two; as many stages as fit, up to four."""
    head_dim = next(d for d in HEAD_DIMS if d >= head_dim)
    stage = 2 * KEYS * head_dim * (2 if cache == "16-bit" else 1)
    warps = 4 if 8 * stage <= RING_BYTES else 2
    stages = min(4, RING_BYTES // (warps * stage))
    return Config(dtype if cache == "16-bit" else "float16", cache, head_dim, 8 if rows <= 8 else 16, warps, stages)


def swizzle(units: int) -> tuple[int, int]:
    """(shift, mask): 16-byte unit u of row r lies at u ^ ((r >> shift) & mask), so that 8 rows of one unit meet 8 different bank groups."""
    common = 8 if units % 8 == 0 else 4 if units % 4 == 0 else 2 if units % 2 == 0 else 1
    return {8: 0, 4: 1, 2: 2, 1: 3}[common], common - 1


def lanes_a_row(units: int) -> int:
    """Lanes that copy one row: all of its units at once if they are a power of two, else pieces of at least 64 bytes."""
    power = units & -units
    return min(32, power if power >= 4 or units < 4 else 8 if units == 5 else 4)


def make(config: Config) -> Callable:
    warps, stages, steps, row_tiles_n = config.warps, config.stages, config.head_dim // 16, config.rows // 8
    rows_a_block, row_bytes, wide = config.rows, config.row_bytes, config.cache == "16-bit"
    q_registers, head_dim_quarter = config.q_in_registers, config.head_dim // 4
    units, threads = row_bytes // 16, 32 * warps
    shift, mask = swizzle(units)
    lanes = lanes_a_row(units)
    rows_a_copy, columns, copies = 32 // lanes, -(-units // lanes), -(-KEYS * lanes // 32)
    per_unit, last_column_full = 8 if wide else 16, units % lanes == 0
    half_stage, ring_bytes = KEYS * row_bytes, stages * 2 * KEYS * row_bytes
    tile_keys = KEYS * warps
    sums_offset, bits_offset, q_offset, factors_offset, _ = config.shared()
    pitch = 4 * (config.head_dim + 4)  # bytes between rows of a warp's output: its 32 lanes then meet 32 banks
    chains = 2 // row_tiles_n  # independent accumulators of s, so that two mma are in flight
    n_q, n_acc, n_x, n_row = 2 * steps * row_tiles_n, 4 * steps * row_tiles_n, 4 * row_tiles_n, 2 * row_tiles_n
    q_units, q_threads = config.head_dim // 8, threads // config.rows
    zero, one, nothing, slack, hidden, log2e = (np.float32(c) for c in (0, 1, NOTHING, SLACK, -np.inf, LOG2E))
    mma, pair = ptx.MMA[config.dtype], ptx.PAIR[config.dtype]
    widen_pairs, widen_columns = make_widen(config.cache)
    wait_for_oldest = ptx.CP_ASYNC_WAIT[stages - 1]
    xor_1, xor_2, xor_4, xor_8, xor_16 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))
    key_range = make_key_range(tile_keys)

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
                words = ptx.ld_global_128(q_gl + 16 * unit)
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

    @cuda.jit(device=True, forceinline=True)
    def lookup(table_gl, batch, key, page_size):
        """(page, slot) of a key. A contiguous cache is a pool of one page a sequence."""
        page, slot = np.uint32(batch), np.uint32(key)
        if table_gl != 0:
            index = ptx.div_u32(key, page_size)
            page, slot = ptx.ld_global_32(table_gl + 4 * np.int64(index)), np.uint32(key - index * page_size)
        return page, slot

    @cuda.jit(device=True, forceinline=True)
    def copy_keys(k_gl, v_gl, stage_sh, bits, lane, page, slot, k_page, k_slot, v_page, v_slot, real_units):
        """Starts the copies of 16 keys; what is not valid or past head_dim becomes zero. Lane l holds the page and slot of key l & 15."""
        for i in range(copies):
            row = i * rows_a_copy + lane // lanes
            row_page, row_slot = np.int64(ptx.shuffle_index(page, row)), np.int64(ptx.shuffle_index(slot, row))
            k_at, v_at, there = np.int64(0), np.int64(0), np.int64(0)
            if (bits >> row) & 1 != 0:
                k_at, v_at, there = row_page * k_page + row_slot * k_slot, row_page * v_page + row_slot * v_slot, real_units
            row_sh, turn = stage_sh + row * row_bytes, (row >> shift) & mask
            for j in range(columns):
                column = lane % lanes + j * lanes
                if last_column_full or column < units:
                    size = 16 if column < there else 0
                    at = column if column < there else 0
                    ptx.cp_async_16(row_sh + ((column ^ turn) << 4), k_gl + ((k_at + at) << 4), size)
                    ptx.cp_async_16(row_sh + half_stage + ((column ^ turn) << 4), v_gl + ((v_at + at) << 4), size)

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

    @cuda.jit(device=True, forceinline=True)
    def softmax(x, acc, top, total, p):
        """p := exp2(x - top) as B fragments, total += p. The maximum moves, and what was summed is rescaled, only past SLACK."""
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
                rescale = ptx.exp2(top[r] - highest)
                top[r] = highest
                total[r] *= rescale
                for j in range(steps):
                    acc[4 * (j * row_tiles_n + (r >> 1)) + (r & 1)] *= rescale
                    acc[4 * (j * row_tiles_n + (r >> 1)) + (r & 1) + 2] *= rescale
        for i in range(n_x):
            x[i] = ptx.exp2(x[i] - top[2 * (i >> 2) + (i & 1)])
            total[2 * (i >> 2) + (i & 1)] += x[i]
        for i in range(n_row):
            p[i] = ptx.movmatrix_trans(pair(x[2 * i], x[2 * i + 1]))

    def decode_mma(q_gl, k_gl, v_gl, lengths_gl, table_gl, bias_gl, slopes_gl, k_scale_gl, v_scale_gl, out_gl, partial_gl, lse_gl,
                   q_batch, bias_batch, bias_head, bias_new, bias_key, table_row, q_new, q_head, k_page, k_slot, k_head, v_page, v_slot,
                   v_head, new, group, head_dim, capacity, pages, page_size, row_tiles, splits, window, kinds, scale, cap):
        shared_sh = np.int64(ptx.shared_address(cuda.shared.array(0, np.uint8)))
        thread = np.int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        batch = np.int64(ptx.div_u32(cuda.blockIdx.x, row_tiles))
        first_row = (cuda.blockIdx.x - batch * row_tiles) * rows_a_block
        kv_head, split = np.int64(cuda.blockIdx.y), np.int64(cuda.blockIdx.z)
        length = np.int32(ptx.ld_global_32(np.int64(lengths_gl) + 4 * batch))  # on its way while q is staged
        value_scale = one
        if not wide:
            scale *= ptx.ld_global_f32(np.int64(k_scale_gl) + 4 * kv_head)
            value_scale = ptx.ld_global_f32(np.int64(v_scale_gl) + 4 * kv_head)
        q_sh, factor_sh = shared_sh + q_offset, shared_sh + factors_offset
        token, head = row_of(first_row + thread // q_threads, kv_head, group)
        stage_q(np.int64(q_gl) + 2 * (batch * q_batch + token * q_new + head * q_head), q_sh, factor_sh, thread, token < new, head_dim, scale,
                kinds >> 2)
        cuda.syncthreads()
        length, start, low, high = key_range(length, capacity, new, window, split, splits)
        k_gl, v_gl = np.int64(k_gl) + 16 * kv_head * k_head, np.int64(v_gl) + 16 * kv_head * v_head
        table_gl = np.int64(table_gl)
        if table_gl != 0:
            table_gl += 4 * batch * table_row
        ring_sh, bits_sh, q_sh = shared_sh + warp * ring_bytes, shared_sh + bits_offset + warp * 4 * stages, q_sh + 8 * lane

        q = cuda.local.array(n_q, np.uint32)
        factor = cuda.local.array(n_row, np.float32)
        position = cuda.local.array(n_row, np.int32)
        bias_row = cuda.local.array(n_row, np.int64)
        slope = cuda.local.array(n_row, np.float32)
        if q_registers:
            for j in range(steps * row_tiles_n):
                q[2 * j], q[2 * j + 1] = ptx.ld_shared_64(q_sh + 256 * j)
        for r in range(n_row):
            row = 8 * (r >> 1) + (r & 1) + 2 * t
            factor[r] = scale if wide else ptx.ld_shared_f32(factor_sh + 4 * row)
            token, head = row_of(min(first_row + row, new * group - 1), kv_head, group)
            position[r], bias_row[r], slope[r] = length - new + token, 0, zero
            if bias_gl != 0:
                at = batch * bias_batch + head * bias_head + token * bias_new
                bias_row[r] = np.int64(bias_gl) + at * (4 if kinds & 3 == 0 else 2)
            if slopes_gl != 0:
                slope[r] = log2e * ptx.ld_global_f32(np.int64(slopes_gl) + 4 * head)

        score = cuda.local.array(8, np.float32)
        x = cuda.local.array(n_x, np.float32)
        p = cuda.local.array(n_row, np.uint32)
        acc = cuda.local.array(n_acc, np.float32)
        top = cuda.local.array(n_row, np.float32)
        total = cuda.local.array(n_row, np.float32)
        for i in range(n_acc):
            acc[i] = zero
        for r in range(n_row):
            top[r], total[r] = nothing, zero
        own = start + warp * KEYS
        page, slot = np.uint32(0), np.uint32(0)
        if low < high:
            page, slot = lookup(table_gl, batch, min(own + low * tile_keys + (lane & 15), length - 1), page_size)
        filling, using = 0, 0
        for tile in range(low - (stages - 1), high):
            ptx.warp_sync()  # the stage that is filled next has been read by every lane
            if tile + (stages - 1) < high:
                first = own + (tile + (stages - 1)) * tile_keys
                bits = ptx.ballot(1 if first + (lane & 15) < length and page < pages else 0) & 0xFFFF
                if lane == 0:
                    ptx.st_shared_32(bits_sh + 4 * filling, bits)
                copy_keys(k_gl, v_gl, ring_sh + filling * (2 * half_stage), bits, lane, page, slot, k_page, k_slot, v_page, v_slot,
                          head_dim // per_unit)
                filling = 0 if filling == stages - 1 else filling + 1
                page, slot = lookup(table_gl, batch, min(first + tile_keys + (lane & 15), length - 1), page_size)  # there by the next turn
            ptx.cp_async_commit()
            if tile >= low:
                wait_for_oldest()
                ptx.warp_sync()
                stage_sh = ring_sh + using * (2 * half_stage)
                bits = ptx.ld_shared_32(bits_sh + 4 * using)
                using = 0 if using == stages - 1 else using + 1
                first = own + tile * tile_keys
                for i in range(8):
                    score[i] = zero
                scores(score, stage_sh, lane, q, q_sh)
                for i in range(n_x):
                    x[i] = (score[i] + score[4 + i] if chains == 2 else score[i]) * factor[2 * (i >> 2) + (i & 1)]
                if cap != zero:
                    for i in range(n_x):
                        x[i] = capped(x[i], cap)
                if bias_gl != 0:
                    for i in range(n_x):
                        key = g + 8 * ((i >> 1) & 1)
                        if (bits >> key) & 1 != 0:
                            x[i] += load_bias(bias_row[2 * (i >> 2) + (i & 1)], first + key, bias_key, kinds & 3)
                if slopes_gl != 0:
                    for i in range(n_x):
                        behind = position[2 * (i >> 2) + (i & 1)] - first - g - 8 * ((i >> 1) & 1)
                        x[i] -= slope[2 * (i >> 2) + (i & 1)] * abs(np.float32(behind))
                if bits != 0xFFFF or first + (KEYS - 1) > length - new or (window >= 0 and first < length - 1 - window):
                    for i in range(n_x):
                        key = g + 8 * ((i >> 1) & 1)
                        behind = position[2 * (i >> 2) + (i & 1)] - first - key
                        if (bits >> key) & 1 == 0 or behind < 0 or (window >= 0 and behind > window):
                            x[i] = hidden
                softmax(x, acc, top, total, p)
                outputs(acc, stage_sh + half_stage, lane, p)

        cuda.syncthreads()  # every warp has read its rings
        for r in range(n_row):
            total[r] += xor_4(total[r])
            total[r] += xor_8(total[r])
            total[r] += xor_16(total[r])
            row = warp * rows_a_block + 8 * (r >> 1) + (r & 1) + 2 * t
            if g == 0:
                ptx.st_shared_64(shared_sh + sums_offset + 8 * row, ptx.f32_bits(top[r]), ptx.f32_bits(total[r]))
            row_sh = shared_sh + row * pitch
            for j in range(steps):
                at = 4 * (j * row_tiles_n + (r >> 1)) + (r & 1)
                if wide:
                    ptx.st_shared_f32(row_sh + 4 * g + 64 * j, acc[at])
                    ptx.st_shared_f32(row_sh + 4 * g + 64 * j + 32, acc[at + 2])
                else:
                    ptx.st_shared_64(row_sh + 8 * g + 64 * j, ptx.f32_bits(acc[at]), ptx.f32_bits(acc[at + 2]))
        cuda.syncthreads()
        for item in range(thread, min(rows_a_block, new * group - first_row) * head_dim_quarter, threads):
            row, column = item // head_dim_quarter, 4 * (item % head_dim_quarter)
            if column < head_dim:
                highest, whole, a, b, c, d = nothing, zero, zero, zero, zero, zero
                for w in range(warps):
                    highest = ptx.maximum(highest, ptx.ld_shared_f32(shared_sh + sums_offset + 8 * (w * rows_a_block + row)))
                for w in range(warps):
                    sums = ptx.ld_shared_64(shared_sh + sums_offset + 8 * (w * rows_a_block + row))
                    part = ptx.ld_shared_128(shared_sh + pitch * (w * rows_a_block + row) + 4 * column)
                    weight = ptx.exp2(ptx.bits_f32(sums[0]) - highest)
                    whole = ptx.fma(weight, ptx.bits_f32(sums[1]), whole)
                    weight *= value_scale
                    a, b = ptx.fma(weight, ptx.bits_f32(part[0]), a), ptx.fma(weight, ptx.bits_f32(part[1]), b)
                    c, d = ptx.fma(weight, ptx.bits_f32(part[2]), c), ptx.fma(weight, ptx.bits_f32(part[3]), d)
                token, head = row_of(first_row + row, kv_head, group)
                store_result(a, b, c, d, highest, whole, batch * new + token, head, column, group, head_dim, split, splits, np.int64(out_gl),
                             np.int64(partial_gl), np.int64(lse_gl), kinds >> 2)

    return decode_mma


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=32 * config.warps, shared_bytes=config.shared()[-1])


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for head_dim in HEAD_DIMS:
        for rows in (8, 16):
            for dtype, cache in (("float16", "16-bit"), ("bfloat16", "16-bit"), ("float16", "int8"), ("float16", "float8_e4m3fn")):
                yield spec(pick(dtype, cache, head_dim, rows))
