"""decode_attention on tensor cores: softmax(scale q k^T) v of a few new tokens over a long cache, split over the keys. sm_80 and up.

A block takes 8 or 16 rows (new tokens x the query heads of one kv head, which share one read of K and V) and one of `splits` ranges of
keys. Each warp walks its own 16 keys of every tile with its own cp.async ring, running maximum and sum, and meets the others only at the
end, so nothing in the loop waits for a barrier. Neighbouring blocks are heads of one sequence, which lie side by side in the cache.
Floor: bytes of the keys and values that are seen / read bandwidth.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numba import cuda

from ftops.numba_kernels import decode_tile, ptx
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.decode_common import LOG2E, SIGNATURE, block_of, capped, load_bias, make_key_range, row_of
from ftops.numba_kernels.decode_parts import make_meet, make_store_result
from ftops.numba_kernels.decode_tile import KEYS, NOTHING, SCALES_BYTES, Config, copy_scales, lookup

# By cache, how many rows a block may take at each head dim. 8-bit caches at 32 and 160 take the next one, whose further elements are not
# read, and at 80, 96 and 192 more than 8 rows are row tiles, which read their keys from L2: a variant costs three seconds of compiling.
_WIDE = {head_dim: (8, 16) for head_dim in (32, 64, 80, 96, 128, 160, 192, 256)}
_NARROW = {64: (8, 16), 80: (8,), 96: (8,), 128: (8, 16), 192: (8,), 256: (8, 16)}
RING_BYTES = 64 * 1024  # three blocks a Hopper multiprocessor, one where a block may have 99 KiB


def pick(dtype: str, cache: str, head_dim: int, rows: int, token_scales: bool = False) -> Config:
    """Four warps if two stages then fit RING_BYTES, otherwise two; as many stages as fit, up to four."""
    sizes = _WIDE if cache == "16-bit" else _NARROW
    head_dim = next(d for d in sizes if d >= head_dim)
    stage = 2 * KEYS * head_dim * (2 if cache == "16-bit" else 1)
    warps = 4 if 8 * stage <= RING_BYTES else 2
    stages = min(4, RING_BYTES // (warps * stage))
    rows = 8 if rows <= 8 else sizes[head_dim][-1]
    return Config(dtype if cache == "16-bit" else "float16", cache, head_dim, rows, warps, stages, token_scales)


def make(config: Config) -> Callable:
    warps, stages, steps, row_tiles_n = config.warps, config.stages, config.head_dim // 16, config.rows // 8
    rows_a_block, row_bytes, wide = config.rows, config.row_bytes, config.cache == "16-bit"
    q_registers, head_dim_quarter, threads, q_threads = config.q_in_registers, config.head_dim // 4, 32 * warps, 32 * warps // config.rows
    per_unit, half_stage, ring_bytes = 8 if wide else 16, KEYS * row_bytes, stages * 2 * KEYS * row_bytes
    tile_keys, chains, lines = KEYS * warps, 4 // row_tiles_n, -(-row_bytes // 128)
    sums_offset, bits_offset, q_offset, factors_offset, scales_offset, _ = config.shared()
    token_scales = config.token_scales
    pitch = 4 * (config.head_dim + 4)  # bytes between rows of a warp's output: its 32 lanes then meet 32 banks
    n_q, n_acc, n_x, n_row = 2 * steps * row_tiles_n, 4 * steps * row_tiles_n, 4 * row_tiles_n, 2 * row_tiles_n
    zero, one, nothing, hidden, log2e, least = (np.float32(c) for c in (0, 1, NOTHING, -np.inf, LOG2E, 1e-30))
    all_keys, absent = np.uint32(0xFFFF), np.uint32(0)
    zeroth, last_stage, wait_for_oldest = np.int32(0), np.int32(stages - 1), ptx.CP_ASYNC_WAIT[stages - 1]
    xor_4, xor_8, xor_16 = (ptx.shuffle_xor[n] for n in (4, 8, 16))
    key_range, stage_q, copy_keys = make_key_range(tile_keys), decode_tile.make_stage_q(config), decode_tile.make_copy_keys(row_bytes)
    scores, outputs = decode_tile.make_scores(config, chains), decode_tile.make_outputs(config)
    softmax = decode_tile.make_softmax(config.dtype, config.head_dim, config.rows, token_scales)
    store_result, meet = make_store_result(True), make_meet(threads, head_dim_quarter, True)

    def decode_mma(q_gl, k_gl, v_gl, lengths_gl, table_gl, bias_gl, slopes_gl, k_scale_gl, v_scale_gl, out_gl, partial_gl, lse_gl,
                   counters_gl, q_batch, bias_batch, bias_head, bias_new, bias_key, table_row, q_new, q_head, k_page, k_slot, k_head,
                   v_page, v_slot, v_head, new, group, head_dim, capacity, pages, page_size, row_tiles, kv_heads, blocks, window,
                   kinds, fixed, per_page, per_row_tile, per_kv_head, per_group, scale, cap):
        shared_sh = np.int64(ptx.shared_address(cuda.shared.array(0, np.uint8)))
        thread = np.int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        batch, kv_head, row_tile, split = block_of(row_tiles, kv_heads, per_row_tile, per_kv_head)
        block = (batch * kv_heads + kv_head) * row_tiles + row_tile
        if block >= blocks:
            return
        first_row, splits = row_tile * rows_a_block, np.int32(cuda.gridDim.x)
        lengths_gl, table_gl = np.int64(lengths_gl) + 4 * batch, np.int64(table_gl)
        k_gl, v_gl = np.int64(k_gl) + 16 * kv_head * k_head, np.int64(v_gl) + 16 * kv_head * v_head
        if table_gl != 0:
            table_gl += 4 * batch * table_row
        ring_sh, bits_sh = shared_sh + warp * ring_bytes, shared_sh + bits_offset + warp * 4 * stages
        # What the first tiles need goes into L2 while the kernel before still runs: what that one writes is there as it writes it, and
        # where it changes the length or the table, other keys are asked for in vain.
        length, start, low, high, used = key_range(np.int32(ptx.ld_early_32(lengths_gl)), capacity, new, window, split, splits, fixed)
        key, own_gl = np.int32(start + low * tile_keys + warp * KEYS + (lane & 15)), k_gl if lane < 16 else v_gl
        own_page, own_slot = k_page if lane < 16 else v_page, k_slot if lane < 16 else v_slot
        for i in range(stages - 1):
            if np.int32(low + i) < high and key < length:
                page_on, slot_on = lookup(table_gl, batch, key, page_size, per_page, ptx.ld_early_32)
                if page_on < pages:
                    row_gl = own_gl + 16 * np.int64(np.uint32(page_on * own_page + slot_on * own_slot))
                    for j in range(lines):
                        if 8 * per_unit * j < head_dim:
                            ptx.prefetch_l2(row_gl + 128 * j)
            key = np.int32(key + tile_keys)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        length, start, low, high, used = key_range(np.int32(ptx.ld_written_32(lengths_gl)), capacity, new, window, split, splits,
                                                   fixed)
        if counters_gl == 0:
            used = splits  # decode_combine reads them all
        if split >= used:
            return

        # The first tiles are on their way before q is asked for: theirs is the longer way.
        certain, last = np.int32(length - new), np.int32(length - 1)  # up to `certain` every row sees a key
        key, real_units = np.int32(start + low * tile_keys + warp * KEYS + (lane & 15)), np.int32(head_dim // per_unit)
        scales_sh, scale_gl = shared_sh + scales_offset + warp * (stages * SCALES_BYTES), np.int64(k_scale_gl if lane < 16 else v_scale_gl)
        scale_gl += 4 * kv_head
        page = cuda.local.array(stages, np.uint32)
        slot = cuda.local.array(stages, np.uint32)
        for i in range(stages):
            page[i], slot[i] = absent, absent
            if np.int32(low + i) < high:
                page[i], slot[i] = lookup(table_gl, batch, min(np.int32(key + i * tile_keys), last), page_size, per_page, ptx.ld_written_32)
        for i in range(stages - 1):
            if np.int32(low + i) < high:
                copy_keys(k_gl, v_gl, ring_sh + i * (2 * half_stage), bits_sh + 4 * i, lane, key < length and page[i] < pages,
                          page[i] * k_page + slot[i] * k_slot, page[i] * v_page + slot[i] * v_slot, real_units)
                if token_scales:
                    copy_scales(scale_gl, scales_sh + i * SCALES_BYTES, lane, key < length and page[i] < pages,
                                (np.int64(page[i]) * page_size + np.int64(slot[i])) * kv_heads)
                key = np.int32(key + tile_keys)
            ptx.cp_async_commit()
        page_on, slot_on = page[stages - 1], slot[stages - 1]

        value_scale = one
        if not wide and not token_scales:
            scale *= ptx.ld_written_f32(np.int64(k_scale_gl) + 4 * kv_head)
            value_scale = ptx.ld_written_f32(np.int64(v_scale_gl) + 4 * kv_head)
        q_sh, factor_sh = shared_sh + q_offset, shared_sh + factors_offset
        token, head = row_of(first_row + thread // q_threads, kv_head, group, per_group)
        q_gl = np.int64(q_gl) + 2 * (batch * q_batch + token * q_new + head * q_head)
        stage_q(q_gl, q_sh, factor_sh, thread, token < new, head_dim, scale, kinds >> 2)
        cuda.syncthreads()
        q_sh += 8 * lane
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
            token, head = row_of(min(first_row + row, new * group - 1), kv_head, group, per_group)
            position[r], bias_row[r], slope[r] = length - new + token, 0, zero
            if bias_gl != 0:
                at = batch * bias_batch + head * bias_head + token * bias_new
                bias_row[r] = np.int64(bias_gl) + at * (4 if kinds & 3 == 0 else 2)
            if slopes_gl != 0:
                slope[r] = log2e * ptx.ld_written_f32(np.int64(slopes_gl) + 4 * head)

        score = cuda.local.array(16, np.float32)
        x = cuda.local.array(n_x, np.float32)
        p = cuda.local.array(n_row, np.uint32)
        own = cuda.local.array(2, np.float32)
        acc = cuda.local.array(n_acc, np.float32)
        top = cuda.local.array(n_row, np.float32)
        total = cuda.local.array(n_row, np.float32)
        for i in range(n_acc):
            acc[i] = zero
        for r in range(n_row):
            top[r], total[r] = nothing, zero
        filling, using = last_stage, zeroth
        for tile in range(low, high):
            ptx.warp_sync()  # the stage that is filled next has been read by every lane
            if np.int32(tile + (stages - 1)) < high:
                copy_keys(k_gl, v_gl, np.int32(ring_sh + filling * (2 * half_stage)), np.int32(bits_sh + 4 * filling), lane,
                          key < length and page_on < pages, page_on * k_page + slot_on * k_slot, page_on * v_page + slot_on * v_slot,
                          real_units)
                if token_scales:
                    copy_scales(scale_gl, np.int32(scales_sh + filling * SCALES_BYTES), lane, key < length and page_on < pages,
                                (np.int64(page_on) * page_size + np.int64(slot_on)) * kv_heads)
                key = np.int32(key + tile_keys)
                page_on, slot_on = lookup(table_gl, batch, min(key, last), page_size, per_page, ptx.ld_written_32)  # there by the next turn
                filling = zeroth if filling == last_stage else np.int32(filling + 1)
            ptx.cp_async_commit()
            wait_for_oldest()
            ptx.warp_sync()
            stage_sh = np.int32(ring_sh + using * (2 * half_stage))
            bits = ptx.ld_shared_32(np.int32(bits_sh + 4 * using))
            key_sh = np.int32(scales_sh + using * SCALES_BYTES + 4 * g)
            using = zeroth if using == last_stage else np.int32(using + 1)
            first = np.int32(start + warp * KEYS + tile * tile_keys)
            for i in range(16):
                score[i] = zero
            scores(score, stage_sh, lane, q, q_sh)
            for i in range(n_x):
                at = 4 * chains * (i >> 2) + (i & 3)
                x[i] = score[at] + score[at + 4]
                if chains == 4:
                    x[i] += score[at + 8] + score[at + 12]
                x[i] *= factor[2 * (i >> 2) + (i & 1)]
            if token_scales:
                own[0], own[1] = ptx.ld_shared_f32(key_sh), ptx.ld_shared_f32(np.int32(key_sh + 32))
                for i in range(n_x):
                    x[i] *= own[(i >> 1) & 1]
            if cap != zero:
                for i in range(n_x):
                    x[i] = capped(x[i], cap)
            if bias_gl != 0:
                for i in range(n_x):
                    row = g + 8 * ((i >> 1) & 1)
                    if (bits >> row) & 1 != 0:
                        x[i] += load_bias(bias_row[2 * (i >> 2) + (i & 1)], first + row, bias_key, kinds & 3)
            if slopes_gl != 0:
                for i in range(n_x):
                    behind = np.int32(position[2 * (i >> 2) + (i & 1)] - first - g - 8 * ((i >> 1) & 1))
                    x[i] -= slope[2 * (i >> 2) + (i & 1)] * abs(np.float32(behind))
            if bits != all_keys or np.int32(first + (KEYS - 1)) > certain or (window >= 0 and first < np.int32(last - window)):
                for i in range(n_x):
                    row = g + 8 * ((i >> 1) & 1)
                    behind = np.int32(position[2 * (i >> 2) + (i & 1)] - first - row)
                    if (bits >> row) & 1 == 0 or behind < 0 or (window >= 0 and behind > window):
                        x[i] = hidden
            if token_scales:
                for i in range(2):  # a key that a bias hides may never have been written, and its scale be 0
                    own[i] = ptx.maximum(ptx.ld_shared_f32(np.int32(key_sh + 64 + 32 * i)), least)
                for i in range(n_x):
                    x[i] += ptx.log2(own[(i >> 1) & 1])
                own[0], own[1] = ptx.reciprocal(own[0]), ptx.reciprocal(own[1])
            softmax(x, acc, top, total, p, own)
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
                token, head = row_of(first_row + row, kv_head, group, per_group)
                line = (batch * new + token) * kv_heads * group + head
                store_result(a, b, c, d, highest, whole, line, column, head_dim, split, splits, used, np.int64(out_gl),
                             np.int64(partial_gl), np.int64(lse_gl), kinds >> 2)
        if used > 1 and counters_gl != 0:
            meet(shared_sh, np.int64(counters_gl) + 4 * block, thread, batch, kv_head, first_row,
                 np.int32(min(rows_a_block, new * group - first_row)), new, group, kv_heads, per_group, head_dim, splits, used,
                 np.int64(out_gl), np.int64(partial_gl), np.int64(lse_gl), kinds >> 2)

    return decode_mma


def spec(config: Config, shared_bytes: int = 0, dependent: bool = False) -> Spec:
    """shared_bytes above what is needed keep further blocks from a multiprocessor."""
    shared_bytes = max(shared_bytes, config.shared()[-1])
    return Spec(make, config, SIGNATURE, threads=32 * config.warps, shared_bytes=shared_bytes, min_blocks=config.resident,
                dependent=dependent, halves=config.cache == "16-bit")


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype, cache in (("float16", "16-bit"), ("bfloat16", "16-bit"), ("float16", "int8"), ("float16", "float8_e4m3fn")):
        for head_dim, sizes in (_WIDE if cache == "16-bit" else _NARROW).items():
            yield from (spec(pick(dtype, cache, head_dim, rows, tokens)) for rows in sizes
                        for tokens in ((False,) if cache == "16-bit" else (False, True)))
