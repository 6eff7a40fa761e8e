"""attention and attention_varlen in float32, without tensor cores: TF32 would keep 10 bits of q and k.

A warp takes four query rows and 32 keys at a time: a lane has one key for the scores, and every 32nd element of the outputs. The rows of q
and the weights pass through shared memory, where all lanes read one word at a time; K is read by rows through L1, V by columns.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.attention_common import MINUS_INFINITY, SIGNATURE, make_locate
from ftops.numba_kernels.compile import Spec

ROWS, WARPS = 4, 4  # query rows a warp: each K or V element that is read serves so many


@dataclass(frozen=True)
class Config:
    """columns: output elements a lane keeps, head_dim / 32 rounded up."""

    columns: int


def pick(head_dim: int) -> Config:
    return Config(2 if head_dim <= 64 else 4 if head_dim <= 128 else 8)


def make(config: Config) -> Callable:
    columns, width = config.columns, 32 * config.columns
    out_size, dot_size = ROWS * columns, ROWS
    locate = make_locate(ROWS * WARPS)
    x1, x2, x4, x8, x16 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))

    @cuda.jit(device=True, forceinline=True)
    def warp_max(x):
        x = ptx.maximum(x, x16(x))
        x = ptx.maximum(x, x8(x))
        x = ptx.maximum(x, x4(x))
        x = ptx.maximum(x, x2(x))
        return ptx.maximum(x, x1(x))

    @cuda.jit(device=True, forceinline=True)
    def warp_sum(x):
        x += x16(x)
        x += x8(x)
        x += x4(x)
        x += x2(x)
        return x + x1(x)

    def attention_plain(q_gl, k_gl, v_gl, out_gl, bias_gl, alibi_gl, lengths_gl, starts_q_gl, starts_kv_gl,
                        q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, bias_batch, bias_head, bias_row,
                        queries, keys, heads, group, dim, tiles, left, right, bias_wide, scale, softcap):
        base = ptx.shared_address(cuda.shared.array(0, np.float32))
        all_queries = queries
        batch, head, first_row, queries, keys, start_q, start_kv, limit, position, begin, end = locate(
            queries, keys, heads, tiles, left, right, lengths_gl, starts_q_gl, starts_kv_gl)
        lane, warp = np.uint32(cuda.threadIdx.x) & np.uint32(31), np.uint32(cuda.threadIdx.x) >> np.uint32(5)
        first_row += np.int32(warp) * np.int32(ROWS)
        if first_row >= queries:
            return
        position += np.int32(warp) * np.int32(ROWS)
        rows_here = np.int32(min(np.int32(ROWS), queries - first_row))
        begin = np.int32(max(position - left, np.int32(0)))
        end = np.int32(min(limit, position + rows_here + right))
        kv_head = np.uint64(ptx.div_u32(head, np.uint32(group)))
        head = np.uint64(head)
        q_gl += np.uint64(batch) * np.uint64(q_batch) + head * np.uint64(q_head)
        q_gl += np.uint64(start_q + np.uint32(first_row)) * np.uint64(q_row)
        k_gl += np.uint64(batch) * np.uint64(k_batch) + np.uint64(start_kv) * np.uint64(k_row) + kv_head * np.uint64(k_head)
        v_gl += np.uint64(batch) * np.uint64(v_batch) + np.uint64(start_kv) * np.uint64(v_row) + kv_head * np.uint64(v_head)
        bias_gl += np.uint64(batch) * np.uint64(bias_batch) + head * np.uint64(bias_head) + np.uint64(first_row) * np.uint64(bias_row)
        slope = np.float32(0)
        if alibi_gl != np.uint64(0):
            slope = ptx.ld_global_f32(alibi_gl + np.uint64(4) * head)

        q_sh = np.uint32(base + warp * np.uint32(4 * ROWS * width))
        p_sh = np.uint32(base + np.uint32(4 * WARPS * ROWS * width) + warp * np.uint32(4 * 32 * ROWS))
        dot = cuda.local.array(dot_size, np.float32)
        out = cuda.local.array(out_size, np.float32)
        part = cuda.local.array(out_size, np.float32)
        top = cuda.local.array(dot_size, np.float32)
        total = cuda.local.array(dot_size, np.float32)
        rescale = cuda.local.array(dot_size, np.float32)
        for r in range(ROWS):
            top[r], total[r] = MINUS_INFINITY, np.float32(0)
            for c in range(columns):
                out[r * columns + c] = np.float32(0)
                element = np.int32(lane + np.uint32(32 * c))
                element_gl = q_gl + np.uint64(r) * np.uint64(q_row) + np.uint64(4) * np.uint64(element)
                q = ptx.ld_global_32_if(element_gl, np.uint32(element < dim and np.int32(r) < rows_here))
                ptx.st_shared_32(q_sh + np.uint32(4 * r * width) + np.uint32(4) * np.uint32(element), q)
        ptx.warp_sync()

        for first in range(begin, end, 32):
            key = np.int32(first) + np.int32(lane)
            for r in range(ROWS):
                dot[r] = np.float32(0)
            if key < end:
                key_gl = k_gl + np.uint64(key) * np.uint64(k_row)
                for d in range(0, dim, 4):
                    k0, k1, k2, k3 = ptx.ld_global_128(key_gl + np.uint64(4) * np.uint64(d))
                    for r in range(ROWS):
                        q0, q1, q2, q3 = ptx.ld_shared_128(q_sh + np.uint32(4 * r * width) + np.uint32(4) * np.uint32(d))
                        # A sum for each four halves the error of a score.
                        some = ptx.bits_f32(q0) * ptx.bits_f32(k0)
                        some = ptx.fma(ptx.bits_f32(q1), ptx.bits_f32(k1), some)
                        some = ptx.fma(ptx.bits_f32(q2), ptx.bits_f32(k2), some)
                        dot[r] += ptx.fma(ptx.bits_f32(q3), ptx.bits_f32(k3), some)
            for r in range(ROWS):
                place = np.int32(position + np.int32(r))
                s = MINUS_INFINITY
                if np.int32(r) < rows_here and key < end and key >= place - left and key <= place + right:
                    s = dot[r] * scale
                    if softcap > np.float32(0):
                        s = softcap * np.float32(math.tanh(s / softcap))
                    if bias_gl != np.uint64(0):
                        s += ptx.ld_global_f32(bias_gl + np.uint64(r) * np.uint64(bias_row) + np.uint64(4) * np.uint64(key))
                    s -= slope * np.float32(abs(np.int32(key - place)))
                high = ptx.maximum(top[r], warp_max(s))
                # A row that has seen nothing is measured from 0: -inf - -inf would be NaN.
                origin = np.float32(0) if high == MINUS_INFINITY else high
                rescale[r] = np.float32(math.exp(top[r] - origin))
                p = np.float32(math.exp(s - origin))
                top[r], total[r] = high, total[r] * rescale[r] + warp_sum(p)
                ptx.st_shared_f32(p_sh + np.uint32(4 * r) + np.uint32(4 * ROWS) * lane, p)
            ptx.warp_sync()
            for i in range(out_size):
                part[i] = np.float32(0)
            value_gl = v_gl + np.uint64(first) * np.uint64(v_row) + np.uint64(4) * np.uint64(lane)
            for j in range(min(np.int32(32), np.int32(end - first))):
                p0, p1, p2, p3 = ptx.ld_shared_128(p_sh + np.uint32(4 * ROWS) * np.uint32(j))
                for c in range(columns):
                    live = np.uint32(np.int32(lane + np.uint32(32 * c)) < dim)
                    value = ptx.bits_f32(ptx.ld_global_32_if(value_gl + np.uint64(128 * c), live))
                    part[c] = ptx.fma(ptx.bits_f32(p0), value, part[c])
                    part[columns + c] = ptx.fma(ptx.bits_f32(p1), value, part[columns + c])
                    part[2 * columns + c] = ptx.fma(ptx.bits_f32(p2), value, part[2 * columns + c])
                    part[3 * columns + c] = ptx.fma(ptx.bits_f32(p3), value, part[3 * columns + c])
                value_gl += np.uint64(v_row)
            # 32 keys summed apart from those before: an eighth of the error of one long sum over 2000.
            for i in range(out_size):
                out[i] = ptx.fma(out[i], rescale[i // columns], part[i])
            ptx.warp_sync()

        out_row = np.uint64(start_q + np.uint32(first_row))
        if starts_q_gl == np.uint64(0):
            out_row += np.uint64(batch) * np.uint64(all_queries)
        for r in range(ROWS):
            whole = np.float32(1) if total[r] == np.float32(0) else total[r]
            row_gl = out_gl + ((out_row + np.uint64(r)) * np.uint64(heads) + head) * np.uint64(4 * dim)
            for c in range(columns):
                element = np.uint64(lane + np.uint32(32 * c))
                if element < np.uint64(dim) and np.int32(r) < rows_here:
                    ptx.st_global_f32(row_gl + np.uint64(4) * element, ptx.divide_rn(out[r * columns + c], whole))

    return attention_plain


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=32 * WARPS, shared_bytes=4 * WARPS * ROWS * (32 * config.columns + 32))


def variants() -> Iterator[Spec]:
    return (spec(Config(columns)) for columns in (2, 4, 8))
