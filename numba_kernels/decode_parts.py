"""The end of a block of decode_attention: a row's result, or its part of it, and the meeting of the parts of one row where they are few.

    out = sum_s w_s out_s / sum_s w_s,  w_s = 2 ** (lse_s - max lse)

Each block leaves its rows of out_s and the logarithms lse_s in a workspace and counts itself, and the last one adds the parts up: in the
order of their keys, whichever block that is, so that the bits are always the same, and those that decode_combine gives.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.decode_common import row_of

MOST_PARTS = 16  # as many as decode_combine adds up in this order


@cuda.jit(device=True, forceinline=True)
def store_four(out_gl, line, column, head_dim, a, b, c, d, kind):
    """Four values of row `line` of an output of `kind` (0 float32, 1 float16, 2 bfloat16), or as many as head_dim leaves."""
    at = line * head_dim + column
    if head_dim & 3 != 0:
        for i in range(min(4, head_dim - column)):
            value = a if i == 0 else b if i == 1 else c if i == 2 else d
            if kind == 0:
                ptx.st_global_f32(out_gl + 4 * (at + i), value)
            else:
                ptx.st_global_16(out_gl + 2 * (at + i), ptx.f16_pair(value, value) if kind == 1 else ptx.bf16_pair(value, value))
    elif kind == 0:
        ptx.st_global_128(out_gl + 4 * at, ptx.f32_bits(a), ptx.f32_bits(b), ptx.f32_bits(c), ptx.f32_bits(d))
    else:
        store_halves(out_gl, at, a, b, c, d, kind)


@cuda.jit(device=True, forceinline=True)
def store_halves(out_gl, at, a, b, c, d, kind):
    if kind == 1:
        ptx.st_global_64(out_gl + 2 * at, ptx.f16_pair(a, b), ptx.f16_pair(c, d))
    else:
        ptx.st_global_64(out_gl + 2 * at, ptx.bf16_pair(a, b), ptx.bf16_pair(c, d))


@functools.cache
def make_store_result(halves: bool) -> Callable:
    """store_result(...); halves: the output has 16 bits, and rows are whole 16-byte accesses."""

    @cuda.jit(device=True, forceinline=True)
    def store_result(a, b, c, d, highest, total, line, column, head_dim, split, splits, used, out_gl, partial_gl, lse_gl, kind):
        """Four sums of row `line` with its maximum and total: the output if only one split is used, else a part and its log2(sum exp).

        Rows of parts are head_dim floats, rounded up to 4. Where total is 0 nothing was seen: 0, and a log of -inf.
        """
        inverse = np.float32(0) if total == np.float32(0) else ptx.reciprocal(total)
        a, b, c, d = a * inverse, b * inverse, c * inverse, d * inverse
        if used != 1:
            line = line * splits + split
            if column == 0:
                ptx.st_global_f32(lse_gl + 4 * line, np.float32(-np.inf) if total == np.float32(0) else highest + ptx.log2(total))
            at = partial_gl + 4 * (line * ((head_dim + 3) & -4) + column)
            ptx.st_global_128(at, ptx.f32_bits(a), ptx.f32_bits(b), ptx.f32_bits(c), ptx.f32_bits(d))
        elif halves:
            store_halves(out_gl, line * head_dim + column, a, b, c, d, kind)
        else:
            store_four(out_gl, line, column, head_dim, a, b, c, d, kind)

    return store_result


@functools.cache
def make_meet(threads: int, quarters: int, halves: bool) -> Callable:
    """meet(...) for blocks of `threads`, with rows of at most 4 * quarters values."""
    lowest, zero, one = np.float32(-1e30), np.float32(0), np.int32(1)
    whole_access, store_result = np.uint32(16), make_store_result(halves)

    @cuda.jit(device=True, forceinline=True)
    def meet(shared_sh, counter_gl, thread, batch, kv_head, first_row, rows, new, group, kv_heads, per_group, head_dim, splits, used,
             out_gl, partial_gl, lse_gl, kind):
        """After store_result of `rows` rows, from first_row on, by one of `used` blocks, of which the last to come here adds up the parts.
        shared_sh: space for used x rows x (4 quarters + 1) floats."""
        items, lse_sh, pitch = np.int32(rows * quarters), np.int32(shared_sh + 16 * used * rows * quarters), np.int64((head_dim + 3) & -4)
        cuda.syncthreads()  # the rows of every thread are written, and the count releases them all
        if thread == 0:
            ptx.st_shared_32(shared_sh, ptx.atomic_inc_u32(counter_gl, np.uint32(used - 1)))
        cuda.syncthreads()
        if np.int32(ptx.ld_shared_32(shared_sh)) != np.int32(used - 1):
            return
        cuda.syncthreads()
        item = thread
        while item < items:
            row = np.int32(np.uint32(item) // quarters)
            column = np.int32(4 * (item - row * quarters))
            if column < head_dim:
                token, head = row_of(first_row + row, kv_head, group, per_group)
                line = ((batch * new + token) * kv_heads * group + head) * splits
                part_gl, part_sh = partial_gl + 4 * (line * pitch + column), np.int32(shared_sh + 16 * item)
                for _ in range(used):
                    ptx.cp_async_16(part_sh, part_gl, whole_access)
                    part_gl, part_sh = part_gl + 4 * pitch, np.int32(part_sh + 16 * items)
                if column == 0:
                    for part in range(used):
                        ptx.cp_async_4(np.int32(lse_sh + 4 * (part * rows + row)), lse_gl + 4 * (line + part))
            item = np.int32(item + threads)
        ptx.cp_async_commit()
        ptx.cp_async_wait_0()
        cuda.syncthreads()
        item = thread
        while item < items:
            row = np.int32(np.uint32(item) // quarters)
            column = np.int32(4 * (item - row * quarters))
            if column < head_dim:
                highest, whole, a, b, c, d = lowest, zero, zero, zero, zero, zero
                row_sh, part_sh = np.int32(lse_sh + 4 * row), np.int32(shared_sh + 16 * item)
                for part in range(used):
                    highest = ptx.maximum(highest, ptx.ld_shared_f32(np.int32(row_sh + 4 * part * rows)))
                for part in range(used):
                    weight = ptx.exp2(ptx.ld_shared_f32(np.int32(row_sh + 4 * part * rows)) - highest)
                    words = ptx.ld_shared_128(np.int32(part_sh + 16 * part * items))
                    whole += weight
                    a, b = ptx.fma(weight, ptx.bits_f32(words[0]), a), ptx.fma(weight, ptx.bits_f32(words[1]), b)
                    c, d = ptx.fma(weight, ptx.bits_f32(words[2]), c), ptx.fma(weight, ptx.bits_f32(words[3]), d)
                token, head = row_of(first_row + row, kv_head, group, per_group)
                line = (batch * new + token) * kv_heads * group + head
                store_result(a, b, c, d, highest, whole, line, column, head_dim, np.int32(0), one, one, out_gl, partial_gl, lse_gl, kind)
            item = np.int32(item + threads)

    return meet
