"""attention and attention_varlen on Hopper (sm_90a), float16 and bfloat16: FlashAttention-3 in Numba.

Persistent blocks of one producer warp (attention_sm90_load.py) and two or three consumer warpgroups of 64 query rows each
(attention_sm90_math.py). S_i = Q K_i^T is started before O += P_(i-1) V_(i-1) is done, and the consumers take turns at the tensor cores, so
that the softmax of one runs under the products of another. Keys are walked from the last tile that the rows see to the first.
Floors, predictions and measurements: docs/tuning/attention_sm90.md.
Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.attention_common import LOG2E, address
from ftops.numba_kernels.attention_scores import make_hide, make_shape_scores
from ftops.numba_kernels.attention_sm90_config import CHUNK, HEAD_DIMS, INFO_BYTES, INFO_SLOTS, Config, pick
from ftops.numba_kernels.attention_sm90_load import NOTHING, make_produce
from ftops.numba_kernels.attention_sm90_math import make_clear, make_products, make_softmax, make_store
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, load, multiprocessors
from ftops.numba_kernels.rows import DTYPE_NAME
from ftops.numba_kernels.tma import tiles as tiles_of

# Tensor maps of q, k, v; out, bias, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_kv, counters (0 = not given); strides in bytes of
# bias (batch, head, row); Sq, Skv, heads, query heads a kv head, head_dim, batch, tiles a sequence, pairs of sequence and head a section,
# window left and right, bias is float32; scale, softcap.
SIGNATURE = "ttt" + "ppppppp" + "lll" + "iiiiiiiiiii" + "ff"
_SECTION_BYTES = 32 << 20  # keys and values that stay in an L2 of 50 MB while all their query rows pass


def make(config: Config) -> Callable:
    head_dim, extras, consumers, keys, stages, q_stages, turns, under = (
        config.head_dim, config.extras, config.consumers, config.keys, config.stages, config.q_stages, config.turns, config.under)
    q_bytes, tile_bytes = np.uint32(config.q_bytes), np.uint32(config.tile_bytes)
    k_at, v_at, info_at = np.uint32(config.k_at), np.uint32(config.v_at), np.uint32(config.info_at)
    q_full, q_empty = np.uint32(config.q_full), np.uint32(config.q_empty)
    k_full, k_empty, v_full, v_empty = (np.uint32(at) for at in (config.k_full, config.k_empty, config.v_full, config.v_empty))
    score_size, out_size, prob_size = keys // 2, head_dim // 2, keys // 4
    last, q_shift, both = np.uint32(stages - 1), np.uint32(q_stages - 1), np.uint32(256)
    # Registers of a producer's and of a consumer's thread: what the block was launched with, 504 or 512 a lane of four or three warpgroups.
    give, take = (hopper.SETMAXNREG["dec", 40], hopper.SETMAXNREG["inc", 232]) if consumers == 2 else (hopper.SETMAXNREG["dec", 32],
                                                                                                  hopper.SETMAXNREG["inc", 160])
    wait_0, wait_1 = hopper.WGMMA_WAIT[0], hopper.WGMMA_WAIT[1]
    row_major, column_major, scores, accumulate, accumulate_under = make_products(config)
    highest, softmax, rescale, pack = make_softmax(config)
    hide = make_hide(keys, 1)
    shape_scores = make_shape_scores(config.dtype, keys, 1)
    clear, store, produce = make_clear(config), make_store(config), make_produce(config)

    def attention_sm90(q_map, k_map, v_map, out_gl, bias_gl, alibi_gl, lengths_gl, starts_q_gl, starts_kv_gl, counters_gl,
                       bias_batch, bias_head, bias_row, queries, keys_there, heads, group, dim, batches, tiles, section, left, right,
                       bias_wide, scale, softcap):
        base = np.uint32((ptx.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00))
        thread = np.uint32(cuda.threadIdx.x)
        q_tensor, k_tensor, v_tensor = hopper.tensor_map(q_map), hopper.tensor_map(k_map), hopper.tensor_map(v_map)
        if thread == np.uint32(0):
            hopper.prefetch_tensor_map(q_tensor)
            hopper.prefetch_tensor_map(k_tensor)
            hopper.prefetch_tensor_map(v_tensor)
            for s in range(q_stages):
                hopper.mbarrier_init(base + q_full + np.uint32(8 * s), np.uint32(1))
                hopper.mbarrier_init(base + q_empty + np.uint32(8 * s), np.uint32(consumers))
            for s in range(stages):
                hopper.mbarrier_init(base + k_full + np.uint32(8 * s), np.uint32(1))
                hopper.mbarrier_init(base + v_full + np.uint32(8 * s), np.uint32(1))
                hopper.mbarrier_init(base + k_empty + np.uint32(8 * s), np.uint32(consumers))
                hopper.mbarrier_init(base + v_empty + np.uint32(8 * s), np.uint32(consumers))
            hopper.fence_mbarrier_init()
        cuda.syncthreads()

        if thread < np.uint32(128):
            give()
            if thread < np.uint32(32):
                produce(base, q_tensor, k_tensor, v_tensor, lengths_gl, starts_q_gl, starts_kv_gl, counters_gl, queries, keys_there,
                        np.uint32(heads), np.uint32(group), np.uint32(batches), np.uint32(tiles), np.uint32(section), left, right)
            return

        take()
        mine = np.uint32((thread >> np.uint32(7)) - np.uint32(1))
        first_mine = np.int32(np.int32(64) * np.int32(mine))
        leader = thread & np.uint32(127) == np.uint32(0)
        my_turn = np.uint32(mine + np.uint32(1))
        next_turn = np.uint32(1) if mine == np.uint32(consumers - 1) else np.uint32(my_turn + np.uint32(1))
        factor = np.float32(1) if extras else scale * LOG2E
        slope = np.float32(0)
        out = cuda.local.array(out_size, np.float32)
        score = cuda.local.array(score_size, np.float32)
        prob = cuda.local.array(prob_size, np.uint32)
        top = cuda.local.array(2, np.float32)
        total = cuda.local.array(2, np.float32)
        for i in range(score_size):
            score[i] = np.float32(0)
        # K_i and V_i lie in slots of one number; `before` is that of V_(i-1).
        slot, phase, before = np.uint32(0), np.uint32(0), last
        turn = np.uint32(0)
        if turns and mine == np.uint32(consumers - 1):
            hopper.bar_arrive(next_turn, both)
        while True:
            q_slot = np.uint32(turn & np.uint32(q_stages - 1))
            q_mine = np.uint32(base + q_slot * q_bytes + mine * np.uint32(8192))
            hopper.mbarrier_wait(base + q_full + np.uint32(8) * q_slot, (turn >> q_shift) & np.uint32(1))
            info = np.uint32(base + info_at + np.uint32(INFO_BYTES) * (turn & np.uint32(INFO_SLOTS - 1)))
            count, first_key, first_position, rows_left = ptx.ld_shared_128(info)
            if count == NOTHING:
                break
            limit = np.int32(ptx.ld_shared_32(info + np.uint32(16)))
            waiting, key, position = np.int32(count), np.int32(first_key), np.int32(np.int32(first_position) + first_mine)
            height = np.int32(min(np.int32(64), np.int32(np.int32(rows_left) - first_mine)))
            # Tiles within [whole_begin, whole_end) are seen whole by all of this warpgroup's rows, those from `end` on by none.
            whole_begin = np.int32(position + height - np.int32(1) - left)
            whole_end = np.int32(min(limit, np.int32(position + right + np.int32(1))))
            end = np.int32(min(limit, np.int32(position + height + right))) if height > np.int32(0) else np.int32(-1)
            # Rows of the first V tile that exist, where what follows them in memory is of others.
            valid = np.int32(keys)
            if lengths_gl != np.uint64(0) or starts_q_gl != np.uint64(0):
                valid = np.int32(min(valid, np.int32(limit - key)))
            if extras:
                _, _, head, batch = ptx.ld_shared_128(info + np.uint32(16))
                first_row = np.int32(np.int32(ptx.ld_shared_32(info + np.uint32(32))) - np.int32(64))
                tile_queries = np.int32(first_row + np.int32(64) + np.int32(rows_left))
                tile_keys = np.int32(np.int32(first_position) + np.int32(rows_left))
                tile_bias_gl = bias_gl
                if bias_gl != np.uint64(0):
                    tile_bias_gl += np.uint64(batch) * np.uint64(bias_batch) + np.uint64(head) * np.uint64(bias_head)
                if alibi_gl != np.uint64(0):
                    slope = LOG2E * ptx.ld_global_f32(alibi_gl + np.uint64(4) * np.uint64(head))
            for i in range(out_size):
                out[i] = np.float32(0)
            for h in range(2):
                top[h] = np.float32(-np.inf)
                total[h] = np.float32(0)

            # The leader speaks for four warps, which wgmma keeps together. Where none runs they meet at a barrier, or the leader lets the
            # producer write over what the others have yet to read (65,537 sequences, some of them empty, showed it).
            while waiting > np.int32(0) and key >= end:
                hopper.mbarrier_wait(base + k_full + np.uint32(8) * slot, phase)
                if turns:
                    hopper.bar_sync(my_turn, both)
                    hopper.bar_arrive(next_turn, both)
                hopper.mbarrier_wait(base + v_full + np.uint32(8) * slot, phase)
                hopper.bar_sync(np.uint32(np.uint32(consumers + 1) + mine), np.uint32(128))
                if leader:
                    hopper.mbarrier_arrive(base + k_empty + np.uint32(8) * slot)
                    hopper.mbarrier_arrive(base + v_empty + np.uint32(8) * slot)
                phase = np.uint32(phase ^ np.uint32(slot == last))
                slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                key, waiting, valid = np.int32(key - np.int32(keys)), np.int32(waiting - np.int32(1)), np.int32(keys)
            if waiting > np.int32(0):
                hopper.mbarrier_wait(base + k_full + np.uint32(8) * slot, phase)
                if turns:
                    hopper.bar_sync(my_turn, both)
                scores(score, row_major(ptx.uniform(q_mine)), row_major(base + k_at + ptx.uniform(slot) * tile_bytes))
                if turns:
                    hopper.bar_arrive(next_turn, both)
                wait_0()
                if leader:
                    hopper.mbarrier_arrive(base + k_empty + np.uint32(8) * slot)
                if extras:
                    shape_scores(score, key, first_row, tile_queries, tile_keys, scale, softcap, tile_bias_gl, bias_row, bias_wide, slope)
                if key + np.int32(keys) > whole_end or key < whole_begin:
                    hide(score, key, np.int32(ptx.ld_shared_32(info + np.uint32(8))) - np.int32(64), left, right,
                         np.int32(ptx.ld_shared_32(info + np.uint32(16))))
                high_0, high_1 = highest(score)
                r0, r1 = softmax(score, high_0, high_1, top, total, factor)
                hopper.mbarrier_wait(base + v_full + np.uint32(8) * slot, phase)
                pack(prob, score)
                if valid < np.int32(keys):
                    clear(base + v_at + slot * tile_bytes, valid)
                    hopper.bar_sync(np.uint32(np.uint32(consumers + 1) + mine), np.uint32(128))
                before = slot
                phase = np.uint32(phase ^ np.uint32(slot == last))
                slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                waiting = np.int32(waiting - np.int32(1))
                while waiting > np.int32(0):
                    key = np.int32(key - np.int32(keys))
                    hopper.mbarrier_wait(base + k_full + np.uint32(8) * slot, phase)
                    if turns:
                        hopper.bar_sync(my_turn, both)
                    scores(score, row_major(ptx.uniform(q_mine)), row_major(base + k_at + ptx.uniform(slot) * tile_bytes))
                    if under and turns:
                        hopper.bar_arrive(next_turn, both)
                    rescale(out, r0, r1)
                    if under:
                        wait_0()
                    else:
                        accumulate(out, prob, column_major(base + v_at + ptx.uniform(before) * tile_bytes))
                        if turns:
                            hopper.bar_arrive(next_turn, both)
                        wait_1()
                    if leader:
                        hopper.mbarrier_arrive(base + k_empty + np.uint32(8) * slot)
                    if extras:
                        shape_scores(score, key, first_row, tile_queries, tile_keys, scale, softcap, tile_bias_gl, bias_row, bias_wide,
                                     slope)
                    if key + np.int32(keys) > whole_end or key < whole_begin:
                        hide(score, key, np.int32(ptx.ld_shared_32(info + np.uint32(8))) - np.int32(64), left, right,
                             np.int32(ptx.ld_shared_32(info + np.uint32(16))))
                    if under:
                        high_0, high_1 = accumulate_under(out, prob, column_major(base + v_at + ptx.uniform(before) * tile_bytes), score)
                    else:
                        high_0, high_1 = highest(score)
                    r0, r1 = softmax(score, high_0, high_1, top, total, factor)
                    # V_i is waited for here, long before its product: the loop of this wait keeps the assembler from moving the softmax
                    # below the wait for P V, which runs meanwhile.
                    hopper.mbarrier_wait(base + v_full + np.uint32(8) * slot, phase)
                    wait_0()
                    if leader:
                        hopper.mbarrier_arrive(base + v_empty + np.uint32(8) * before)
                    pack(prob, score)
                    before = slot
                    phase = np.uint32(phase ^ np.uint32(slot == last))
                    slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                    waiting = np.int32(waiting - np.int32(1))
                if leader:
                    hopper.mbarrier_arrive(base + q_empty + np.uint32(8) * q_slot)
                rescale(out, r0, r1)
                accumulate(out, prob, column_major(base + v_at + ptx.uniform(before) * tile_bytes))
                wait_0()
                if leader:
                    hopper.mbarrier_arrive(base + v_empty + np.uint32(8) * before)
            else:
                hopper.bar_sync(np.uint32(np.uint32(consumers + 1) + mine), np.uint32(128))
                if leader:
                    hopper.mbarrier_arrive(base + q_empty + np.uint32(8) * q_slot)
            _, out_row, head, _ = ptx.ld_shared_128(info + np.uint32(16))
            warp_row = np.int32((ptx.here(np.uint32(cuda.threadIdx.x)) >> np.uint32(5)) - np.uint32(4)) * np.int32(16)
            row_bytes = np.uint64(heads) * np.uint64(2 * dim)
            out_row = np.uint64(out_row) + np.uint64(warp_row)
            store(out, total, out_gl + out_row * row_bytes + np.uint64(head) * np.uint64(2 * dim), row_bytes,
                  np.int32(np.int32(ptx.ld_shared_32(info + np.uint32(12))) - warp_row), dim)
            turn = np.uint32(turn + np.uint32(1))
        if turns and mine == np.uint32(0):
            hopper.bar_sync(my_turn, both)

    return attention_sm90


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=config.threads, shared_bytes=config.shared_bytes, only="sm_90a")


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype in ("float16", "bfloat16"):
        for head_dim in HEAD_DIMS:
            for extras in (False, True):
                yield spec(pick(dtype, head_dim, extras))


@functools.cache
def kernel(dtype: torch.dtype, dim: int, extras: bool, device: int) -> Kernel:
    return load(spec(pick(DTYPE_NAME[dtype], next(d for d in HEAD_DIMS if d >= dim), extras)), device)


def start(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, batch: int, queries: int, keys: int,
          scale: float, left: int, right: int, softcap: float, bias: torch.Tensor | None, bias_strides: tuple[int, ...],
          alibi_slopes: torch.Tensor | None, lengths: torch.Tensor | None, starts_q: torch.Tensor | None,
          starts_kv: torch.Tensor | None) -> None:
    """As attention.py has it: 16-byte aligned q, k, v[rows of batch, sequence, heads, dim], nothing empty, window ends <= UNBOUNDED."""
    config, device = kernel.spec.config, q.device.index
    # A dimension of a tensor map has a stride: what is broadcast is copied.
    q, k, v = (t.contiguous() if 0 in t.stride() else t for t in (q, k, v))
    _, _, heads, dim = q.shape
    tiles, pairs, group = -(-queries // config.rows), batch * heads, heads // k.shape[2]
    blocks = min(multiprocessors(device), tiles * pairs)
    alike = right >= keys and lengths is None and starts_q is None
    section = group if alike else min(pairs, group * max(1, _SECTION_BYTES // (4 * keys * dim)))
    counters = 0 if alike or blocks == tiles * pairs else _counters(device).data_ptr()
    kernel(blocks, 1, 1, _map(q, config.rows), _map(k, config.keys), _map(v, config.keys), out.data_ptr(), address(bias),
           address(alibi_slopes), address(lengths), address(starts_q), address(starts_kv), counters, *bias_strides, queries, keys,
           heads, group, dim, batch, tiles,
           section, left, right, bias is not None and bias.dtype is torch.float32, scale, softcap)


def _counters(device: int) -> torch.Tensor:
    """Two zeros, which a launch leaves as zeros: the launches of one stream share a pair, and every launch in a graph has its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=f"cuda:{device}")
    key = device, torch._C._cuda_getCurrentRawStream(device)
    pair = _COUNTERS.get(key)
    if pair is None:
        pair = _COUNTERS[key] = torch.zeros(2, dtype=torch.int32, device=f"cuda:{device}")
    return pair


_COUNTERS: dict[tuple[int, int], torch.Tensor] = {}


def _map(t: torch.Tensor, rows: int) -> bytes:
    batch, sequence, heads, dim = t.shape
    batch_step, row_step, head_step, _ = t.stride()
    return tiles_of(t.data_ptr(), t.dtype, (dim, heads, sequence, batch), (head_step, row_step, batch_step), (CHUNK, 1, rows, 1))
