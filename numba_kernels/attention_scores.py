"""What happens to attention's scores between the products, for the kernels on tensor cores: softcap, bias and ALiBi, and what is hidden.

A thread holds its scores as mma and wgmma lay them out: rows lane / 4 and lane / 4 + 8 of 16, columns 2 (lane % 4) and the next of 8.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.attention_common import LOG2E, MINUS_INFINITY


@functools.cache
def make_hide(keys: int, row_tiles: int, packed: bool = False) -> Callable:
    """hide(score, first, position, left, right, limit, group): -inf at keys that a row must not see. `first` is the tile's first key,
    `position` the place of the block's first row among the keys: a row sees [place - left, place + right], and nothing at or beyond
    limit. packed: `group` rows after one another have one place.
    """
    halves, tiles = 2 * row_tiles, keys // 8

    @cuda.jit(device=True, forceinline=True)
    def hide(score, first, position, left, right, limit, group):
        thread = np.int32(ptx.here(np.uint32(cuda.threadIdx.x)))
        column = np.int32(first + np.int32(2) * (thread & np.int32(3)))
        row = np.int32((thread >> np.int32(5)) * np.int32(16 * row_tiles) + ((thread & np.int32(31)) >> np.int32(2)))
        for h in range(halves):
            at = (h // 2) * tiles * 4 + 2 * (h % 2)
            place = np.int32(row + np.int32(8 * h))
            if packed:
                place = np.int32(ptx.div_u32(np.uint32(place), np.uint32(group)))
            low = np.int32(position + place - left)
            high = np.int32(min(np.int32(position + place + right), np.int32(limit - np.int32(1))))
            # One unsigned comparison for both ends; where high < low nothing passes.
            span = np.uint32(high - low) if high >= low else np.uint32(0)
            start = np.uint32(column - low) if high >= low else np.uint32(0x80000000)
            for j in range(tiles):
                if np.uint32(start + np.uint32(8 * j)) > span:
                    score[at + 4 * j] = MINUS_INFINITY
                if np.uint32(start + np.uint32(8 * j + 1)) > span:
                    score[at + 4 * j + 1] = MINUS_INFINITY

    return hide


@functools.cache
def make_shape_scores(dtype: str, keys: int, row_tiles: int) -> Callable:
    """score := log2(e) * (softcap(scale * score) + bias) - slope * |distance|, each part if asked for; slope comes with log2(e) in it."""
    halves, tiles = 2 * row_tiles, keys // 8
    pairs = 2 * tiles
    low, high = ptx.LOW[dtype], ptx.HIGH[dtype]

    @cuda.jit(device=True, forceinline=True)
    def in_log2(bias):
        """A finite bias, however low, keeps its key: a row of nothing but the dtype's minimum attends evenly."""
        finite = ptx.maximum(bias * LOG2E, np.float32(-1e29))
        return bias if bias == MINUS_INFINITY else finite

    @cuda.jit(device=True, forceinline=True)
    def add_row(score, at, key_gl, there, bias_wide):
        """One row's bias; all of it is on its way before the first is used. Of a pair that begins before the last key both are there to be
        read: rows are whole 16 bytes."""
        words = cuda.local.array(pairs, np.uint32)
        if bias_wide:
            for j in range(tiles):
                live = np.uint32(np.int32(8 * j) < there)
                words[2 * j] = ptx.ld_global_32_if(key_gl + np.uint64(32 * j), live)
                words[2 * j + 1] = ptx.ld_global_32_if(key_gl + np.uint64(32 * j + 4), live)
            for j in range(tiles):
                score[at + 4 * j] += in_log2(ptx.bits_f32(words[2 * j]))
                score[at + 4 * j + 1] += in_log2(ptx.bits_f32(words[2 * j + 1]))
        else:
            for j in range(tiles):
                words[j] = ptx.ld_global_32_if(key_gl + np.uint64(16 * j), np.uint32(np.int32(8 * j) < there))
            for j in range(tiles):
                score[at + 4 * j] += in_log2(low(words[j]))
                score[at + 4 * j + 1] += in_log2(high(words[j]))

    @cuda.jit(device=True, forceinline=True)
    def add_bias(score, first, column, first_row, row, queries, keys_there, bias_gl, bias_row, bias_wide):
        thread = np.int32(cuda.threadIdx.x)
        width = np.uint64(4) if bias_wide else np.uint64(2)
        # The tile after this one, on its way to L2 by then: a row a lane.
        near_row = np.int32(first_row + (thread >> np.int32(5)) * np.int32(16 * row_tiles) + (thread & np.int32(16 * row_tiles - 1)))
        ptx.prefetch_l2(bias_gl + np.uint64(min(near_row, np.int32(queries - 1))) * np.uint64(bias_row)
                        + np.uint64(max(np.int32(first - np.int32(keys)), np.int32(0))) * width)
        there = np.int32(keys_there - column)
        for h in range(halves):
            of_row = np.uint64(min(np.int32(row + np.int32(8 * h)), np.int32(queries - 1)))  # rows past the end are not kept
            add_row(score, (h // 2) * tiles * 4 + 2 * (h % 2), bias_gl + of_row * np.uint64(bias_row) + np.uint64(column) * width, there,
                    bias_wide)

    @cuda.jit(device=True, forceinline=True)
    def shape_scores(score, first, first_row, queries, keys_there, scale, softcap, bias_gl, bias_row, bias_wide, slope):
        thread = np.int32(ptx.here(np.uint32(cuda.threadIdx.x)))
        column = np.int32(first + np.int32(2) * (thread & np.int32(3)))
        row = np.int32(first_row + (thread >> np.int32(5)) * np.int32(16 * row_tiles) + ((thread & np.int32(31)) >> np.int32(2)))
        if softcap > np.float32(0):
            # c tanh(s / c) = c - 2 c / (1 + exp(2 s / c)): tanh.approx is 2^-11 off, 0.02 in a score near Gemma's cap of 50.
            cap, inner = softcap * LOG2E, np.float32(2) * LOG2E * scale * ptx.reciprocal(softcap)
            for i in range(halves * tiles * 2):
                score[i] = cap - np.float32(2) * cap * ptx.reciprocal(np.float32(1) + ptx.exp2(score[i] * inner))
        else:
            for i in range(halves * tiles * 2):
                score[i] *= scale * LOG2E
        if bias_gl != np.uint64(0):
            add_bias(score, first, column, first_row, row, queries, keys_there, bias_gl, bias_row, bias_wide)
        if slope != np.float32(0):
            for h in range(halves):
                at = (h // 2) * tiles * 4 + 2 * (h % 2)
                distance = np.float32(np.int32(column - (keys_there - queries + row + np.int32(8 * h))))
                for j in range(tiles):
                    score[at + 4 * j] -= slope * abs(distance + np.float32(8 * j))
                    score[at + 4 * j + 1] -= slope * abs(distance + np.float32(8 * j + 1))

    return shape_scores
