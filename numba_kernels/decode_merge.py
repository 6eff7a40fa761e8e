"""Running softmaxes meet: the warps of a block in shared memory, the blocks of a cluster in each other's (sm_90 and up).

A partial result of a row is its maximum, its sum of exp2(s - maximum), and the sums of the values under the same weights.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.decode_tile import NOTHING

AHEAD = 8  # blocks whose parts are on their way at once: a read from another block's shared memory takes about 200 ns


def make_merge_warps(warps: int, rows: int, pitch: int) -> Callable:
    """merge_warps(part_sh, sums_sh, value_scale) -> (maximum, sum, four values): a row's four values lie rows * pitch bytes apart."""
    nothing, zero = np.float32(NOTHING), np.float32(0)

    @cuda.jit(device=True, forceinline=True)
    def merge_warps(part_sh, sums_sh, value_scale):
        highest, whole, a, b, c, d = nothing, zero, zero, zero, zero, zero
        for w in range(warps):
            highest = ptx.maximum(highest, ptx.ld_shared_f32(sums_sh + 8 * w * rows))
        for w in range(warps):
            sums, part = ptx.ld_shared_64(sums_sh + 8 * w * rows), ptx.ld_shared_128(part_sh + w * rows * pitch)
            weight = ptx.exp2(ptx.bits_f32(sums[0]) - highest)
            whole = ptx.fma(weight, ptx.bits_f32(sums[1]), whole)
            weight *= value_scale
            a, b = ptx.fma(weight, ptx.bits_f32(part[0]), a), ptx.fma(weight, ptx.bits_f32(part[1]), b)
            c, d = ptx.fma(weight, ptx.bits_f32(part[2]), c), ptx.fma(weight, ptx.bits_f32(part[3]), d)
        return highest, whole, a, b, c, d

    return merge_warps


def make_merge_blocks() -> Callable:
    """merge_blocks(part_sh, sums_sh, blocks) -> as merge_warps, from the same places in each block of the cluster."""
    nothing, zero, n_sums, n_part = np.float32(NOTHING), np.float32(0), 2 * AHEAD, 4 * AHEAD

    @cuda.jit(device=True, forceinline=True)
    def merge_blocks(part_sh, sums_sh, blocks):
        sums = cuda.local.array(n_sums, np.float32)
        part = cuda.local.array(n_part, np.float32)
        highest, whole, a, b, c, d = nothing, zero, zero, zero, zero, zero
        for base in range(0, blocks, AHEAD):
            for i in range(AHEAD):
                sums[2 * i], sums[2 * i + 1] = nothing, zero
                for j in range(4):
                    part[4 * i + j] = zero
                if base + i < blocks:
                    two = ptx.ld_cluster_64(ptx.cluster_address(sums_sh, base + i))
                    four = ptx.ld_cluster_128(ptx.cluster_address(part_sh, base + i))
                    sums[2 * i], sums[2 * i + 1] = ptx.bits_f32(two[0]), ptx.bits_f32(two[1])
                    for j in range(4):
                        part[4 * i + j] = ptx.bits_f32(four[j])
            before = highest
            for i in range(AHEAD):
                highest = ptx.maximum(highest, sums[2 * i])
            weight = ptx.exp2(before - highest)
            whole, a, b, c, d = whole * weight, a * weight, b * weight, c * weight, d * weight
            for i in range(AHEAD):
                weight = ptx.exp2(sums[2 * i] - highest)
                whole = ptx.fma(weight, sums[2 * i + 1], whole)
                a, b = ptx.fma(weight, part[4 * i], a), ptx.fma(weight, part[4 * i + 1], b)
                c, d = ptx.fma(weight, part[4 * i + 2], c), ptx.fma(weight, part[4 * i + 3], d)
        return highest, whole, a, b, c, d

    return merge_blocks
