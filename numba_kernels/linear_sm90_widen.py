"""Weights of 8 and 4 bits on their way from shared memory to registers, as the 16-bit A operand of wgmma in the linear on Hopper.

For 16 values of k a lane (g, t) must hold values 2 t, 2 t + 1 and those 8 further of rows g and g + 8. x lies in its own order, so W cannot
come in one that suits its loads: lanes read words that they share with a neighbour, in all 32 banks at once, and each takes its half.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.linear_dequantise import FIRST_DOUBLED, SECOND_DOUBLED, SIGN, ZERO, make_int4, make_pair
from ftops.numba_kernels.linear_sm90_config import Config

BOTH_ZEROS = 16  # bytes of a record of four rows that have zero points beside their scales; 8 without
_LOW_TWICE, _HIGH_TWICE = np.uint32(0x1010), np.uint32(0x3232)


def make_widen(config: Config) -> tuple[Callable, Callable]:
    """(place, widen). place(base, group_shift, record) -> where a thread's part of W is in the first stage.

    widen(a, where, stage, first, group_shift, record): a[4 s + i] := register i of product first + s of the stage, half of its products.
    """
    return _make_int4(config) if config.kind == "int4" else _make_8bit(config)


def _make_8bit(config: Config) -> tuple[Callable, Callable]:
    """Rows of `depth` bytes, swizzled: 16 values of k are one of the 16-byte accesses whose numbers are mixed."""
    depth, count = config.depth, config.depth // 32
    pitch, below, mask, shift = np.uint32(depth), np.uint32(8 * depth), np.uint32(depth // 16 - 1), np.uint32(0 if depth == 128 else 1)
    pair = make_pair(config.kind, config.dtype)

    @cuda.jit(device=True, forceinline=True)
    def place(base, group_shift, record):
        thread = np.uint32(cuda.threadIdx.x)
        g, t = (thread >> np.uint32(2)) & np.uint32(7), thread & np.uint32(3)
        row = np.uint32((thread >> np.uint32(5)) * np.uint32(16) + g)
        swizzle = np.uint32(((g >> shift) & mask) << np.uint32(4))
        address = np.uint32(base + row * pitch + swizzle + np.uint32(4) * (t >> np.uint32(1)))
        return address, SECOND_DOUBLED if t & np.uint32(1) != np.uint32(0) else FIRST_DOUBLED, np.uint32(0)

    @cuda.jit(device=True, forceinline=True)
    def widen(a, where, stage, first, group_shift, record):
        address, selector, _ = where
        for s in range(count):
            at = np.uint32((address + stage) ^ np.uint32(16 * (first + s)))
            for i in range(4):  # in the order of the fragment: rows g, g + 8, then both 8 values of k further
                word = ptx.ld_shared_32(at + np.uint32(i % 2) * below + np.uint32(8 * (i // 2)))
                a[4 * s + i] = pair(ptx.permute(word, word, selector))

    return place, widen


def _make_int4(config: Config) -> tuple[Callable, Callable]:
    """As packed, 32 rows after the other: a piece of 32 values of k is 512 bytes, four rows of 128, swizzled. Then the scales.

    A word of a piece holds rows g and g + 8, values 8 t' + 4 s' + 2 c + e for all c and e: 2 t, 2 t + 1 and those 8 further of 16 are in
    words of two t', of each the half of one c. Put together they are what a lane of mma.m16n8k16 would have loaded.
    """
    pieces, scale_at = config.pieces, np.uint32(config.scale_at)
    tile_bytes, all_pieces, zero_first = np.uint32(512 * pieces), np.uint32(pieces), np.uint32(BOTH_ZEROS)
    (dequantise, minus_of), multiply, minus_zero = make_int4(config.dtype, True), ptx.FMA_PAIR[config.dtype], np.uint32(SIGN)
    high, symmetric = ptx.HIGH[config.dtype], np.float32(ZERO)
    even_half, odd_half = np.uint32(0x6240), np.uint32(0x7351)

    @cuda.jit(device=True, forceinline=True)
    def place(base, group_shift, record):
        thread = np.uint32(cuda.threadIdx.x)
        g, t = (thread >> np.uint32(2)) & np.uint32(7), thread & np.uint32(3)
        tile, i = np.uint32(thread >> np.uint32(6)), (thread >> np.uint32(5)) & np.uint32(1)  # 32 rows, and which half of them
        access = np.uint32(np.uint32(4) * (g & np.uint32(1))) ^ np.uint32(g >> np.uint32(1))
        address = np.uint32(base + tile * tile_bytes + np.uint32(128) * (g >> np.uint32(1)) + np.uint32(16) * access
                            + np.uint32(8) * i + np.uint32(4) * (t >> np.uint32(1)))
        groups = np.uint32(max(np.uint32(all_pieces >> group_shift), np.uint32(1)))
        scales = np.uint32(base + scale_at + record * (np.uint32(8) * groups * tile + g) + (record >> np.uint32(1)) * i)
        return address, odd_half if t & np.uint32(1) != np.uint32(0) else even_half, scales

    @cuda.jit(device=True, forceinline=True)
    def scales_of(at, record):
        """(scale of row g twice, of row g + 8, and what is taken off their values)."""
        if record == zero_first:
            at = np.uint32(at ^ (((at >> np.uint32(7)) & np.uint32(7)) << np.uint32(4)))
            first, second = ptx.ld_shared_64(at)
            minus, minus_below = minus_of(high(first), high(second))
            return ptx.permute(first, first, _LOW_TWICE), ptx.permute(second, second, _LOW_TWICE), minus, minus_below
        word = ptx.ld_shared_32(at ^ (((at >> np.uint32(7)) & np.uint32(3)) << np.uint32(4)))
        minus, minus_below = minus_of(symmetric, symmetric)
        return ptx.permute(word, word, _LOW_TWICE), ptx.permute(word, word, _HIGH_TWICE), minus, minus_below

    @cuda.jit(device=True, forceinline=True)
    def widen_piece(a, at, w, selector, piece, scales, record):
        scale, scale_below, minus, minus_below = scales_of(scales, record)
        for q in range(2):
            mixed = 32 * q + 64 * (piece & 1)
            first = ptx.ld_shared_32(np.uint32((w ^ np.uint32(mixed)) + np.uint32(512 * piece)))
            second = ptx.ld_shared_32(np.uint32((w ^ np.uint32(mixed + 16)) + np.uint32(512 * piece)))
            v = dequantise(ptx.permute(first, second, selector), minus, minus_below)
            a[at + 4 * q] = multiply(v[0], scale, minus_zero)
            a[at + 4 * q + 1] = multiply(v[1], scale_below, minus_zero)
            a[at + 4 * q + 2] = multiply(v[2], scale, minus_zero)
            a[at + 4 * q + 3] = multiply(v[3], scale_below, minus_zero)

    @cuda.jit(device=True, forceinline=True)
    def widen(a, where, stage, first, group_shift, record):
        address, selector, scales = where
        for p in range(pieces // 2):
            piece = first // 2 + p
            of_group = np.uint32(scales + stage + np.uint32(8) * record * np.uint32(np.uint32(piece) >> group_shift))
            widen_piece(a, 8 * p, np.uint32(address + stage), selector, piece, of_group, record)

    return place, widen
