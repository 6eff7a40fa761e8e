"""The producer of attention on Hopper: one warp that finds the next tile of query rows and has TMA bring its Q, K and V to shared memory.

A tile is `rows` query rows of one sequence and head, or, for a result in parts, as many rows of the heads that share keys, query by query,
and a share of the keys. Where tiles differ in length, blocks take the next one from a counter in global memory when they need it; under a
causal mask the last rows of a sequence see most keys and come first, so that all blocks finish together.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.attention_sm90_config import INFO_BYTES, INFO_SLOTS, Config

NOTHING = np.uint32(0xFFFFFFFF)


@cuda.jit(device=True, forceinline=True)
def dense_tile(index, tiles, heads, pairs, section):
    """(batch, head, tile from the last) of `pairs` sequences and heads with `tiles` tiles each; batch NOTHING past the end.

    Sections of `section` pairs, whose keys and values stay in L2, are finished one after the other, in each the longest tiles first.
    """
    first = np.uint32(ptx.div_u32(index, tiles * section) * section)
    if first >= pairs:
        return NOTHING, np.uint32(0), np.uint32(0)
    rest = np.uint32(index - first * tiles)
    there = np.uint32(min(section, np.uint32(pairs - first)))
    tile = ptx.div_u32(rest, there)
    if tile >= tiles:  # the last section may be smaller than the others
        return NOTHING, np.uint32(0), np.uint32(0)
    pair = np.uint32(first + rest - tile * there)
    batch = ptx.div_u32(pair, heads)
    return batch, np.uint32(pair - batch * heads), tile


@cuda.jit(device=True, forceinline=True)
def share_of(count, part, parts):
    """(passed, mine) of `count` tiles of keys, from the last on: how many belong to parts before this one, and how many to it."""
    passed = ptx.div_u32(np.uint32(count * part), parts)
    return passed, np.uint32(ptx.div_u32(np.uint32(count * np.uint32(part + np.uint32(1))), parts) - passed)


def make_packed_tile(rows: int) -> Callable:
    """packed_tile(index, heads, batches, starts_gl, base, before) -> (batch, head, tile from the last, base, before), sequences lying end
    to end. A warp looks at 32 sequences at a time, from `base` on, before which there are `before` tiles: indices must not fall.
    """

    @cuda.jit(device=True, forceinline=True)
    def packed_tile(index, heads, batches, starts_gl, base, before):
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        wanted = ptx.div_u32(index, heads)
        head = np.uint32(index - wanted * heads)
        while base < batches:
            here = np.uint32(base + lane)
            tiles = np.uint32(0)
            if here < batches:
                at = starts_gl + np.uint64(4) * np.uint64(here)
                length = np.uint32(ptx.ld_global_32(at + np.uint64(4)) - ptx.ld_global_32(at))
                tiles = np.uint32((length + np.uint32(rows - 1)) // np.uint32(rows))
            through = np.uint32(tiles)
            for step in (1, 2, 4, 8, 16):
                lower = ptx.shuffle_index(through, lane - np.uint32(step))
                if lane >= np.uint32(step):
                    through = np.uint32(through + lower)
            passed = np.uint32(cuda.popc(ptx.ballot(np.uint32(np.uint32(before + through) <= wanted))))
            if passed < np.uint32(32):
                last = ptx.shuffle_index(np.uint32(before + through), passed)
                tiles = ptx.shuffle_index(tiles, passed)
                return np.uint32(base + passed), head, np.uint32(wanted - (last - tiles)), base, before
            before = np.uint32(before + ptx.shuffle_index(through, np.uint32(31)))
            base = np.uint32(base + np.uint32(32))
        return NOTHING, head, np.uint32(0), base, before

    return packed_tile


def make_begin(config: Config, fillers: int) -> Callable:
    """begin(base, maps): the barriers, by one thread of a block. fillers: warps that fill a tile of V."""
    consumers, stages, narrow = config.consumers, config.stages, config.narrow
    q_full, q_empty = np.uint32(config.q_full), np.uint32(config.q_empty)
    k_full, k_empty, v_full, v_empty = (np.uint32(at) for at in (config.k_full, config.k_empty, config.v_full, config.v_empty))
    raw_full, raw_empty = np.uint32(config.raw_full), np.uint32(config.raw_empty)

    @cuda.jit(device=True, forceinline=True)
    def begin(base, q_tensor, k_tensor, v_tensor):
        hopper.prefetch_tensor_map(q_tensor)
        hopper.prefetch_tensor_map(k_tensor)
        hopper.prefetch_tensor_map(v_tensor)
        hopper.mbarrier_init(base + q_full, np.uint32(1))
        hopper.mbarrier_init(base + q_empty, np.uint32(4 * consumers + (fillers if narrow else 0)))
        for s in range(stages):
            hopper.mbarrier_init(base + k_full + np.uint32(8 * s), np.uint32(1))
            hopper.mbarrier_init(base + v_full + np.uint32(8 * s), np.uint32(fillers))
            if narrow:
                hopper.mbarrier_init(base + raw_full + np.uint32(8 * s), np.uint32(1))
                hopper.mbarrier_init(base + raw_empty + np.uint32(8 * s), np.uint32(fillers))
            hopper.mbarrier_init(base + k_empty + np.uint32(8 * s), np.uint32(consumers))
            hopper.mbarrier_init(base + v_empty + np.uint32(8 * s), np.uint32(consumers))
        hopper.fence_mbarrier_init()

    return begin


def make_produce(config: Config) -> Callable:
    rows, keys, stages, chunks, chunk = config.rows, config.keys, config.stages, config.chunks, config.chunk
    q_bytes, tile_bytes = np.uint32(config.q_bytes), np.uint32(config.tile_bytes)
    k_at, v_at, info_at = np.uint32(config.k_at), np.uint32(config.raw_at), np.uint32(config.info_at)
    q_full, q_empty = np.uint32(config.q_full), np.uint32(config.q_empty)
    k_full, k_empty, v_full, v_empty = (np.uint32(at) for at in (config.k_full, config.k_empty, config.raw_full, config.raw_empty))
    last, in_parts, line_bytes = np.uint32(stages - 1), config.parts, np.uint32(128 * config.chunks)
    packed_tile = make_packed_tile(rows)

    @cuda.jit(device=True, forceinline=True)
    def fetch(place, tile_rows, full, size, tensor, head, row, batch):
        hopper.mbarrier_expect(full, size)
        for c in range(chunks):
            hopper.tma_load_4d(place + np.uint32(c * 128 * tile_rows), tensor, full, np.uint32(chunk * c), head, row, batch)

    @cuda.jit(device=True, forceinline=True)
    def produce(base, q_tensor, k_tensor, v_tensor, lengths_gl, starts_q_gl, starts_kv_gl, counters_gl, all_queries, all_keys, heads, group,
                batches, tiles, section, left, right, key_parts):
        """In parts: heads are those of keys, and there are `tiles` of query rows and key_parts times as many."""
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        blocks = np.uint32(cuda.gridDim.x)
        packed = starts_q_gl != np.uint64(0)
        index, scan_base, scan_before = np.uint32(cuda.blockIdx.x), np.uint32(0), np.uint32(0)
        turn = np.uint32(0)
        # Of K_i and of V_(i-1), which lies in the slot before.
        slot, phase = np.uint32(0), np.uint32(1)
        batch, part, height, query_bytes = np.uint32(0), np.uint32(0), np.int32(rows), q_bytes
        if in_parts:
            height = np.int32(ptx.div_u32(np.uint32(rows), group))
            query_bytes = np.uint32(np.uint32(height) * group * line_bytes)
        while batch != NOTHING:
            queries, seen, start_q, start_kv = np.int32(all_queries), np.int32(all_keys), np.uint32(0), np.uint32(0)
            if packed:
                batch, head, tile, scan_base, scan_before = packed_tile(index, heads, batches, starts_q_gl, scan_base, scan_before)
                if batch != NOTHING:
                    at = np.uint64(4) * np.uint64(batch)
                    start_q, start_kv = ptx.ld_global_32(starts_q_gl + at), ptx.ld_global_32(starts_kv_gl + at)
                    queries = np.int32(ptx.ld_global_32(starts_q_gl + at + np.uint64(4)) - start_q)
                    seen = np.int32(ptx.ld_global_32(starts_kv_gl + at + np.uint64(4)) - start_kv)
                tiles = np.uint32((np.uint32(queries) + np.uint32(rows - 1)) // np.uint32(rows))
            else:
                batch, head, tile = dense_tile(index, np.uint32(tiles * key_parts) if in_parts else tiles, heads, batches * heads, section)
                if in_parts:
                    part = ptx.div_u32(tile, tiles)
                    tile = np.uint32(tile - part * tiles)
            index = np.uint32(index + blocks)
            if lane == np.uint32(0):
                if counters_gl != np.uint64(0) and batch != NOTHING:
                    index = np.uint32(blocks + hopper.atomic_add_u32(counters_gl, np.uint32(1)))
                limit = np.int32(seen)
                if lengths_gl != np.uint64(0) and batch != NOTHING:
                    limit = np.int32(min(limit, np.int32(ptx.ld_global_32(lengths_gl + np.uint64(4) * np.uint64(batch)))))
                first_row = np.int32((tiles - np.uint32(1) - tile) * np.uint32(height))
                position = np.int32(seen - queries + first_row)
                begin = np.int32(max(position - left, np.int32(0)))
                there = np.int32(min(height, np.int32(queries - first_row)))
                end = np.int32(min(limit, position + there + right))
                first, count = np.uint32(0), np.uint32(0)
                if end > begin:
                    first = np.uint32(np.uint32(end - np.int32(1)) // np.uint32(keys))
                    count = np.uint32(first - np.uint32(begin) // np.uint32(keys) + np.uint32(1))
                rows_left, q_head, kv_head = np.uint32(queries - first_row), head, head
                if in_parts:
                    passed, count = share_of(count, part, key_parts)
                    first = np.uint32(first - passed)
                    rows_left, q_head = np.uint32(np.uint32(there) * group), np.uint32(head * group)
                else:
                    kv_head = ptx.div_u32(head, group)
                key = np.uint32(first * np.uint32(keys))
                out_row = np.uint32(start_q + np.uint32(first_row) if packed else batch * np.uint32(all_queries) + np.uint32(first_row))
                hopper.mbarrier_wait(base + q_empty, (turn & np.uint32(1)) ^ np.uint32(1))
                info = np.uint32(base + info_at + np.uint32(INFO_BYTES) * (turn & np.uint32(INFO_SLOTS - 1)))
                ptx.st_shared_128(info, NOTHING if batch == NOTHING else count, key, np.uint32(position), rows_left)
                ptx.st_shared_128(info + np.uint32(16), np.uint32(limit), out_row, head, batch)
                ptx.st_shared_32(info + np.uint32(32), part if in_parts else np.uint32(first_row))
                full = np.uint32(base + q_full)
                if batch == NOTHING or count == np.uint32(0):
                    hopper.mbarrier_arrive(full)
                else:
                    map_batch = np.uint32(0) if packed else batch
                    fetch(base, rows, full, query_bytes, q_tensor, q_head, start_q + np.uint32(first_row), map_batch)
                    key = np.uint32(key + start_kv)
                    # K_i before V_(i-1): the order in which the consumers free the slots. `here` keeps the loop from being unrolled.
                    behind = False
                    while count != np.uint32(0) or behind:
                        if count != np.uint32(0):
                            hopper.mbarrier_wait(base + k_empty + np.uint32(8) * slot, phase)
                            fetch(base + k_at + slot * tile_bytes, keys, base + k_full + np.uint32(8) * slot, tile_bytes, k_tensor,
                                  kv_head, key, map_batch)
                        if behind:
                            before = last if slot == np.uint32(0) else np.uint32(slot - np.uint32(1))
                            hopper.mbarrier_wait(base + v_empty + np.uint32(8) * before, phase ^ np.uint32(slot == np.uint32(0)))
                            fetch(base + v_at + before * tile_bytes, keys, base + v_full + np.uint32(8) * before, tile_bytes, v_tensor,
                                  kv_head, key + np.uint32(keys), map_batch)
                        if count != np.uint32(0):
                            phase = np.uint32(phase ^ np.uint32(slot == last))
                            slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                        behind = count != np.uint32(0)
                        count = ptx.here(np.uint32(count - np.uint32(behind)))
                        key = np.uint32(key - np.uint32(keys))
            index = ptx.shuffle_index(index, np.uint32(0))
            turn = np.uint32(turn + np.uint32(1))
        # The last block to stop counting sets the counters back, for the launch that comes after this one in the stream.
        if lane == np.uint32(0) and counters_gl != np.uint64(0):
            stopped = ptx.atomic_inc_u32(counters_gl + np.uint64(4), blocks - np.uint32(1))
            if stopped == blocks - np.uint32(1):
                ptx.st_global_32(counters_gl, np.uint32(0))

    return produce
