"""What the kernels of decode_attention share: their parameters, a block's range of keys, and options of the score."""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.division import divide

SIGNATURE = "ppppppppppppp" + "lllll" + "iii" + "uuuuuu" + "iiiiiiiiiiii" + "llll" + "ff"
LOG2E = 1.4426950408889634
GRID_Y = 32768  # a grid has at most 65535 blocks along y: the rest goes along z
LOWEST = -1e29  # a finite bias, however low, keeps its key: a row of nothing but the dtype's minimum attends evenly


@functools.cache
def make_key_range(tile: int) -> Callable:
    """key_range(...) -> (length, start, low, high, used): length within the capacity, first visible key, tiles of `split` from that key on,
    and how many splits have any, at least 1.

    A split has `fixed` tiles if that is not 0; else all have their even share of what this sequence has.
    """
    none, one = np.int32(0), np.int32(1)

    @cuda.jit(device=True, forceinline=True)
    def key_range(length, capacity, new, window, split, splits, fixed):
        length = min(max(length, none), capacity)
        start = max(np.int32(length - new - window), none) if window >= 0 else none
        tiles = np.int32(np.uint32(length - start + (tile - 1)) // tile)
        if fixed != none:
            low = np.int32(split * fixed)
            return length, start, low, min(np.int32(low + fixed), tiles), max(np.int32(ptx.div_u32(tiles + fixed - one, fixed)), one)
        each = np.int32(np.float32(tiles) * ptx.reciprocal(np.float32(splits)))  # a division by multiplication, mostly right
        rest = np.int32(tiles - each * splits)
        while rest < 0:
            each, rest = np.int32(each - 1), np.int32(rest + splits)
        while rest >= splits:
            each, rest = np.int32(each + 1), np.int32(rest - splits)
        low = np.int32(split * each + min(split, rest))
        return length, start, low, np.int32(low + each + (1 if split < rest else 0)), max(min(tiles, splits), one)

    return key_range


@cuda.jit(device=True, forceinline=True)
def block_of(row_tiles, kv_heads, per_row_tile, per_kv_head):
    """(batch, kv_head, row tile, split) of a block. Neighbours are splits, then row tiles, which read the same keys, then kv heads."""
    index = np.uint32(cuda.blockIdx.y) + np.uint32(cuda.blockIdx.z) * np.uint32(GRID_Y)
    pair = divide(index, per_row_tile)
    batch = np.int64(divide(pair, per_kv_head))
    return batch, np.int64(pair) - batch * kv_heads, np.int64(index) - np.int64(pair) * row_tiles, np.int32(cuda.blockIdx.x)


@cuda.jit(device=True, forceinline=True)
def row_of(row, kv_head, group, per_group):
    """(token, head) of a row: rows are new tokens x the query heads of one kv head."""
    token = np.int64(divide(row, per_group))
    return token, kv_head * group + row - token * group


@cuda.jit(device=True, forceinline=True)
def capped(x, cap):
    """cap * tanh(x): a polynomial near 0, where 1 - 2 / (1 + exp(2 x)) would cancel. tanh.approx is only good to 2 ** -11 of the cap."""
    square = x * x
    series = ptx.fma(ptx.fma(np.float32(1.57394409e-2), square, np.float32(-5.23025580e-2)), square, np.float32(1.33152470e-1))
    series = ptx.fma(series, square, np.float32(-3.33327681e-1))
    near = ptx.fma(series * square, x, x)
    far = np.float32(1) - np.float32(2) * ptx.reciprocal(np.float32(1) + ptx.exp2(np.float32(2 * LOG2E) * x))
    return cap * (near if square < np.float32(0.3025) else far)


@cuda.jit(device=True, forceinline=True)
def load_bias(row_gl, key, bias_key, kind):
    """The bias of a key in units of log2. kind: 0 float32, 1 float16, 2 bfloat16."""
    if kind == 0:
        added = ptx.ld_written_f32(row_gl + 4 * key * bias_key)
    else:
        word = ptx.ld_written_16(row_gl + 2 * key * bias_key)
        added = ptx.f16_low(word) if kind == 1 else ptx.bf16_low(word)
    return added if added == np.float32(-np.inf) else ptx.maximum(added * np.float32(LOG2E), np.float32(LOWEST))
