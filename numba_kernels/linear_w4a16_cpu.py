"""One row of x and a weight of int4 on a CPU, packed as ftops/packing.py says: y[n] = sum of (q - zero) scale x, in float32.

The 128 words of a piece, (g, t, i, s), are taken as one vector, whose lanes are summed at the end of a group; x is laid out beside them
once a call. Two tiles that lie far apart are read at once, as in linear_cpu, and share what is read of x.
"""
from __future__ import annotations

import numpy as np
import torch
from numba import njit

# A value is left at its bit, of h, (c, e), and x is made smaller instead; the highest would be the sign's.
SCALE = np.array([2.0 ** -bit for bit in (0, 16, 8, 24, 4, 20, 12, 0)], np.float32)


@njit(inline="always")
def _value(word, mask):
    """A product of int32 is int64 to Numba, and vectors of those are half as wide."""
    return np.float32(np.int32(word & mask))


@njit(inline="always")
def _finish(low, high, scales, sum_x, y, tile, group):
    """Adds a group's sums of a tile's rows."""
    zeros = scales.shape[4] == 2
    for g in range(8):
        for i in range(2):
            first, second = np.float32(0), np.float32(0)
            for t in range(4):
                for s in range(2):
                    first += low[16 * g + 4 * t + 2 * i + s]
                    second += high[16 * g + 4 * t + 2 * i + s]
            row = 32 * tile + 16 * i + g
            zero = scales[tile, group, g, 2 * i, 1] if zeros else np.float32(8)
            y[row] += (first - zero * sum_x) * scales[tile, group, g, 2 * i, 0]
            zero = scales[tile, group, g, 2 * i + 1, 1] if zeros else np.float32(8)
            y[row + 8] += (second - zero * sum_x) * scales[tile, group, g, 2 * i + 1, 0]


@njit(fastmath=True, nogil=True)
def _product(words, scales, x, sums, y):
    tiles, pieces, groups = words.shape[0], words.shape[1], scales.shape[1]
    of_group, half = pieces // groups, (tiles + 1) // 2
    low, high, low2, high2 = np.empty(128, np.float32), np.empty(128, np.float32), np.empty(128, np.float32), np.empty(128, np.float32)
    for tile in range(half):
        other = tile + half if tile + half < tiles else tile
        for group in range(groups):
            low[:] = 0
            high[:] = 0
            low2[:] = 0
            high2[:] = 0
            for piece in range(of_group):
                near = group * of_group + piece
                for j in range(128):
                    word, word2 = words[tile, near, j], words[other, near, j]
                    a, b, c, d = x[near, 0, j], x[near, 1, j], x[near, 2, j], x[near, 3, j]
                    low[j] += _value(word, 0xF) * a + _value(word, 0xF0000) * b + _value(word, 0xF00) * c + _value(word, 0xF000000) * d
                    low2[j] += _value(word2, 0xF) * a + _value(word2, 0xF0000) * b + _value(word2, 0xF00) * c + _value(word2, 0xF000000) * d
                    a, b, c, d = x[near, 4, j], x[near, 5, j], x[near, 6, j], x[near, 7, j]
                    high[j] += (_value(word, 0xF0) * a + _value(word, 0xF00000) * b + _value(word, 0xF000) * c
                                + _value(word >> 28, 0xF) * d)
                    high2[j] += (_value(word2, 0xF0) * a + _value(word2, 0xF00000) * b + _value(word2, 0xF000) * c
                                 + _value(word2 >> 28, 0xF) * d)
            _finish(low, high, scales, sums[group], y, tile, group)
            if other != tile:
                _finish(low2, high2, scales, sums[group], y, other, group)


@njit(nogil=True)
def _lay_out(x, lanes, sums):
    """x[K] beside the words: [pieces, (h, c, e), (g, t, i, s)], scaled; and its sum over each group. K may end anywhere."""
    pieces, of_group, pattern = lanes.shape[0], lanes.shape[0] // len(sums), np.empty(16, np.float32)
    sums[:] = 0
    for group in range(len(sums)):
        for k in range(32 * of_group * group, min(32 * of_group * (group + 1), len(x))):
            sums[group] += x[k]
    for piece in range(pieces):
        for value in range(8):
            for t in range(4):
                for s in range(2):
                    k = 32 * piece + 8 * t + 4 * s + (value & 3)
                    here = x[k] * SCALE[value] if k < len(x) else np.float32(0)
                    pattern[4 * t + s], pattern[4 * t + 2 + s] = here, here
            for g in range(8):
                for lane in range(16):
                    lanes[piece, value, 16 * g + lane] = pattern[lane]


def one_row(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int) -> torch.Tensor:
    """[features] in x's dtype, of x with K values in all; packed int32 [tiles, pieces, 32, 4], scales [tiles, groups, 8, 4] or [..., 2]."""
    tiles, pieces, groups = packed.shape[0], packed.shape[1], scales.shape[1]
    lanes, sums, y = np.empty((pieces, 8, 128), np.float32), np.empty(groups, np.float32), np.zeros(32 * tiles, np.float32)
    _lay_out(x.detach().flatten().float().numpy(), lanes, sums)
    _product(packed.view(tiles, pieces, 128).numpy(), scales.float().view(tiles, groups, 8, 4, -1).numpy(), lanes, sums, y)
    return torch.from_numpy(y[:features]).to(x.dtype)
