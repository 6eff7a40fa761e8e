"""The end of a decode_attention of many splits: out = sum_s w_s out_s / sum_s w_s,  w_s = 2 ** (lse_s - max lse),  for every row.

It is launched beside the kernel before it and waits for that one's end, so that its own start costs little (sm_90 and up). Teams of
2 ** shift threads, four values each, take a row each, of up to `ahead` splits. Of more, a block takes one row: a team has `ahead` splits
at a time, and the first team merges the others.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.decode_parts import store_four
from ftops.numba_kernels.launch import Kernel

SIGNATURE = "pppiiiii"


@dataclass(frozen=True)
class Config:
    """threads a block; ahead: partial results that a thread reads before it uses the first. Up to `ahead` splits need no barrier."""

    threads: int = 128
    ahead: int = 16


def make(config: Config) -> Callable:
    threads, ahead = config.threads, config.ahead
    n_part = 4 * ahead
    zero, lowest, nothing = np.float32(0), np.float32(-1e30), np.float32(-np.inf)

    def decode_combine(partial_gl, lse_gl, out_gl, lines, splits, head_dim, shift, kind):
        sums_sh = np.int64(ptx.shared_address(cuda.shared.array(0, np.uint8)))
        thread = np.int32(cuda.threadIdx.x)
        team, step = np.int32(thread >> shift), np.int32(ahead * (threads >> shift))
        column, line, width = np.int32(4 * (thread - (team << shift))), np.int64(cuda.blockIdx.x), np.int32((head_dim + 3) & -4)
        base, pitch = np.int32(ahead * team), np.int64(4 * width)
        if splits <= ahead:
            line, base, team = line * (threads >> shift) + team, np.int32(0), np.int32(0)
            column = column if line < lines else width
        lse_at = np.int64(lse_gl) + 4 * (line * splits + base)
        part_at = np.int64(partial_gl) + (line * splits + base) * pitch + 4 * column
        lse = cuda.local.array(ahead, np.float32)
        part = cuda.local.array(n_part, np.float32)
        highest, whole, a, b, c, d = lowest, zero, zero, zero, zero, zero
        ptx.wait_for_primary()
        ptx.launch_dependents()
        while base < splits and column < width:
            for i in range(ahead):
                there = np.uint32(1) if np.int32(base + i) < splits else np.uint32(0)
                lse[i] = ptx.ld_written_f32_if(lse_at + 4 * i, there, nothing)
                words = ptx.ld_written_128_if(part_at + i * pitch, there)
                for j in range(4):
                    part[4 * i + j] = ptx.bits_f32(words[j])
            before = highest
            for i in range(ahead):
                highest = ptx.maximum(highest, lse[i])
            weight = ptx.exp2(before - highest)
            whole, a, b, c, d = whole * weight, a * weight, b * weight, c * weight, d * weight
            for i in range(ahead):
                weight = ptx.exp2(lse[i] - highest)
                whole += weight
                a, b = ptx.fma(weight, part[4 * i], a), ptx.fma(weight, part[4 * i + 1], b)
                c, d = ptx.fma(weight, part[4 * i + 2], c), ptx.fma(weight, part[4 * i + 3], d)
            base, lse_at, part_at = np.int32(base + step), lse_at + 4 * step, part_at + step * pitch
        if splits > ahead:  # more than one team has seen some
            ptx.st_shared_64(sums_sh + 16 * threads + 8 * thread, ptx.f32_bits(highest), ptx.f32_bits(whole))
            ptx.st_shared_128(sums_sh + 16 * thread, ptx.f32_bits(a), ptx.f32_bits(b), ptx.f32_bits(c), ptx.f32_bits(d))
            cuda.syncthreads()
            if team == 0:
                for other in range(1, threads >> shift):
                    from_thread = thread + (other << shift)
                    sums = ptx.ld_shared_64(sums_sh + 16 * threads + 8 * from_thread)
                    words = ptx.ld_shared_128(sums_sh + 16 * from_thread)
                    before, other_highest = highest, ptx.bits_f32(sums[0])
                    highest = ptx.maximum(highest, other_highest)
                    mine, weight = ptx.exp2(before - highest), ptx.exp2(other_highest - highest)
                    whole = ptx.fma(weight, ptx.bits_f32(sums[1]), whole * mine)
                    a, b = ptx.fma(weight, ptx.bits_f32(words[0]), a * mine), ptx.fma(weight, ptx.bits_f32(words[1]), b * mine)
                    c, d = ptx.fma(weight, ptx.bits_f32(words[2]), c * mine), ptx.fma(weight, ptx.bits_f32(words[3]), d * mine)
        if team == 0 and column < head_dim:
            inverse = zero if whole == zero else ptx.reciprocal(whole)
            store_four(np.int64(out_gl), line, column, head_dim, a * inverse, b * inverse, c * inverse, d * inverse, kind)

    return decode_combine


def start(kernel: Kernel, partial_at: int, lse_at: int, out_at: int, lines: int, splits: int, head_dim: int, kind: int) -> None:
    """Of `lines` rows, as store_result of decode_parts leaves their parts; kind: as store_four takes it."""
    shift, config = max(3, (-(-head_dim // 4) - 1).bit_length()), kernel.spec.config
    blocks = lines if splits > config.ahead else -(-lines // (config.threads >> shift))
    kernel(blocks, 1, 1, partial_at, lse_at, out_at, lines, splits, head_dim, shift, kind)


def spec(config: Config, dependent: bool = False) -> Spec:
    return Spec(make, config, SIGNATURE, threads=config.threads, shared_bytes=24 * config.threads, dependent=dependent)


def variants() -> Iterator[Spec]:
    yield spec(Config())
