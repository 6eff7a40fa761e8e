"""The end of decode_attention: a row's result, or, where several blocks had its keys, the meeting of their results.

    out = sum_s w_s out_s / sum_s w_s,  w_s = 2 ** (lse_s - max lse)

A block leaves its rows of out_s and the logarithms lse_s in a workspace, and counts itself. The last of FAN neighbours merges theirs, and
is then one of fewer: a tree, so that no block reads more than FAN parts at a time, and those that end early merge while others still work.
Parts are added in the order of their keys, whichever block comes last, so that the bits are always the same.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.decode_common import row_of

FAN_SHIFT = 4
FAN = 1 << FAN_SHIFT  # parts that meet at once; all are on their way before the first is used, 16 bytes a thread
PART_FLOATS = 2  # of a part in the workspace, beside its row: the logarithm, of even levels of the tree and of odd ones


def nodes(splits: int) -> int:
    """Counters of a tree."""
    total = 0
    while splits > 1:
        splits = -(-splits // FAN)
        total += splits
    return total


@functools.cache
def make_store_result(halves: bool) -> Callable:
    """store_result(...), halves: where the output has 16 bits and rows are whole 16-byte accesses, which is half of the code of a merge."""

    @cuda.jit(device=True, forceinline=True)
    def store_four(out_gl, line, column, head_dim, a, b, c, d, kind):
        """Four values of row `line` of an output of `kind` (0 float32, 1 float16, 2 bfloat16), or as many as head_dim leaves."""
        at = line * head_dim + column
        if not halves and head_dim & 3 != 0:
            for i in range(min(4, head_dim - column)):
                value = a if i == 0 else b if i == 1 else c if i == 2 else d
                if kind == 0:
                    ptx.st_global_f32(out_gl + 4 * (at + i), value)
                else:
                    ptx.st_global_16(out_gl + 2 * (at + i), ptx.f16_pair(value, value) if kind == 1 else ptx.bf16_pair(value, value))
        elif not halves and kind == 0:
            ptx.st_global_128(out_gl + 4 * at, ptx.f32_bits(a), ptx.f32_bits(b), ptx.f32_bits(c), ptx.f32_bits(d))
        elif kind == 1:
            ptx.st_global_64(out_gl + 2 * at, ptx.f16_pair(a, b), ptx.f16_pair(c, d))
        else:
            ptx.st_global_64(out_gl + 2 * at, ptx.bf16_pair(a, b), ptx.bf16_pair(c, d))

    @cuda.jit(device=True, forceinline=True)
    def store_result(a, b, c, d, highest, total, line, column, head_dim, part, parts, odd, out_gl, partial_gl, lse_gl, kind):
        """Four sums of row `line` with its maximum and total: the output if it is the only part, else row `part` of the workspace and its
        log2(sum exp), at a level of the tree that is `odd` or not.

        Rows of the workspace are head_dim floats, rounded up to 4. Where total is 0 nothing was seen: 0, and a log of -inf.
        """
        inverse = np.float32(0) if total == np.float32(0) else ptx.reciprocal(total)
        a, b, c, d = a * inverse, b * inverse, c * inverse, d * inverse
        if parts == 1:
            store_four(out_gl, line, column, head_dim, a, b, c, d, kind)
        else:
            if column == 0:
                ptx.st_global_f32(lse_gl + 8 * part + 4 * odd, np.float32(-np.inf) if total == np.float32(0) else highest + ptx.log2(total))
            at = partial_gl + 4 * (part * ((head_dim + 3) & -4) + column)
            ptx.st_global_128(at, ptx.f32_bits(a), ptx.f32_bits(b), ptx.f32_bits(c), ptx.f32_bits(d))

    return store_result


@functools.cache
def make_combine(threads: int, quarters: int, halves: bool) -> Callable:
    """combine(...) for blocks of `threads`, with rows of at most 4 * quarters values."""
    n_part, lowest, zero, nothing = 4 * FAN, np.float32(-1e30), np.float32(0), np.float32(-np.inf)
    store_result = make_store_result(halves)

    @cuda.jit(device=True, forceinline=True)
    def combine(turn_sh, counters_gl, thread, batch, kv_head, first_row, rows, new, group, kv_heads, per_group, head_dim, split, splits,
                used, out_gl, partial_gl, lse_gl, kind):
        """After store_result of `rows` rows from first_row on by part `split` of the first `used` of `splits`. counters_gl: of the tree."""
        lse = cuda.local.array(FAN, np.float32)
        part = cuda.local.array(n_part, np.float32)
        items, pitch = np.int32(rows * quarters), np.int64(4 * ((head_dim + 3) & -4))
        lse_step, part_step, odd = np.int64(8), pitch, np.int64(0)  # between neighbours of a level
        while used > 1:
            node, parts = np.int32(split >> FAN_SHIFT), np.int32((used + (FAN - 1)) >> FAN_SHIFT)
            members = min(np.int32(used - (node << FAN_SHIFT)), np.int32(FAN))
            cuda.syncthreads()  # the rows of every thread are written, and what is counted releases them all
            if thread == 0:
                ptx.st_shared_32(turn_sh, ptx.atomic_inc_u32(counters_gl + 4 * node, np.uint32(members - 1)))
            cuda.syncthreads()
            if np.int32(ptx.ld_shared_32(turn_sh)) != np.int32(members - 1):
                return
            item = thread
            while item < items:
                row = np.int32(np.uint32(item) // quarters)
                column = np.int32(4 * (item - row * quarters))
                if column < head_dim:
                    token, head = row_of(first_row + row, kv_head, group, per_group)
                    line = (batch * new + token) * kv_heads * group + head
                    lse_at = lse_gl + 8 * line * splits + lse_step * (node << FAN_SHIFT) + 4 * odd
                    part_at = partial_gl + pitch * line * splits + part_step * (node << FAN_SHIFT) + 4 * column
                    for i in range(FAN):
                        there = np.uint32(1) if np.int32(i) < members else np.uint32(0)
                        lse[i] = ptx.ld_written_f32_if(lse_at, there, nothing)
                        words = ptx.ld_written_128_if(part_at, there)
                        for j in range(4):
                            part[4 * i + j] = ptx.bits_f32(words[j])
                        lse_at, part_at = lse_at + lse_step, part_at + part_step
                    highest, whole, a, b, c, d = lowest, zero, zero, zero, zero, zero
                    for i in range(FAN):
                        highest = ptx.maximum(highest, lse[i])
                    for i in range(FAN):  # without branches, into which the assembler would move the loads, one behind the other
                        weight = ptx.exp2(lse[i] - highest)
                        whole += weight
                        a, b = ptx.fma(weight, part[4 * i], a), ptx.fma(weight, part[4 * i + 1], b)
                        c, d = ptx.fma(weight, part[4 * i + 2], c), ptx.fma(weight, part[4 * i + 3], d)
                    first = line * splits + ((node << FAN_SHIFT) * lse_step >> 3)
                    store_result(a, b, c, d, highest, whole, line, column, head_dim, first, parts, np.int64(1 - odd), out_gl, partial_gl,
                                 lse_gl, kind)
                item = np.int32(item + threads)
            counters_gl, split, used = counters_gl + 4 * parts, node, parts
            lse_step, part_step, odd = lse_step << FAN_SHIFT, part_step << FAN_SHIFT, np.int64(1 - odd)

    return combine
