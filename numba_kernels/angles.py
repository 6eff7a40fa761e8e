"""Device helpers for rotary embeddings: cosines and sines of angles, computed or read from a table."""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.rows import make_convert, make_io, words_of

WIDE, WIDE_FLOAT32, STEP, STEP_FLOAT32 = range(4)  # how a table is read: 16 bytes or one element at a time, q's dtype or float32
_PER_PI = np.float32(1 / np.pi)
_PER_PI_REST = np.float32(1 / np.pi - float(_PER_PI))


@cuda.jit(device=True, forceinline=True)
def cos_sin(angle):
    """cos and sin of a float32 angle in radians, 1e-7 for |angle| < 2^24: reduced to an eighth of a turn in two floats, no table."""
    halves = angle * _PER_PI
    quarter = np.int32(ptx.round_i32(halves + halves))
    t = ptx.fma(np.float32(-0.5), np.float32(quarter), halves) + ptx.fma(angle, _PER_PI_REST, ptx.fma(angle, _PER_PI, -halves))
    # Least largest error on [-1/4, 1/4] of cos(pi t) and sin(pi t); N. Juffa's coefficients.
    square = t * t
    c = ptx.fma(np.float32(0.23132324), square, np.float32(-1.3350220))
    c = ptx.fma(c, square, np.float32(4.0586989))
    c = ptx.fma(c, square, np.float32(-4.9348021))
    c = ptx.fma(c, square, np.float32(1))
    s = ptx.fma(np.float32(-0.59570312), square, np.float32(2.5503993))
    s = ptx.fma(s, square, np.float32(-5.1677242))
    s = ptx.fma(t, np.float32(np.pi), t * square * s)
    if quarter & np.int32(1):
        c, s = s, c
    if (quarter + np.int32(1)) & np.int32(2):
        c = -c
    if quarter & np.int32(2):
        s = -s
    return c, s


@functools.cache
def make_table(dtype: str, vec: int) -> Callable:
    """table(address, layout, step, values): `vec` values of a table as float32; `step` bytes apart where the layout is not WIDE."""
    each = words_of(dtype, vec)
    load_access, _ = make_io(dtype, vec)
    unpack, _ = make_convert(dtype, vec)
    unpack_one, _ = make_convert(dtype, 1)
    halves = dtype != "float32"

    @cuda.jit(device=True, forceinline=True)
    def step_float32(address, step, values):
        for i in range(vec):
            values[i] = ptx.ld_global_f32(address + np.uint64(i) * step)

    @cuda.jit(device=True, forceinline=True)
    def step_same(address, step, values):
        word = cuda.local.array(1, np.uint32)
        for i in range(vec):
            word[0] = ptx.ld_global_16(address + np.uint64(i) * step)
            unpack_one(word, 0, values, i)

    @cuda.jit(device=True, forceinline=True)
    def wide_float32(address, values):
        for i in range(0, vec, 4):
            a, b, c, d = ptx.ld_global_128(address + np.uint64(4 * i))
            values[i], values[i + 1], values[i + 2], values[i + 3] = ptx.bits_f32(a), ptx.bits_f32(b), ptx.bits_f32(c), ptx.bits_f32(d)

    @cuda.jit(device=True, forceinline=True)
    def wide_same(address, values):
        words = cuda.local.array(each, np.uint32)
        load_access(address, True, words, 0)
        unpack(words, 0, values, 0)

    @cuda.jit(device=True, forceinline=True)
    def table(address, layout, step, values):
        if layout == STEP_FLOAT32:
            step_float32(address, step, values)
        elif halves and layout == STEP:
            step_same(address, step, values)
        elif vec > 1 and layout == WIDE_FLOAT32:
            wide_float32(address, values)
        elif vec > 1 and halves:
            wide_same(address, values)
    return table


def table_layout(cos: torch.Tensor, addresses: int, vec: int) -> tuple[int, int, int, int, int]:
    """(layout, bytes between the values of an angle, between batch rows, tokens, positions) of inv_freq, of tables [P, R/2], or of one row
    a token, [B or 1, S, R/2]. addresses: those of cos and sin joined by `|`; vec: elements of q an access."""
    strides, width = cos.stride(), cos.element_size()
    batch = token = position = 0
    if len(strides) == 3:
        batch, token = 0 if cos.shape[0] == 1 else strides[0] * width, strides[1] * width
    elif len(strides) == 2:
        position = strides[0] * width
    step = strides[-1] * width
    wide = vec > 1 and step == width and (addresses | batch | token | position) % 16 == 0
    return (WIDE if wide else STEP) + (cos.dtype is torch.float32), step, batch, token, position
