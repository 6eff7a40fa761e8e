"""attention and attention_varlen on Hopper (sm_90a), float16 and bfloat16: FlashAttention-3 in Numba.

Persistent blocks of one producer warp and two or three consumer warpgroups. The producer finds tiles (attention_sm90_tiles.py) and has TMA bring
Q and a ring of K and V tiles to shared memory; a consumer owns 64 query rows (attention_sm90_math.py). S_i = Q K_i^T is started before
O += P_(i-1) V_(i-1) is done, and the consumers take turns at the tensor cores, so that the softmax of one runs under the products of another.
Keys are walked from the last tile that the rows see to the first. Floors, predictions and measurements: docs/tuning/attention_sm90.md.
Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.attention_sm90_math import CHUNK, chunks, make_clear, make_products, make_softmax, make_store
from ftops.numba_kernels.attention_sm90_tiles import NOTHING, dense_tile, make_packed_tile, nth
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.flash import make_hide
from ftops.numba_kernels.launch import Kernel, load, multiprocessors
from ftops.numba_kernels.rows import DTYPE_NAME
from ftops.numba_kernels.tma import tiles as tiles_of

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
LOG2E = np.float32(1.4426950408889634)
# Tensor maps of q, k, v; out, bias, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_kv (0 = not given); strides in bytes of bias (batch,
# head, row, key); Sq, Skv, heads, query heads a kv head, head_dim, batch, tiles a sequence, pairs of sequence and head a section, window left
# and right, bias is float32; scale, softcap.
SIGNATURE = "ttt" + "pppppp" + "llll" + "iiiiiiiiiii" + "ff"
_INFO_BYTES = 48


@dataclass(frozen=True)
class Config:
    """head_dim: padded; consumers: warpgroups of 64 query rows; keys: rows of a K or V tile; stages: K and V tiles in shared memory, of
    each; q_stages: tiles of Q; turns: consumers take turns at the tensor cores.
    """

    dtype: str
    head_dim: int
    consumers: int
    keys: int
    stages: int
    q_stages: int
    turns: bool

    @property
    def rows(self) -> int:
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (1 + self.consumers)

    @property
    def q_bytes(self) -> int:
        return chunks(self.head_dim) * 128 * self.rows

    @property
    def tile_bytes(self) -> int:
        return chunks(self.head_dim) * 128 * self.keys

    @property
    def barrier_offset(self) -> int:
        return self.q_stages * self.q_bytes + 2 * self.stages * self.tile_bytes

    @property
    def shared_bytes(self) -> int:
        """With 1008 bytes to align the tiles to 1024: dynamic shared memory begins on 16 bytes."""
        return self.barrier_offset + 8 * (2 * self.q_stages + 4 * self.stages) + _INFO_BYTES * self.q_stages + 1008


def make(config: Config) -> Callable:
    head_dim, consumers, keys, rows, stages, q_stages = (config.head_dim, config.consumers, config.keys, config.rows, config.stages,
                                                         config.q_stages)
    turns = config.turns
    parts = chunks(head_dim)
    q_bytes, tile_bytes = np.uint32(config.q_bytes), np.uint32(config.tile_bytes)
    k_offset, v_offset = np.uint32(q_stages * config.q_bytes), np.uint32(q_stages * config.q_bytes + stages * config.tile_bytes)
    barrier_offset = np.uint32(config.barrier_offset)
    info_offset = np.uint32(config.barrier_offset + 8 * (2 * q_stages + 4 * stages))
    score_size, out_size, prob_size = keys // 2, head_dim // 2, keys // 4
    q_last, last = np.uint32(q_stages - 1), np.uint32(stages - 1)
    # Registers of the producer and of a consumer; their sum over the block must not pass 65536.
    give, take = (ptx.SETMAXNREG["dec", 24], ptx.SETMAXNREG["inc", 240]) if consumers == 2 else (ptx.SETMAXNREG["dec", 32],
                                                                                                  ptx.SETMAXNREG["inc", 160])
    wait_0, wait_1 = ptx.WGMMA_WAIT[0], ptx.WGMMA_WAIT[1]
    row_major, column_major, scores, accumulate = make_products(config.dtype, head_dim, rows, keys)
    softmax, rescale, pack = make_softmax(config.dtype, head_dim, keys)
    hide = make_hide(keys, 1)
    clear = make_clear(head_dim, keys)
    store = make_store(config.dtype, head_dim)
    packed_tile = make_packed_tile(rows)

    @cuda.jit(device=True, forceinline=True)
    def next_slot(slot, phase):
        return (np.uint32(0), np.uint32(phase ^ np.uint32(1))) if slot == last else (np.uint32(slot + np.uint32(1)), phase)

    @cuda.jit(device=True, forceinline=True)
    def next_q_slot(slot, phase):
        return (np.uint32(0), np.uint32(phase ^ np.uint32(1))) if slot == q_last else (np.uint32(slot + np.uint32(1)), phase)

    @cuda.jit(device=True, forceinline=True)
    def fetch(place, full, map_, head, row, batch, tile_rows):
        for c in range(parts):
            ptx.tma_load_4d(place + np.uint32(c * 128) * np.uint32(tile_rows), map_, full, np.uint32(64 * c), head, row, batch)

    @cuda.jit(device=True, forceinline=True)
    def produce(base, q_map, k_map, v_map, lengths_gl, starts_q_gl, starts_kv_gl, all_queries, all_keys, heads, group, batches, tiles, section,
                left, right):
        q_full = base + barrier_offset
        q_empty = np.uint32(q_full + np.uint32(8 * q_stages))
        k_full = np.uint32(q_empty + np.uint32(8 * q_stages))
        k_empty, v_full, v_empty = (np.uint32(k_full + np.uint32(8 * stages)), np.uint32(k_full + np.uint32(16 * stages)),
                                    np.uint32(k_full + np.uint32(24 * stages)))
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        packed = starts_q_gl != np.uint64(0)
        round_, scan_base, scan_before = np.uint32(0), np.uint32(0), np.uint32(0)
        q_slot, q_phase = np.uint32(0), np.uint32(1)
        k_slot, k_phase, v_slot, v_phase = np.uint32(0), np.uint32(1), np.uint32(0), np.uint32(1)
        batch = np.uint32(0)
        while batch != NOTHING:
            index = nth(round_, np.uint32(cuda.gridDim.x), np.uint32(cuda.blockIdx.x))
            round_ += np.uint32(1)
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
                batch, head, tile = dense_tile(index, tiles, heads, batches * heads, section)
            first_row = np.int32((tiles - np.uint32(1) - tile) * np.uint32(rows))
            limit = np.int32(seen)
            if lengths_gl != np.uint64(0) and batch != NOTHING:
                limit = np.int32(min(limit, np.int32(ptx.ld_global_32(lengths_gl + np.uint64(4) * np.uint64(batch)))))
            position = np.int32(seen - queries + first_row)
            begin = np.int32(max(position - left, np.int32(0)))
            end = np.int32(min(limit, position + min(np.int32(rows), np.int32(queries - first_row)) + right))
            first = np.int32(0)
            count = np.int32(0)
            if end > begin:
                first = np.int32((end - np.int32(1)) // np.int32(keys))
                count = np.int32(first - begin // np.int32(keys) + np.int32(1))
            if lane == np.uint32(0):
                full = np.uint32(q_full + np.uint32(8) * q_slot)
                ptx.mbarrier_wait(q_empty + np.uint32(8) * q_slot, q_phase)
                info = np.uint32(base + info_offset + np.uint32(_INFO_BYTES) * q_slot)
                row = np.uint32(start_q if packed else batch * np.uint32(all_queries)) + np.uint32(first_row)
                ptx.st_shared_128(info, NOTHING if batch == NOTHING else np.uint32(count), np.uint32(first * np.int32(keys)), np.uint32(position),
                                  np.uint32(queries - first_row))
                ptx.st_shared_128(info + np.uint32(16), np.uint32(limit), row, head, batch)
                ptx.st_shared_32(info + np.uint32(32), np.uint32(first_row))
                if batch == NOTHING or count == np.int32(0):
                    ptx.mbarrier_arrive(full)
                else:
                    map_batch = np.uint32(0) if packed else batch
                    kv_head = ptx.div_u32(head, group)
                    ptx.mbarrier_expect(full, q_bytes)
                    fetch(base + q_slot * q_bytes, full, q_map, head, start_q + np.uint32(first_row), map_batch, rows)
                    key = np.uint32(start_kv + np.uint32(first * np.int32(keys)))
                    # K_i before V_(i-1): the order in which the consumers free the slots. `here` keeps the loop from being unrolled.
                    waiting = np.uint32(count)
                    behind = False
                    while waiting != np.uint32(0) or behind:
                        if waiting != np.uint32(0):
                            full = np.uint32(k_full + np.uint32(8) * k_slot)
                            ptx.mbarrier_wait(k_empty + np.uint32(8) * k_slot, k_phase)
                            ptx.mbarrier_expect(full, tile_bytes)
                            fetch(base + k_offset + k_slot * tile_bytes, full, k_map, kv_head, key, map_batch, keys)
                            k_slot, k_phase = next_slot(k_slot, k_phase)
                        if behind:
                            full = np.uint32(v_full + np.uint32(8) * v_slot)
                            ptx.mbarrier_wait(v_empty + np.uint32(8) * v_slot, v_phase)
                            ptx.mbarrier_expect(full, tile_bytes)
                            fetch(base + v_offset + v_slot * tile_bytes, full, v_map, kv_head, key + np.uint32(keys), map_batch, keys)
                            v_slot, v_phase = next_slot(v_slot, v_phase)
                        behind = waiting != np.uint32(0)
                        waiting = ptx.here(np.uint32(waiting - np.uint32(behind)))
                        key = np.uint32(key - np.uint32(keys))
            ptx.warp_sync()
            q_slot, q_phase = next_q_slot(q_slot, q_phase)

    def attention_sm90(q_map, k_map, v_map, out_gl, bias_gl, alibi_gl, lengths_gl, starts_q_gl, starts_kv_gl, bias_batch, bias_head, bias_row,
                       bias_key, queries, keys_there, heads, group, dim, batches, tiles, section, left, right, bias_wide, scale, softcap):
        base = np.uint32((ptx.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00))
        q_full = base + barrier_offset
        q_empty = np.uint32(q_full + np.uint32(8 * q_stages))
        k_full = np.uint32(q_empty + np.uint32(8 * q_stages))
        k_empty, v_full, v_empty = (np.uint32(k_full + np.uint32(8 * stages)), np.uint32(k_full + np.uint32(16 * stages)),
                                    np.uint32(k_full + np.uint32(24 * stages)))
        thread = np.uint32(cuda.threadIdx.x)
        q_tensor, k_tensor, v_tensor = ptx.tensor_map(q_map), ptx.tensor_map(k_map), ptx.tensor_map(v_map)
        if thread == np.uint32(0):
            ptx.prefetch_tensor_map(q_tensor)
            ptx.prefetch_tensor_map(k_tensor)
            ptx.prefetch_tensor_map(v_tensor)
            for s in range(q_stages):
                ptx.mbarrier_init(q_full + np.uint32(8 * s), np.uint32(1))
                ptx.mbarrier_init(q_empty + np.uint32(8 * s), np.uint32(consumers))
            for s in range(stages):
                ptx.mbarrier_init(k_full + np.uint32(8 * s), np.uint32(1))
                ptx.mbarrier_init(k_empty + np.uint32(8 * s), np.uint32(consumers))
                ptx.mbarrier_init(v_full + np.uint32(8 * s), np.uint32(1))
                ptx.mbarrier_init(v_empty + np.uint32(8 * s), np.uint32(consumers))
            ptx.fence_mbarrier_init()
        cuda.syncthreads()

        if thread < np.uint32(128):
            give()
            if thread < np.uint32(32):
                produce(base, q_tensor, k_tensor, v_tensor, lengths_gl, starts_q_gl, starts_kv_gl, queries, keys_there, np.uint32(heads),
                        np.uint32(group), np.uint32(batches), np.uint32(tiles), np.uint32(section), left, right)
        else:
            take()
            mine = np.uint32((thread >> np.uint32(7)) - np.uint32(1))
            leader = thread & np.uint32(127) == np.uint32(0)
            my_turn = np.uint32(mine + np.uint32(1))
            next_turn = np.uint32(1) if mine == np.uint32(consumers - 1) else np.uint32(my_turn + np.uint32(1))
            out = cuda.local.array(out_size, np.float32)
            score = cuda.local.array(score_size, np.float32)
            prob = cuda.local.array(prob_size, np.uint32)
            top = cuda.local.array(2, np.float32)
            total = cuda.local.array(2, np.float32)
            for i in range(score_size):
                score[i] = np.float32(0)
            factor = scale * LOG2E
            q_slot, q_phase = np.uint32(0), np.uint32(0)
            k_slot, k_phase, v_slot, v_phase = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
            if turns and mine == np.uint32(consumers - 1):
                ptx.bar_arrive(next_turn, np.uint32(256))
            while True:
                ptx.mbarrier_wait(q_full + np.uint32(8) * q_slot, q_phase)
                info = np.uint32(base + info_offset + np.uint32(_INFO_BYTES) * q_slot)
                count, key, position, rows_left = ptx.ld_shared_128(info)
                if count == NOTHING:
                    break
                limit, out_row, head, batch = ptx.ld_shared_128(info + np.uint32(16))
                left_blocks, key, position = np.int32(count), np.int32(key), np.int32(np.int32(position) + np.int32(64) * np.int32(mine))
                limit, rows_left = np.int32(limit), np.int32(np.int32(rows_left) - np.int32(64) * np.int32(mine))
                q = row_major(base + q_slot * q_bytes + mine * np.uint32(8192))
                for i in range(out_size):
                    out[i] = np.float32(0)
                for h in range(2):
                    top[h] = np.float32(-np.inf)
                    total[h] = np.float32(0)
                # Tiles within [whole_begin, whole_end) are seen whole by all of this warpgroup's rows, those from `end` on by none.
                whole_begin = np.int32(position + min(np.int32(64), rows_left) - np.int32(1) - left)
                whole_end = np.int32(min(limit, position + right + np.int32(1)))
                end = np.int32(min(limit, position + min(np.int32(64), rows_left) + right)) if rows_left > 0 else np.int32(-1)
                # Rows of the first V tile that exist, where what follows them in memory belongs to others.
                valid = np.int32(keys)
                if lengths_gl != np.uint64(0) or starts_q_gl != np.uint64(0):
                    valid = np.int32(min(np.int32(keys), limit - key))
                while left_blocks > 0 and key >= end:
                    ptx.mbarrier_wait(k_full + np.uint32(8) * k_slot, k_phase)
                    if turns:
                        ptx.bar_sync(my_turn, np.uint32(256))
                        ptx.bar_arrive(next_turn, np.uint32(256))
                    ptx.mbarrier_wait(v_full + np.uint32(8) * v_slot, v_phase)
                    if leader:
                        ptx.mbarrier_arrive(k_empty + np.uint32(8) * k_slot)
                        ptx.mbarrier_arrive(v_empty + np.uint32(8) * v_slot)
                    k_slot, k_phase = next_slot(k_slot, k_phase)
                    v_slot, v_phase = next_slot(v_slot, v_phase)
                    key = np.int32(key - np.int32(keys))
                    left_blocks = np.int32(left_blocks - np.int32(1))
                    valid = np.int32(keys)
                if left_blocks > 0:
                    ptx.mbarrier_wait(k_full + np.uint32(8) * k_slot, k_phase)
                    if turns:
                        ptx.bar_sync(my_turn, np.uint32(256))
                    scores(score, q, row_major(base + k_offset + k_slot * tile_bytes))
                    if turns:
                        ptx.bar_arrive(next_turn, np.uint32(256))
                    wait_0()
                    if leader:
                        ptx.mbarrier_arrive(k_empty + np.uint32(8) * k_slot)
                    k_slot, k_phase = next_slot(k_slot, k_phase)
                    if key + np.int32(keys) > whole_end or key < whole_begin:
                        hide(score, key, position - np.int32(64) * np.int32(mine) - np.int32(64), left, right, limit)
                    softmax(score, top, total, factor)
                    ptx.mbarrier_wait(v_full + np.uint32(8) * v_slot, v_phase)
                    pack(prob, score)
                    if valid < np.int32(keys):
                        clear(base + v_offset + v_slot * tile_bytes, valid)
                        ptx.bar_sync(np.uint32(np.uint32(consumers + 1) + mine), np.uint32(128))
                    left_blocks = np.int32(left_blocks - np.int32(1))
                    while left_blocks > 0:
                        key = np.int32(key - np.int32(keys))
                        ptx.mbarrier_wait(k_full + np.uint32(8) * k_slot, k_phase)
                        if turns:
                            ptx.bar_sync(my_turn, np.uint32(256))
                        scores(score, q, row_major(base + k_offset + k_slot * tile_bytes))
                        accumulate(out, prob, column_major(base + v_offset + v_slot * tile_bytes))
                        if turns:
                            ptx.bar_arrive(next_turn, np.uint32(256))
                        wait_1()
                        if leader:
                            ptx.mbarrier_arrive(k_empty + np.uint32(8) * k_slot)
                        k_slot, k_phase = next_slot(k_slot, k_phase)
                        if key + np.int32(keys) > whole_end or key < whole_begin:
                            hide(score, key, position - np.int32(64) * np.int32(mine) - np.int32(64), left, right, limit)
                        r0, r1 = softmax(score, top, total, factor)
                        # This wait for the next V stands here and not before its P V, because its loop is what keeps the assembler from moving
                        # the softmax below the wait for the P V that runs meanwhile.
                        next_v, next_v_phase = next_slot(v_slot, v_phase)
                        ptx.mbarrier_wait(v_full + np.uint32(8) * next_v, next_v_phase)
                        wait_0()
                        if leader:
                            ptx.mbarrier_arrive(v_empty + np.uint32(8) * v_slot)
                        v_slot, v_phase = next_v, next_v_phase
                        pack(prob, score)
                        rescale(out, r0, r1)
                        left_blocks = np.int32(left_blocks - np.int32(1))
                    if leader:
                        ptx.mbarrier_arrive(q_empty + np.uint32(8) * q_slot)
                    accumulate(out, prob, column_major(base + v_offset + v_slot * tile_bytes))
                    wait_0()
                    if leader:
                        ptx.mbarrier_arrive(v_empty + np.uint32(8) * v_slot)
                    v_slot, v_phase = next_slot(v_slot, v_phase)
                elif leader:
                    ptx.mbarrier_arrive(q_empty + np.uint32(8) * q_slot)
                q_slot, q_phase = next_q_slot(q_slot, q_phase)
                warp_row = np.uint32(np.uint32(64) * mine + ((thread >> np.uint32(5)) & np.uint32(3)) * np.uint32(16))
                row_bytes = np.uint64(heads) * np.uint64(2 * dim)
                store(out, total, out_gl + (np.uint64(out_row) + np.uint64(warp_row)) * row_bytes + np.uint64(head) * np.uint64(2 * dim), row_bytes,
                      np.int32(rows_left - np.int32((thread >> np.uint32(5)) & np.uint32(3)) * np.int32(16)), dim)
            if turns and mine == np.uint32(0):
                ptx.bar_sync(my_turn, np.uint32(256))

    return attention_sm90


_TILES = {
    64: (3, 128, 2, 1, True),
    80: (2, 128, 2, 1, True),
    96: (2, 128, 2, 1, True),
    128: (2, 128, 2, 1, True),
    192: (2, 112, 2, 1, False),
    256: (2, 80, 2, 1, False),
}


def pick(dtype: str, head_dim: int) -> Config:
    consumers, keys, stages, q_stages, turns = _TILES[head_dim]
    return Config(dtype, head_dim, consumers, keys, stages, q_stages, turns)


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=config.threads, shared_bytes=config.shared_bytes, only="sm_90a")


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype in ("float16", "bfloat16"):
        for head_dim in HEAD_DIMS:
            yield spec(pick(dtype, head_dim))


@functools.cache
def _kernel(dtype: torch.dtype, dim: int, device: int) -> Kernel:
    return load(spec(pick(DTYPE_NAME[dtype], next(d for d in HEAD_DIMS if d >= dim))), device)


def launch(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, batch: int, queries: int, keys: int, scale: float,
           left: int, right: int, softcap: float, bias: torch.Tensor | None, bias_strides: tuple[int, ...], alibi_slopes: torch.Tensor | None,
           lengths: torch.Tensor | None, starts_q: torch.Tensor | None, starts_kv: torch.Tensor | None) -> None:
    """As attention.py has it: 16-byte aligned q, k, v[rows of batch, sequence, heads, dim], nothing empty, window ends at most UNBOUNDED."""
    config = kernel.spec.config
    _, _, heads, dim = q.shape
    kv_heads = k.shape[2]
    q_map, k_map, v_map = (_map(t, rows) for t, rows in ((q, config.rows), (k, config.keys), (v, config.keys)))
    tiles, pairs, group = -(-queries // config.rows), batch * heads, heads // kv_heads
    section = group
    if right < keys:
        section = min(pairs, group * max(1, _SECTION_BYTES // (4 * keys * dim)))
    kernel(min(multiprocessors(q.device.index), tiles * pairs), 1, 1, q_map, k_map, v_map, out.data_ptr(), _address(bias), _address(alibi_slopes),
           _address(lengths), _address(starts_q), _address(starts_kv), *bias_strides, queries, keys, heads, group, dim, batch, tiles, section,
           left, right, bias is not None and bias.dtype is torch.float32, scale, softcap)


_SECTION_BYTES = 32 << 20  # keys and values that stay in an L2 of 50 MB while all their query rows pass


def _map(t: torch.Tensor, rows: int) -> bytes:
    batch, sequence, heads, dim = t.shape
    batch_step, row_step, head_step, _ = t.stride()
    return tiles_of(t.data_ptr(), t.dtype, (dim, heads, sequence, batch), (head_step, row_step, batch_step), (CHUNK, 1, rows, 1))


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
