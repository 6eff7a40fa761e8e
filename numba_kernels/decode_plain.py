"""decode_attention without tensor cores: float32, and head dims or strides that 16-byte copies do not fit. Every option, any alignment.

One block a row (a new token of a query head) and split; each of its warps takes every fourth run of keys, lanes side by side in head_dim.
Floor: as decode_mma, times the query heads of a kv head, which read the same keys one after the other from L2.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.decode_common import LOG2E, SIGNATURE, block_of, capped, load_bias, make_key_range, row_of
from ftops.numba_kernels.decode_parts import MOST_PARTS, make_meet, make_store_result
from ftops.numba_kernels.division import divide

CACHES = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn")
WARPS, KEYS, PARTS = 4, 4, 8  # of a block; of a warp's turn; of 32 lanes in the largest head_dim
SHARED_BYTES = MOST_PARTS * 4 * (32 * PARTS + 1)  # parts that meet, and the logarithm of each; less than that before


@dataclass(frozen=True)
class Config:
    """cache: the dtype of keys and values; token_scales: an 8-bit one has a scale a token and head."""

    cache: str
    token_scales: bool = False


def make(config: Config) -> Callable:
    tile_keys, pitch, sums_offset = WARPS * KEYS, 4 * 32 * PARTS, 4 * 32 * PARTS * WARPS
    zero, one, lowest, hidden, log2e = (np.float32(c) for c in (0, 1, -1e30, -np.inf, LOG2E))
    xors = tuple(ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))
    x1, x2, x4, x8, x16 = xors
    key_range = make_key_range(tile_keys)
    store_result, meet = make_store_result(False), make_meet(32 * WARPS, 8 * PARTS, False)
    token_scales = config.token_scales
    item = {"float32": 4, "float16": 2, "bfloat16": 2}.get(config.cache, 1)

    @cuda.jit(device=True, forceinline=True)
    def load_f32(address):
        return ptx.ld_global_f32(address)

    @cuda.jit(device=True, forceinline=True)
    def load_f16(address):
        return ptx.f16_low(ptx.ld_global_16(address))

    @cuda.jit(device=True, forceinline=True)
    def load_bf16(address):
        return ptx.bf16_low(ptx.ld_global_16(address))

    @cuda.jit(device=True, forceinline=True)
    def load_int8(address):
        return np.float32(np.int32(ptx.ld_global_8(address) ^ 0x80) - 128)

    @cuda.jit(device=True, forceinline=True)
    def load_e4m3(address):
        return ptx.f16_low(ptx.e4m3_to_f16_pair(ptx.ld_global_8(address)))

    load = dict(zip(CACHES, (load_f32, load_f16, load_bf16, load_int8, load_e4m3), strict=True))[config.cache]

    def decode_plain(q_gl, k_gl, v_gl, lengths_gl, table_gl, bias_gl, slopes_gl, k_scale_gl, v_scale_gl, out_gl, partial_gl, lse_gl,
                     counters_gl, q_batch, bias_batch, bias_head, bias_new, bias_key, table_row, q_new, q_head, k_page, k_slot, k_head,
                     v_page, v_slot, v_head, new, group, head_dim, capacity, pages, page_size, row_tiles, kv_heads, blocks, window,
                     kinds, fixed, per_page, per_row_tile, per_kv_head, per_group, scale, cap):
        shared_sh = np.int64(ptx.shared_address(cuda.shared.array(0, np.uint8)))
        thread = np.int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        batch, kv_head, row, split = block_of(row_tiles, kv_heads, per_row_tile, per_kv_head)
        block = (batch * kv_heads + kv_head) * row_tiles + row
        if block >= blocks:
            return
        ptx.launch_dependents()
        splits, kind = np.int32(cuda.gridDim.x), kinds >> 2
        token, head = row_of(row, kv_head, group, per_group)
        length = np.int32(ptx.ld_global_32(np.int64(lengths_gl) + 4 * batch))
        length, start, low, high, used = key_range(length, capacity, new, window, split, splits, fixed)
        if counters_gl == 0:
            used = splits  # decode_combine reads them all
        if split >= used:
            return
        position = length - new + token
        value_scale = one
        if k_scale_gl != 0 and not token_scales:
            scale *= ptx.ld_global_f32(np.int64(k_scale_gl) + 4 * kv_head)
            value_scale = ptx.ld_global_f32(np.int64(v_scale_gl) + 4 * kv_head)
        bias_row, slope = np.int64(bias_gl), zero
        if bias_gl != 0:
            bias_row += (batch * bias_batch + head * bias_head + token * bias_new) * (4 if kinds & 3 == 0 else 2)
        if slopes_gl != 0:
            slope = log2e * ptx.ld_global_f32(np.int64(slopes_gl) + 4 * head)
        q = cuda.local.array(PARTS, np.float32)
        acc = cuda.local.array(PARTS, np.float32)
        x = cuda.local.array(KEYS, np.float32)
        at = cuda.local.array(KEYS, np.int64)
        key_scale = cuda.local.array(KEYS, np.float32)
        its_scale = cuda.local.array(KEYS, np.float32)
        for i in range(PARTS):
            q[i], acc[i] = zero, zero
            if lane + 32 * i < head_dim:
                element = batch * q_batch + token * q_new + head * q_head + lane + 32 * i
                if kind == 0:
                    q[i] = scale * load_f32(np.int64(q_gl) + 4 * element)
                elif kind == 1:
                    q[i] = scale * load_f16(np.int64(q_gl) + 2 * element)
                else:
                    q[i] = scale * load_bf16(np.int64(q_gl) + 2 * element)
        highest, total = lowest, zero
        for tile in range(low, high):
            for u in range(KEYS):
                key = start + tile * tile_keys + warp * KEYS + u
                page, slot, seen = batch, np.int64(key), key < length and key <= position and (window < 0 or key >= position - window)
                if seen and table_gl != 0:
                    index = np.int64(divide(key, per_page))
                    page, slot = np.int64(ptx.ld_global_32(np.int64(table_gl) + 4 * (batch * table_row + index))), key - index * page_size
                    seen = page < pages
                at[u] = -1
                partial = zero
                if seen:
                    at[u] = (page * v_page + slot * v_slot + kv_head * v_head) * item
                    if token_scales:
                        scale_at = 4 * ((page * page_size + slot) * kv_heads + kv_head)
                        key_scale[u] = ptx.ld_global_f32(np.int64(k_scale_gl) + scale_at)
                        its_scale[u] = ptx.ld_global_f32(np.int64(v_scale_gl) + scale_at)
                    key_at = np.int64(k_gl) + (page * k_page + slot * k_slot + kv_head * k_head) * item
                    for i in range(PARTS):
                        if lane + 32 * i < head_dim:
                            partial = ptx.fma(q[i], load(key_at + (lane + 32 * i) * item), partial)
                x[u] = partial
            for u in range(KEYS):
                x[u] += x16(x[u])
                x[u] += x8(x[u])
                x[u] += x4(x[u])
                x[u] += x2(x[u])
                x[u] += x1(x[u])
                key = start + tile * tile_keys + warp * KEYS + u
                if token_scales:
                    x[u] *= key_scale[u]
                if cap != zero:
                    x[u] = capped(x[u], cap)
                if at[u] < 0:
                    x[u] = hidden
                else:
                    if bias_gl != 0:
                        x[u] += load_bias(bias_row, key, bias_key, kinds & 3)
                    if slopes_gl != 0:
                        x[u] -= slope * np.float32(position - key)
            before = highest
            for u in range(KEYS):
                highest = ptx.maximum(highest, x[u])
            rescale = ptx.exp2(before - highest)
            total *= rescale
            for i in range(PARTS):
                acc[i] *= rescale
            for u in range(KEYS):
                if at[u] >= 0:
                    weight = ptx.exp2(x[u] - highest)
                    total += weight
                    if token_scales:
                        weight *= its_scale[u]
                    for i in range(PARTS):
                        if lane + 32 * i < head_dim:
                            acc[i] = ptx.fma(weight, load(np.int64(v_gl) + at[u] + (lane + 32 * i) * item), acc[i])
        for i in range(PARTS):
            ptx.st_shared_f32(shared_sh + warp * pitch + 4 * (lane + 32 * i), acc[i])
        if lane == 0:
            ptx.st_shared_64(shared_sh + sums_offset + 8 * warp, ptx.f32_bits(highest), ptx.f32_bits(total))
        cuda.syncthreads()
        column = 4 * (lane + 32 * warp)
        if column < head_dim:
            highest, total, a, b, c, d = lowest, zero, zero, zero, zero, zero
            for w in range(WARPS):
                highest = ptx.maximum(highest, ptx.ld_shared_f32(shared_sh + sums_offset + 8 * w))
            for w in range(WARPS):
                sums, part = ptx.ld_shared_64(shared_sh + sums_offset + 8 * w), ptx.ld_shared_128(shared_sh + w * pitch + 4 * column)
                weight = ptx.exp2(ptx.bits_f32(sums[0]) - highest)
                total = ptx.fma(weight, ptx.bits_f32(sums[1]), total)
                weight *= value_scale
                a, b = ptx.fma(weight, ptx.bits_f32(part[0]), a), ptx.fma(weight, ptx.bits_f32(part[1]), b)
                c, d = ptx.fma(weight, ptx.bits_f32(part[2]), c), ptx.fma(weight, ptx.bits_f32(part[3]), d)
            line = (batch * new + token) * kv_heads * group + head
            store_result(a, b, c, d, highest, total, line, column, head_dim, split, splits, used, np.int64(out_gl), np.int64(partial_gl),
                         np.int64(lse_gl), kind)
        if used > 1 and counters_gl != 0:
            meet(shared_sh, np.int64(counters_gl) + 4 * block, thread, batch, kv_head, row, np.int32(1), new, group, kv_heads, per_group,
                 head_dim, splits, used, np.int64(out_gl), np.int64(partial_gl), np.int64(lse_gl), kind)

    return decode_plain


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=32 * WARPS, shared_bytes=SHARED_BYTES)


def variants() -> Iterator[Spec]:
    for cache in CACHES:
        yield from (spec(Config(cache, tokens)) for tokens in ((False, True) if cache in CACHES[3:] else (False,)))
