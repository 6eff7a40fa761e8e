"""Fragments of packed weights (ftops/packing.py) as the 16-bit A operand of mma.m16n8k16, without a conversion instruction.

int4: a nibble under the bits of 128 reads as 128 + q in bfloat16 (1024 + q, or 1024 + 16 q one nibble higher, in float16). What is too
much, 128 + zero, is taken off each value by an fma, exactly; or, where few rows of x make that the larger part of the work, off the
product: times the sum of x, which costs one product with ones. In float16, where it would be 1024 x, that would cancel too many digits.
int8: seven bits under those of 128, less 128 or, where the sign is set, 256 (float16: narrow.py).
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.narrow import make_widen

MAGIC = {"bfloat16": 0x43004300, "float16": 0x64006400}  # 128, 1024
ONE = {"bfloat16": 0x3F803F80, "float16": 0x3C003C00}
SIXTEENTH = 0x2C002C00  # float16
SIGN = 0x80008000
ZERO = 8.0  # of int4 without zero points
FIRST_DOUBLED, SECOND_DOUBLED = np.uint32(0x1100), np.uint32(0x3322)  # bytes 0 and 1 of a word, bytes 2 and 3


def subtracts(dtype: str, batch: int) -> bool:
    """Whether int4 takes 128 + zero off each value."""
    return dtype == "float16" or batch > 16


def make_int4(dtype: str, subtract: bool) -> tuple[Callable, Callable]:
    """dequantise(word, minus, minus_below) -> a0 .. a3, where _below is of the row 8 further; minus_of(zero, zero_below) -> the two."""
    magic, one, sixteenth, nibbles = (np.uint32(word) for word in (MAGIC[dtype], ONE[dtype], SIXTEENTH, 0x000F000F))
    higher, eight, four, twelve = np.uint32(0x00F000F0), np.uint32(8), np.uint32(4), np.uint32(12)
    fma, pair, below_magic = ptx.FMA_PAIR[dtype], ptx.PAIR[dtype], np.float32(64.0 if dtype == "float16" else 128.0)
    above = np.float32(1024.0 if dtype == "float16" else 128.0)

    if not subtract:
        @cuda.jit(device=True, forceinline=True)
        def dequantise(word, minus, minus_below):
            return (ptx.and_or(word, nibbles, magic), ptx.and_or(word >> four, nibbles, magic),
                    ptx.and_or(word >> eight, nibbles, magic), ptx.and_or(word >> twelve, nibbles, magic))
    elif dtype == "float16":
        @cuda.jit(device=True, forceinline=True)
        def dequantise(word, minus, minus_below):
            second = word >> eight
            return (fma(ptx.and_or(word, nibbles, magic), one, minus), fma(ptx.and_or(word, higher, magic), sixteenth, minus_below),
                    fma(ptx.and_or(second, nibbles, magic), one, minus), fma(ptx.and_or(second, higher, magic), sixteenth, minus_below))
    else:
        @cuda.jit(device=True, forceinline=True)
        def dequantise(word, minus, minus_below):
            return (fma(ptx.and_or(word, nibbles, magic), one, minus), fma(ptx.and_or(word >> four, nibbles, magic), one, minus_below),
                    fma(ptx.and_or(word >> eight, nibbles, magic), one, minus),
                    fma(ptx.and_or(word >> twelve, nibbles, magic), one, minus_below))

    @cuda.jit(device=True, forceinline=True)
    def minus_of(zero, zero_below):
        first, second = -(above + zero), -(below_magic + zero_below)
        return pair(first, first), pair(second, second)
    return dequantise, minus_of


def make_pair(kind: str, dtype: str) -> Callable:
    """pair(doubled): two 8-bit values in dtype, exactly, from a word that has each twice (`ptx.permute` with one of the two below)."""
    fma, magic, minus_one = ptx.FMA_PAIR[dtype], np.uint32(MAGIC[dtype]), np.uint32(ONE[dtype] | SIGN)
    seven, sign, sign_high, seven_high, low_bytes = (np.uint32(word) for word in (0x007F007F, 0x00800080, SIGN, 0x7F007F00, 0x00FF00FF))
    rebias, minus_zero, four, eight = np.uint32(0x7B807B80), np.uint32(SIGN), np.uint32(4), np.uint32(8)  # 2 ** 120
    biased = np.uint32(0x64806480)  # 1024 + 128

    if dtype == "float16" and kind == "int8":
        @cuda.jit(device=True, forceinline=True)
        def pair(doubled):
            return ptx.sub_f16_pair((doubled & low_bytes) ^ biased, biased)
    elif dtype == "float16":
        @cuda.jit(device=True, forceinline=True)
        def pair(doubled):
            return ptx.e4m3_to_f16_pair(doubled >> eight)
    elif kind == "int8":
        @cuda.jit(device=True, forceinline=True)
        def pair(doubled):
            return fma(ptx.and_or(doubled, sign, magic), minus_one, ptx.and_or(doubled, seven, magic))
    else:
        @cuda.jit(device=True, forceinline=True)
        def pair(doubled):
            return fma(ptx.and_or(doubled, sign_high, (doubled & seven_high) >> four), rebias, minus_zero)
    return pair


def make_rows(kind: str, dtype: str) -> Callable:
    """fragment(low, high, s) -> a0 .. a3 of product s, from 16 neighbouring bytes of a row and of the row 8 further.

    Of 16-bit values they are two products' (k = 4 s .. 4 s + 3), of 8-bit values four. An e4m3 NaN does not stay one in bfloat16.
    """
    if kind == "16-bit":
        @cuda.jit(device=True, forceinline=True)
        def fragment(low, high, s):
            return low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]
        return fragment

    if dtype == "float16":
        pairs, _ = make_widen("int8" if kind == "int8" else "float8_e4m3fn")
    else:
        pair = make_pair(kind, dtype)

        @cuda.jit(device=True, forceinline=True)
        def pairs(word):
            return pair(ptx.permute(word, word, FIRST_DOUBLED)), pair(ptx.permute(word, word, SECOND_DOUBLED))

    @cuda.jit(device=True, forceinline=True)
    def fragment(low, high, s):
        upper, lower = pairs(low[s]), pairs(high[s])
        return upper[0], lower[0], upper[1], lower[1]
    return fragment
