"""attention and attention_varlen on tensor cores (sm_80 and up), float16 and bfloat16: FlashAttention-2 on mma.sync, cp.async and ldmatrix.

One block = 16 * row_tiles * warps query rows of one head; it walks the key tiles that its rows may see from the last to the first, so that
only the first tile that it loads can be ragged. Causal, windows and lengths are integer bounds, compared on edge tiles alone.
Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.attention_common import LOG2E, MINUS_INFINITY, SIGNATURE, make_locate
from ftops.numba_kernels.attention_scores import make_hide, make_shape_scores
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.flash import layout, make_fetch, make_places, make_products, make_softmax, make_store

HEAD_DIMS = (32, 64, 80, 96, 128, 160, 192, 256)


@dataclass(frozen=True)
class Config:
    """head_dim: padded; extras: softcap, bias, ALiBi or a scale that is not positive; row_tiles: 16-row tiles a warp; keys: rows of a key
    tile, a power of two; stages: 2 = K and V tiles double buffered, 1 = V loads under Q K^T and K under P V; q_registers: Q's fragments
    are kept, not reread from shared memory; blocks: resident blocks a multiprocessor that registers must allow.
    """

    dtype: str
    head_dim: int
    extras: bool
    warps: int
    row_tiles: int
    keys: int
    stages: int
    q_registers: bool
    blocks: int

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps

    @property
    def shared_bytes(self) -> int:
        return 2 * self.head_dim * (self.rows + 2 * self.stages * self.keys)


def pick(dtype: str, head_dim: int, extras: bool) -> Config:
    """32 rows a warp wherever the output fits the registers, since an ldmatrix of K or V then feeds four mma, not two, and shared memory
    keeps up with the tensor cores. At most 99 KiB of shared memory, all that sm_86, sm_89 and sm_120 have.
    """
    return Config(dtype, head_dim, extras, *(_EXTRA_TILES if extras and head_dim in _EXTRA_TILES else _TILES)[head_dim])


# warps, row_tiles, keys, stages, q_registers, blocks
_TILES = {
    32: (4, 2, 64, 2, True, 3),
    64: (4, 2, 64, 2, True, 2),
    80: (4, 2, 64, 1, True, 2),
    96: (4, 2, 64, 1, False, 2),
    128: (4, 2, 64, 1, False, 2),
    160: (4, 1, 64, 1, False, 2),
    192: (4, 1, 64, 1, False, 2),
    256: (4, 1, 64, 1, False, 2),
}
# What extras need beside the scores does not fit the registers there.
_EXTRA_TILES = {
    32: (4, 2, 64, 2, True, 2),
    80: (4, 1, 64, 2, True, 3),
    128: (4, 2, 32, 2, False, 2),
}


def make(config: Config) -> Callable:
    head_dim, keys, row_tiles, warps, rows = config.head_dim, config.keys, config.row_tiles, config.warps, config.rows
    extras, double, q_registers = config.extras, config.stages == 2, config.q_registers
    shape = layout(head_dim)
    total_size = 4 * row_tiles
    pitch, places = shape.pitch, shape.places
    q_bytes, tile_bytes = np.uint32(rows * pitch), np.uint32(keys * pitch)
    v_offset = np.uint32(rows * pitch + config.stages * keys * pitch)
    score_size, out_size, halves = row_tiles * keys // 2, row_tiles * head_dim // 2, 2 * row_tiles
    q_size = row_tiles * head_dim // 4 if q_registers else 1
    lanes = shape.mask + 1
    columns = head_dim // 8 // lanes
    row_step = 32 * warps // lanes
    fetch_q_place, fetch_sizes, fetch_q = make_fetch(head_dim, rows, 32 * warps)
    fetch_place, _, fetch = make_fetch(head_dim, keys, 32 * warps)
    row_places, key_places = make_places(head_dim)
    load_q, scores, accumulate = make_products(config.dtype, head_dim, keys, row_tiles, q_registers)
    softmax, finish = make_softmax(head_dim, keys, row_tiles)
    hide = make_hide(keys, row_tiles)
    shape_scores = make_shape_scores(config.dtype, keys, row_tiles)
    locate = make_locate(rows)
    store = make_store(config.dtype, head_dim, row_tiles)

    @cuda.jit(device=True, forceinline=True)
    def first_warp_row():
        return np.int32((ptx.here(np.uint32(cuda.threadIdx.x)) >> np.uint32(5)) * np.uint32(16 * row_tiles))

    def attention_mma(q_gl, k_gl, v_gl, out_gl, bias_gl, alibi_gl, lengths_gl, starts_q_gl, starts_kv_gl,
                      q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, bias_batch, bias_head, bias_row,
                      max_queries, max_keys, heads, group, dim, tiles, left, right, bias_wide, scale, softcap):
        base = ptx.shared_address(cuda.shared.array(0, np.uint8))
        batch, head, first_row, queries, keys_there, start_q, start_kv, limit, position, begin, end = locate(
            max_queries, max_keys, heads, tiles, left, right, lengths_gl, starts_q_gl, starts_kv_gl)
        if first_row >= queries:
            return
        kv_head = np.uint64(ptx.div_u32(head, np.uint32(group)))
        head = np.uint64(head)
        q_gl += np.uint64(batch) * np.uint64(q_batch) + np.uint64(start_q) * np.uint64(q_row) + head * np.uint64(q_head)
        k_gl += np.uint64(batch) * np.uint64(k_batch) + np.uint64(start_kv) * np.uint64(k_row) + kv_head * np.uint64(k_head)
        v_gl += np.uint64(batch) * np.uint64(v_batch) + np.uint64(start_kv) * np.uint64(v_row) + kv_head * np.uint64(v_head)

        # Tiles from the one of key end - 1 down to that of begin; those within [whole_begin, whole_end) are seen whole by every row.
        last_key = np.int32(begin & np.int32(-keys))
        key = np.int32((end - np.int32(1)) & np.int32(-keys)) if end > begin else np.int32(-1)
        whole_begin = np.int32(position + min(np.int32(rows), np.int32(queries - first_row)) - np.int32(1) - left)
        whole_end = np.int32(min(limit, position + right + np.int32(1)))

        own_q = np.uint32(first_warp_row()) * np.uint32(pitch)
        out = cuda.local.array(out_size, np.float32)
        score = cuda.local.array(score_size, np.float32)
        q_reg = cuda.local.array(q_size, np.uint32)
        top = cuda.local.array(halves, np.float32)
        total = cuda.local.array(total_size, np.float32)
        sizes = cuda.local.array(columns, np.uint32)
        at = cuda.local.array(places, np.uint32)
        k_at = cuda.local.array(places, np.uint32)
        for i in range(out_size):
            out[i] = np.float32(0)
        for h in range(halves):
            top[h] = MINUS_INFINITY
        for i in range(total_size):
            total[i] = np.float32(0)

        if key >= last_key:
            factor = np.float32(1) if extras else scale * LOG2E
            slope = np.float32(0)
            if extras:
                bias_gl += np.uint64(batch) * np.uint64(bias_batch) + head * np.uint64(bias_head)
                if alibi_gl != np.uint64(0):
                    slope = LOG2E * ptx.ld_global_f32(alibi_gl + np.uint64(4) * head)
            fetch_sizes(sizes, dim)
            row, byte, place = fetch_q_place()
            q_from = q_gl + np.uint64(np.uint32(first_row) + row) * np.uint64(q_row) + np.uint64(byte)
            fetch_q(base + place, q_from, np.uint64(q_row) * np.uint64(row_step), sizes, np.int32(queries - first_row))
            row, byte, place = fetch_place()
            k_to, v_to = np.uint32(base + place + q_bytes), np.uint32(base + place + v_offset)
            row = np.uint64(np.uint32(key) + row)
            k_from = k_gl + row * np.uint64(k_row) + np.uint64(byte)
            v_from = v_gl + row * np.uint64(v_row) + np.uint64(byte)
            k_step, v_step = np.uint64(k_row) * np.uint64(row_step), np.uint64(v_row) * np.uint64(row_step)
            k_from = fetch(k_to, k_from, k_step, sizes, np.int32(limit - key))
            v_from = fetch(v_to, v_from, v_step, sizes, np.int32(limit - key))
            ptx.cp_async_commit()
            row_places(at, base)
            key_places(k_at, base)
            if q_registers:
                ptx.cp_async_wait_0()
                cuda.syncthreads()
                load_q(q_reg, at, own_q)
            buffer, first = np.uint32(0), True
            while key >= last_key:
                more = key > last_key
                ptx.cp_async_wait_0()
                cuda.syncthreads()
                if double:
                    if more:
                        k_from = fetch(k_to + (buffer ^ tile_bytes), k_from, k_step, sizes, np.int32(keys))
                        v_from = fetch(v_to + (buffer ^ tile_bytes), v_from, v_step, sizes, np.int32(keys))
                elif not first:
                    v_from = fetch(v_to, v_from, v_step, sizes, np.int32(keys))
                ptx.cp_async_commit()
                scores(score, q_reg, at, ptx.here(own_q), k_at, np.uint32(q_bytes + buffer))
                if not double:
                    ptx.cp_async_wait_0()
                    cuda.syncthreads()
                    if more:
                        k_from = fetch(k_to, k_from, k_step, sizes, np.int32(keys))
                    ptx.cp_async_commit()
                if extras:
                    shape_scores(score, key, first_row, queries, keys_there, scale, softcap, bias_gl, bias_row, bias_wide, slope)
                if np.int32(key + np.int32(keys)) > whole_end or key < whole_begin:
                    hide(score, key, position, left, right, limit, group)
                softmax(score, out, top, total, factor)
                accumulate(out, total, score, at, np.uint32(v_offset + buffer))
                key, first = np.int32(key - np.int32(keys)), False
                if double:
                    buffer = np.uint32(buffer ^ tile_bytes)
        finish(out, total)
        # Found anew: kept through the loop, all this would cost registers that it has not.
        batch, head, first_row, queries, _, start_q, _, _, _, _, _ = locate(
            max_queries, max_keys, heads, tiles, left, right, lengths_gl, starts_q_gl, starts_kv_gl)
        warp_row = first_warp_row()
        first_row = np.int32(first_row + warp_row)
        out_row = np.uint64(start_q) + np.uint64(first_row)
        if starts_q_gl == np.uint64(0):
            out_row += np.uint64(batch) * np.uint64(max_queries)
        row_bytes = np.uint64(2 * dim)
        out_gl += (out_row * np.uint64(heads) + np.uint64(head)) * row_bytes
        own_q = np.uint32(base + np.uint32(warp_row) * np.uint32(pitch))
        store(out, own_q, out_gl, np.uint64(heads) * row_bytes, np.int32(queries - first_row), dim)

    return attention_mma


# Bytes of loop-invariant addresses that ptxas keeps in local memory beside 255 registers at head_dim 128 without extras: 52 on sm_80, 40 on
# sm_120, 0 on sm_90a and sm_100. A tile of 32 keys has none and took 8 % longer on an H200.
_SPILLS = 64


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=32 * config.warps, shared_bytes=config.shared_bytes, min_blocks=config.blocks,
                spills=_SPILLS if config.head_dim == 128 and not config.extras else 0, halves=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype in ("float16", "bfloat16"):
        for head_dim in HEAD_DIMS:
            for extras in (False, True):
                yield spec(pick(dtype, head_dim, extras))
