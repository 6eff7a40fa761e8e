"""How attention on Hopper ends a tile: the rows of the result, or of one of its parts, from a consumer's registers to memory."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.attention_sm90_config import Config


def make_store(config: Config) -> Callable:
    """store(out, total, gain, out_gl, step, left, dim): the first `left` of a warp's 16 rows of gain * O / total, rounded, to rows `step`
    bytes apart.

    The four lanes of a row write 32 bytes, a whole sector. In 16 bits lanes 2 i and 2 i + 1 trade halves of two neighbouring 8-column
    tiles for that; in 8 bits the columns lie in the order of attention_sm90_turn.py, and every lane has the sums.
    """
    pairs, narrow = config.head_dim // 16, config.narrow
    quad_1, quad_2 = ptx.shuffle_xor[1], ptx.shuffle_xor[2]
    pair = ptx.PAIR[config.out_dtype]

    @cuda.jit(device=True, forceinline=True)
    def summed(total):
        total += quad_1(total)
        return total + quad_2(total)

    @cuda.jit(device=True, forceinline=True)
    def inverse(total):
        return np.float32(0) if total == np.float32(0) else ptx.reciprocal(total)

    @cuda.jit(device=True, forceinline=True)
    def traded(out, at, scale, odd):
        first = pair(out[at] * scale, out[at + 1] * scale)
        second = pair(out[at + 4] * scale, out[at + 5] * scale)
        given = ptx.f32_bits(quad_1(ptx.bits_f32(first if odd else second)))
        return given if odd else first, second if odd else given

    @cuda.jit(device=True, forceinline=True)
    def store(out, total, gain, out_gl, step, left, dim):
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        odd = (lane & np.uint32(1)) != np.uint32(0)
        row = np.int32(lane >> np.uint32(2))
        if narrow:
            column = np.int32(np.uint32(4) * (lane & np.uint32(3)))
            scale_0, scale_1 = inverse(total[0]) * gain, inverse(total[1]) * gain
        else:
            column = np.int32(np.uint32(8) * (lane & np.uint32(1)) + np.uint32(2) * (lane & np.uint32(2)))
            scale_0, scale_1 = inverse(summed(total[0])) * gain, inverse(summed(total[1])) * gain
        upper = out_gl + np.uint64(np.uint32(row)) * step + np.uint64(np.uint32(2) * np.uint32(column))
        lower = upper + np.uint64(8) * step
        for m in range(pairs):
            here = column + np.int32(16 * m) < dim
            for h in range(2):
                at, scale = 8 * m + 2 * h, scale_0 if h == 0 else scale_1
                if narrow:
                    low, high = pair(out[at] * scale, out[at + 4] * scale), pair(out[at + 1] * scale, out[at + 5] * scale)
                else:
                    low, high = traded(out, at, scale, odd)
                ptx.st_global_64_if((upper if h == 0 else lower) + np.uint64(32 * m), low, high,
                                    np.uint32(here and row + np.int32(8 * h) < left))

    return store


def make_store_part(config: Config) -> Callable:
    """store_part(out, total, bases, out_gl, lse_gl, line, heads, group, part, parts, left, dim): a thread's two rows of O / total, float32,
    and log2(sum of 2 ** score), as decode_combine reads them: parts of one line after the other. The only part is the result, rounded.

    line: of the tile's first row. `group` rows are lines beside one another, then come the next query's, `heads` lines on. left: rows of
    the tile that exist. The four lanes of a row write 32 bytes, a whole sector, or half of one.
    """
    tiles, pair, quad_1, quad_2 = config.head_dim // 8, ptx.PAIR[config.out_dtype], ptx.shuffle_xor[1], ptx.shuffle_xor[2]
    nothing = np.float32(-np.inf)

    @cuda.jit(device=True, forceinline=True)
    def store_part(out, total, bases, out_gl, lse_gl, line, heads, group, part, parts, left, dim):
        thread = np.uint32(ptx.here(np.uint32(cuda.threadIdx.x)))
        column = np.uint32(2) * (thread & np.uint32(3))
        for h in range(2):
            row = np.uint32((thread >> np.uint32(5)) * np.uint32(16) + ((thread & np.uint32(31)) >> np.uint32(2)) + np.uint32(8 * h))
            query = ptx.div_u32(row, group)
            whole = total[h]
            whole += quad_1(whole)
            whole += quad_2(whole)
            inverse = np.float32(0) if whole == np.float32(0) else ptx.reciprocal(whole)
            there = np.int32(dim) if np.int32(row) < left else np.int32(0)
            at = line + np.uint64(query) * np.uint64(heads) + np.uint64(np.uint32(row - query * group))
            at = at * np.uint64(parts) + np.uint64(part)
            to_gl = out_gl + (np.uint64(2) if parts == 1 else np.uint64(4)) * (at * np.uint64(dim) + np.uint64(column))
            if parts == 1:
                for j in range(tiles):
                    if np.int32(8 * j) < there:
                        ptx.st_global_32(to_gl + np.uint64(16 * j), pair(out[4 * j + 2 * h] * inverse, out[4 * j + 2 * h + 1] * inverse))
            else:
                for j in range(tiles):
                    ptx.st_global_64_if(to_gl + np.uint64(32 * j), ptx.f32_bits(out[4 * j + 2 * h] * inverse),
                                        ptx.f32_bits(out[4 * j + 2 * h + 1] * inverse), np.uint32(np.int32(8 * j) < there))
                if there != np.int32(0) and column == np.uint32(0):
                    ptx.st_global_f32(lse_gl + np.uint64(4) * at, nothing if whole == np.float32(0) else bases[h] + ptx.log2(whole))

    return store_part
