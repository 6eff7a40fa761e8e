"""Device helpers for 8-bit caches: int8 and float8 e4m3 values widened to float16 fragments, and made from float32."""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx

SMALLEST = 1e-20  # what a head's largest value counts as at least where a token has scales of its own, as in ops.append_kv
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
NARROW_NAME = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}


@functools.cache
def make_widen(cache: str) -> tuple[Callable, Callable]:
    """(pairs, columns) of a word of four 8-bit values, each as two float16 pairs: pairs gives (0, 1) and (2, 3), columns (0, 2) and (1, 3).

    All float16 here are exact. int8: the byte x + 128 under the bits of 1024 reads as 1152 + x.
    """
    if cache == "int8":
        @cuda.jit(device=True, forceinline=True)
        def widen(word, first, second):
            biased, magic, offset = word ^ np.uint32(0x80808080), np.uint32(0x64646464), np.uint32(0x64806480)
            return ptx.sub_f16_pair(ptx.permute(biased, magic, first), offset), ptx.sub_f16_pair(ptx.permute(biased, magic, second), offset)

        @cuda.jit(device=True, forceinline=True)
        def pairs(word):
            return widen(word, np.uint32(0x4140), np.uint32(0x4342))

        @cuda.jit(device=True, forceinline=True)
        def columns(word):
            return widen(word, np.uint32(0x4240), np.uint32(0x4341))
    else:
        @cuda.jit(device=True, forceinline=True)
        def pairs(word):
            return ptx.e4m3_to_f16_pair(word), ptx.e4m3_to_f16_pair(word >> np.uint32(16))

        @cuda.jit(device=True, forceinline=True)
        def columns(word):
            return pairs(ptx.permute(word, np.uint32(0), np.uint32(0x3120)))
    return pairs, columns


@cuda.jit(device=True, forceinline=True)
def scaled_down(x, scale, inverse):
    """x / scale rounded as a division rounds, inverse being 1 / scale: a product and one Newton step. Past what 8 bits hold, nearly so."""
    quotient = x * inverse
    exact = ptx.fma(ptx.fma(-quotient, scale, x), inverse, quotient)
    return exact if abs(quotient) < np.float32(1024) else quotient


@cuda.jit(device=True, forceinline=True)
def e4m3_from_f32(x):
    """The byte of a float32 rounded to nearest even and clipped to +-448; NaN stays NaN."""
    bits = ptx.f32_bits(x)
    size = bits & np.uint32(0x7FFFFFFF)
    byte = np.uint32(0x7F)
    if size <= np.uint32(0x7F800000):
        size = min(size, np.uint32(0x43E00000))
        odd = (size >> np.uint32(20)) & np.uint32(1)
        byte = (size - np.uint32(120 << 23) + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
        if size < np.uint32(121 << 23):  # below 2 ** -6, where e4m3 has no leading one: an addition rounds at 2 ** -9
            byte = ptx.f32_bits(ptx.bits_f32(size) + np.float32(16384.0)) - np.uint32(0x46800000)
    return np.uint32(byte) | ((bits >> np.uint32(24)) & np.uint32(0x80))


@cuda.jit(device=True, forceinline=True)
def int8_from_f32(x):
    """The byte of a float32 rounded to nearest even and clipped to +-127."""
    return ptx.round_i32(ptx.maximum(ptx.minimum(x, np.float32(127)), np.float32(-127))) & np.uint32(0xFF)


@functools.cache
def make_narrow(cache: str, vec: int) -> Callable:
    """narrow(address, values, at): values[at : at + vec], float32, as `vec` (8, 4 or 1) bytes at an address that vec divides."""
    @cuda.jit(device=True, forceinline=True)
    def int8_pair(low, high):
        return int8_from_f32(low) | int8_from_f32(high) << np.uint32(8)

    @cuda.jit(device=True, forceinline=True)
    def e4m3_pair(low, high):
        if ptx.has_e4m3() != 0:
            return ptx.e4m3_pair(low, high)
        return e4m3_from_f32(low) | e4m3_from_f32(high) << np.uint32(8)

    pair = int8_pair if cache == "int8" else e4m3_pair

    @cuda.jit(device=True, forceinline=True)
    def word(values, at):
        return pair(values[at], values[at + 1]) | pair(values[at + 2], values[at + 3]) << np.uint32(16)

    @cuda.jit(device=True, forceinline=True)
    def narrow_8(address, values, at):
        ptx.st_global_64(address, word(values, at), word(values, at + 4))

    @cuda.jit(device=True, forceinline=True)
    def narrow_4(address, values, at):
        ptx.st_global_32(address, word(values, at))

    @cuda.jit(device=True, forceinline=True)
    def narrow_1(address, values, at):
        ptx.st_global_8(address, pair(values[at], values[at]))

    return {8: narrow_8, 4: narrow_4, 1: narrow_1}[vec]
