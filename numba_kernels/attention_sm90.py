"""attention and attention_varlen on Hopper (sm_90a), float16 and bfloat16: FlashAttention-3 in Numba.

Persistent blocks of one producer warp (attention_sm90_load.py) and two or three consumer warpgroups of 64 query rows each
(attention_sm90_math.py). S_i = Q K_i^T is started before O += P_(i-1) V_(i-1) is done, and the consumers take turns at the tensor cores, so
that the softmax of one runs under the products of another. Keys are walked from the last tile that the rows see to the first.
The base that a row's exponentials are measured from need not be its maximum: any of its scores serves until sums leave the range of the
dtype. That is asked of the sums, once a tile; a tile that fails is multiplied again, and measured from its maximum.
Floors, predictions and measurements: docs/tuning/attention_sm90.md.
Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.attention_common import LOG2E
from ftops.numba_kernels.attention_scores import make_hide, make_shape_scores
from ftops.numba_kernels.attention_sm90_config import INFO_BYTES, INFO_SLOTS, Config, configs
from ftops.numba_kernels.attention_sm90_load import NOTHING, make_begin, make_produce
from ftops.numba_kernels.attention_sm90_math import LOWEST, SLACK, make_clear, make_products, make_softmax, make_sums
from ftops.numba_kernels.attention_sm90_store import make_store, make_store_part
from ftops.numba_kernels.attention_sm90_turn import WARPS, make_ones, make_turn
from ftops.numba_kernels.compile import Spec

# Tensor maps of q, k, v; out, bias, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_kv, counters, scales of 8-bit q, k, v
# (0 = not given); strides in bytes of bias (batch, head, row); Sq, Skv, heads, query heads a kv head, head_dim, batch, tiles a sequence,
# pairs of sequence and head a section, window left and right, bias is float32; scale, softcap; lse, key_parts. In parts: heads are those
# of keys, parts go to `out`, their logarithms to lse, and there are key_parts times as many tiles.
SIGNATURE = "ttt" + "pppppppppp" + "lll" + "iiiiiiiiiii" + "ff" + "pi"


def make(config: Config) -> Callable:
    head_dim, extras, consumers, keys, stages, q_registers, turns = (
        config.head_dim, config.extras, config.consumers, config.keys, config.stages, config.q_registers, config.turns)
    of_consumers, narrow = np.uint32(128 * consumers), config.narrow
    tile_bytes = np.uint32(config.tile_bytes)
    k_at, v_at, info_at = np.uint32(config.k_at), np.uint32(config.v_at), np.uint32(config.info_at)
    q_full, q_empty = np.uint32(config.q_full), np.uint32(config.q_empty)
    k_full, k_empty, v_full, v_empty = (np.uint32(at) for at in (config.k_full, config.k_empty, config.v_full, config.v_empty))
    width = 1 if narrow else 2
    score_size, out_size, prob_size, query_size = keys // 2, config.v_columns // 2, width * keys // 8, width * head_dim // 8
    last, both = np.uint32(stages - 1), np.uint32(256)
    # Registers of a producer's and of a consumer's thread: what the block was launched with, 504 or 512 a lane of four or three warpgroups.
    few, many = ((56, 224) if narrow else (40, 232)) if consumers == 2 else (56, 152) if narrow else (32, 160)
    give, take = hopper.SETMAXNREG["dec", few], hopper.SETMAXNREG["inc", many]
    wait_0, wait_1 = hopper.WGMMA_WAIT[0], hopper.WGMMA_WAIT[1]
    take_q, scores, column_major, accumulate = make_products(config)
    sample, highest, settle, powers, rescale, pack = make_softmax(config)
    fillers = WARPS if narrow else 1
    slack, v_bytes = SLACK[config.dtype], np.uint32(config.v_bytes)
    ones, turn_v = (make_ones(config), make_turn(config)) if narrow else (None, None)
    in_parts = config.parts
    hide = make_hide(keys, 1, in_parts)
    shape_scores = make_shape_scores(config.out_dtype, keys, 1)
    clear, begin, produce = make_clear(config), make_begin(config, fillers), make_produce(config)
    store, store_part = make_store(config), make_store_part(config)
    no_sums, some_sums, all_sums = make_sums(config)

    @cuda.jit(device=True, forceinline=True)
    def again(score, bases, query, q_mine, k_tile, edge, key, info, left, right, group, factor):
        """The scores once more, and every row measured from the highest of them."""
        scores(score, query, q_mine, k_tile)
        wait_0()
        if edge:
            hide(score, key, np.int32(ptx.ld_shared_32(info + np.uint32(8))), left, right,
                 np.int32(ptx.ld_shared_32(info + np.uint32(16))), group)
        high_0, high_1 = highest(score)
        return settle(high_0, high_1, bases, factor, np.float32(0))

    def attention_sm90(q_map, k_map, v_map, out_gl, bias_gl, alibi_gl, lengths_gl, starts_q_gl, starts_kv_gl, counters_gl,
                       q_scale_gl, k_scale_gl, v_scale_gl, bias_batch, bias_head, bias_row, queries, keys_there, heads, group, dim, batches,
                       tiles, section, left, right, bias_wide, scale, softcap, lse_gl, key_parts):
        base = np.uint32((ptx.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00))
        thread = np.uint32(cuda.threadIdx.x)
        q_tensor, k_tensor, v_tensor = hopper.tensor_map(q_map), hopper.tensor_map(k_map), hopper.tensor_map(v_map)
        if thread == np.uint32(0):
            begin(base, q_tensor, k_tensor, v_tensor)
        if narrow:
            ones(base)
        cuda.syncthreads()

        if thread >= of_consumers:
            give()
            if thread < of_consumers + np.uint32(32):
                produce(base, q_tensor, k_tensor, v_tensor, lengths_gl, starts_q_gl, starts_kv_gl, counters_gl, queries, keys_there,
                        np.uint32(heads), np.uint32(group), np.uint32(batches), np.uint32(tiles), np.uint32(section), left, right,
                        np.uint32(key_parts))
            elif narrow:
                turn_v(base, np.uint32((thread - of_consumers) >> np.uint32(5)) - np.uint32(1))
            return

        take()
        mine = np.uint32(thread >> np.uint32(7))
        first_mine, q_mine = np.int32(np.int32(64) * np.int32(mine)), np.uint32(base + mine * np.uint32(8192))
        own_bar = np.uint32(np.uint32(consumers + 1) + mine)
        leader, speaker = thread & np.uint32(127) == np.uint32(0), thread & np.uint32(31) == np.uint32(0)  # of a warpgroup, of a warp
        my_turn = np.uint32(mine + np.uint32(1))
        next_turn = np.uint32(1) if mine == np.uint32(consumers - 1) else np.uint32(my_turn + np.uint32(1))
        factor = np.float32(1) if extras else scale * LOG2E
        slope, gain = np.float32(0), np.float32(1)
        out = cuda.local.array(out_size, np.float32)
        score = cuda.local.array(score_size, np.float32)
        prob = cuda.local.array(prob_size, np.uint32)
        query = cuda.local.array(query_size, np.uint32)
        bases = cuda.local.array(2, np.float32)
        total = cuda.local.array(2, np.float32)
        for i in range(score_size):
            score[i] = np.float32(0)
        # K_i and V_i lie in slots of one number; `before` is that of V_(i-1).
        slot, phase, before = np.uint32(0), np.uint32(0), last
        turn = np.uint32(0)
        if turns and mine == np.uint32(consumers - 1):
            hopper.bar_arrive(next_turn, both)
        while True:
            hopper.mbarrier_wait(base + q_full, turn & np.uint32(1))
            info = np.uint32(base + info_at + np.uint32(INFO_BYTES) * (turn & np.uint32(INFO_SLOTS - 1)))
            count, first_key, first_position, rows_left = ptx.ld_shared_128(info)
            if count == NOTHING:
                break
            cuda.syncwarp()  # of a tile without keys the speaker now says that it is done, and a lane that has yet to see it never would
            limit = np.int32(ptx.ld_shared_32(info + np.uint32(16)))
            waiting, key = np.int32(count), np.int32(first_key)
            height = np.int32(min(np.int32(64), np.int32(np.int32(rows_left) - first_mine)))
            position, reach = np.int32(np.int32(first_position) + first_mine), height
            if in_parts:  # rows of one query share its place
                position = np.int32(np.int32(first_position) + np.int32(ptx.div_u32(np.uint32(first_mine), np.uint32(group))))
                last_mine = np.uint32(first_mine + max(height, np.int32(1)) - np.int32(1))
                reach = np.int32(np.int32(first_position) + np.int32(ptx.div_u32(last_mine, np.uint32(group))) - position + np.int32(1))
            # Tiles within [whole_begin, whole_end) are seen whole by all of this warpgroup's rows, those from `end` on by none.
            whole_begin = np.int32(position + reach - np.int32(1) - left)
            whole_end = np.int32(min(limit, np.int32(position + right + np.int32(1))))
            end = np.int32(min(limit, np.int32(position + reach + right))) if height > np.int32(0) else np.int32(-1)
            # Rows of the first V tile that exist, where what follows them in memory is of others.
            valid = np.int32(keys)
            if not narrow and (lengths_gl != np.uint64(0) or starts_q_gl != np.uint64(0)):
                valid = np.int32(min(valid, np.int32(limit - key)))
            if extras:
                _, _, head, batch = ptx.ld_shared_128(info + np.uint32(16))
                first_row = np.int32(ptx.ld_shared_32(info + np.uint32(32)))
                tile_queries = np.int32(first_row + np.int32(rows_left))
                tile_keys = np.int32(np.int32(first_position) + np.int32(rows_left))
                tile_bias_gl = bias_gl
                if bias_gl != np.uint64(0):
                    tile_bias_gl += np.uint64(batch) * np.uint64(bias_batch) + np.uint64(head) * np.uint64(bias_head)
                if alibi_gl != np.uint64(0):
                    slope = LOG2E * ptx.ld_global_f32(alibi_gl + np.uint64(4) * np.uint64(head))
            if narrow:
                _, _, head, _ = ptx.ld_shared_128(info + np.uint32(16))
                at, at_kv = np.uint64(4) * np.uint64(head), np.uint64(4) * np.uint64(ptx.div_u32(head, np.uint32(group)))
                factor = scale * LOG2E * ptx.ld_global_f32(q_scale_gl + at) * ptx.ld_global_f32(k_scale_gl + at_kv)
                gain = ptx.ld_global_f32(v_scale_gl + at_kv)
                no_sums(base)
            for i in range(out_size):
                out[i] = np.float32(0)
            bases[0], bases[1], total[0], total[1] = LOWEST, LOWEST, np.float32(0), np.float32(0)

            # The leader speaks for four warps, which wgmma keeps together. Where none runs they meet at a barrier, or the leader lets the
            # producer write over what the others have yet to read (65,537 sequences, some of them empty, showed it).
            while waiting > np.int32(0) and key >= end:
                hopper.mbarrier_wait(base + k_full + np.uint32(8) * slot, phase)
                if turns:
                    hopper.bar_sync(my_turn, both)
                    hopper.bar_arrive(next_turn, both)
                hopper.mbarrier_wait(base + v_full + np.uint32(8) * slot, phase)
                hopper.bar_sync(own_bar, np.uint32(128))
                if leader:
                    hopper.mbarrier_arrive(base + k_empty + np.uint32(8) * slot)
                    hopper.mbarrier_arrive(base + v_empty + np.uint32(8) * slot)
                phase = np.uint32(phase ^ np.uint32(slot == last))
                slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                key, waiting, valid = np.int32(key - np.int32(keys)), np.int32(waiting - np.int32(1)), np.int32(keys)
            if waiting > np.int32(0):
                if q_registers:
                    take_q(query, q_mine)
                    if speaker:
                        hopper.mbarrier_arrive(base + q_empty)
                hopper.mbarrier_wait(base + k_full + np.uint32(8) * slot, phase)
                if turns:
                    hopper.bar_sync(my_turn, both)
                scores(score, query, q_mine, base + k_at + slot * tile_bytes)
                if turns:
                    hopper.bar_arrive(next_turn, both)
                wait_0()
                if extras:
                    shape_scores(score, key, first_row, tile_queries, tile_keys, scale, softcap, tile_bias_gl, bias_row, bias_wide, slope)
                edge = key + np.int32(keys) > whole_end or key < whole_begin
                if edge:
                    hide(score, key, np.int32(ptx.ld_shared_32(info + np.uint32(8))), left, right,
                         np.int32(ptx.ld_shared_32(info + np.uint32(16))), group)
                if edge or extras or narrow:
                    high_0, high_1 = highest(score)
                else:
                    high_0, high_1 = sample(score)
                settle(high_0, high_1, bases, factor, slack)
                sum_0, sum_1, outgrown = powers(score, bases, factor)
                if not extras and hopper.bar_any(own_bar, np.uint32(128), outgrown) != np.uint32(0):
                    again(score, bases, query, q_mine, base + k_at + slot * tile_bytes, edge, key, info, left, right, group, factor)
                    sum_0, sum_1, _ = powers(score, bases, factor)
                total[0], total[1] = sum_0, sum_1
                if leader:
                    hopper.mbarrier_arrive(base + k_empty + np.uint32(8) * slot)
                unsettled = edge
                hopper.mbarrier_wait(base + v_full + np.uint32(8) * slot, phase)
                pack(prob, score)
                if not narrow and valid < np.int32(keys):
                    clear(base + v_at + slot * v_bytes, valid)
                    hopper.bar_sync(own_bar, np.uint32(128))
                before = slot
                phase = np.uint32(phase ^ np.uint32(slot == last))
                slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                waiting = np.int32(waiting - np.int32(1))
                while waiting > np.int32(0):
                    key = np.int32(key - np.int32(keys))
                    hopper.mbarrier_wait(base + k_full + np.uint32(8) * slot, phase)
                    if turns:
                        hopper.bar_sync(my_turn, both)
                    scores(score, query, q_mine, base + k_at + slot * tile_bytes)
                    accumulate(out, prob, column_major(base + v_at + ptx.uniform(before) * v_bytes))
                    if turns:
                        hopper.bar_arrive(next_turn, both)
                    wait_1()
                    if extras:
                        if leader:
                            hopper.mbarrier_arrive(base + k_empty + np.uint32(8) * slot)
                        shape_scores(score, key, first_row, tile_queries, tile_keys, scale, softcap, tile_bias_gl, bias_row, bias_wide,
                                     slope)
                    edge = key + np.int32(keys) > whole_end or key < whole_begin
                    if edge:
                        hide(score, key, np.int32(ptx.ld_shared_32(info + np.uint32(8))), left, right,
                             np.int32(ptx.ld_shared_32(info + np.uint32(16))), group)
                    r0, r1 = np.float32(1), np.float32(1)
                    if edge or unsettled or extras:
                        high_0, high_1 = highest(score)
                        r0, r1 = settle(high_0, high_1, bases, factor, slack)
                    sum_0, sum_1, outgrown = powers(score, bases, factor)
                    outgrown = np.uint32(0) if extras else hopper.bar_any(own_bar, np.uint32(128), outgrown)
                    # V_i is waited for here, long before its product: the loop of this wait keeps the assembler from moving the softmax
                    # below the wait for P V, which runs meanwhile.
                    hopper.mbarrier_wait(base + v_full + np.uint32(8) * slot, phase)
                    wait_0()
                    if outgrown != np.uint32(0):
                        s0, s1 = again(score, bases, query, q_mine, base + k_at + slot * tile_bytes, edge, key, info, left, right, group,
                                       factor)
                        sum_0, sum_1, _ = powers(score, bases, factor)
                        r0, r1 = np.float32(r0 * s0), np.float32(r1 * s1)
                    if leader:
                        if not extras:
                            hopper.mbarrier_arrive(base + k_empty + np.uint32(8) * slot)
                        hopper.mbarrier_arrive(base + v_empty + np.uint32(8) * before)
                    if narrow:
                        some_sums(out, base, r0, r1, waiting)
                    rescale(out, total, r0, r1)
                    total[0] += sum_0
                    total[1] += sum_1
                    unsettled = edge
                    pack(prob, score)
                    before = slot
                    phase = np.uint32(phase ^ np.uint32(slot == last))
                    slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                    waiting = np.int32(waiting - np.int32(1))
                if speaker and not q_registers:
                    hopper.mbarrier_arrive(base + q_empty)
                accumulate(out, prob, column_major(base + v_at + ptx.uniform(before) * v_bytes))
                wait_0()
                if leader:
                    hopper.mbarrier_arrive(base + v_empty + np.uint32(8) * before)
                if narrow:
                    total[0], total[1] = all_sums(out, base, np.float32(1), np.float32(1))
            elif speaker:
                hopper.mbarrier_arrive(base + q_empty)
            turn = np.uint32(turn + np.uint32(1))
            _, out_row, head, _ = ptx.ld_shared_128(info + np.uint32(16))
            if in_parts:
                all_heads = np.uint32(heads * group)
                line = np.uint64(out_row) * np.uint64(all_heads) + np.uint64(head) * np.uint64(group)
                store_part(out, total, bases, out_gl, lse_gl, line, all_heads, np.uint32(group), ptx.ld_shared_32(info + np.uint32(32)),
                           key_parts, np.int32(ptx.ld_shared_32(info + np.uint32(12))), dim)
                continue
            warp_row = np.int32(ptx.here(np.uint32(cuda.threadIdx.x)) >> np.uint32(5)) * np.int32(16)
            row_bytes = np.uint64(heads) * np.uint64(2 * dim)
            out_row = np.uint64(out_row) + np.uint64(warp_row)
            store(out, total, gain, out_gl + out_row * row_bytes + np.uint64(head) * np.uint64(2 * dim), row_bytes,
                  np.int32(np.int32(ptx.ld_shared_32(info + np.uint32(12))) - warp_row), dim)
        if turns and mine == np.uint32(0):
            hopper.bar_sync(my_turn, both)

    return attention_sm90


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=config.threads, shared_bytes=config.shared_bytes, only="sm_90a", halves=not config.narrow)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` and `pick_parts` can give."""
    yield from map(spec, configs())
