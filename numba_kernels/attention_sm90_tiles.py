"""Which block of query rows a persistent thread block of attention on Hopper takes next, and where it lies among the keys.

Tile `index` counts from 0 over the whole call. Under a causal mask the last rows of a sequence see most keys: they come first, and blocks take
the tiles of a round in turns from either end, so that all finish together.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx

NOTHING = np.uint32(0xFFFFFFFF)


@cuda.jit(device=True, forceinline=True)
def nth(round_, blocks, block):
    """Index of the tile that `block` of `blocks` takes in a round."""
    return np.uint32(round_ * blocks + (block if round_ & np.uint32(1) == np.uint32(0) else blocks - np.uint32(1) - block))


@cuda.jit(device=True, forceinline=True)
def dense_tile(index, tiles, heads, pairs, section):
    """(batch, head, tile from the last) of `pairs` sequences and heads with `tiles` tiles each; batch NOTHING past the end.

    Sections of `section` pairs, whose keys and values stay in L2, are finished one after the other, and within one the longest tiles come first.
    """
    first = ptx.div_u32(index, tiles * section) * section
    if first >= pairs:
        return NOTHING, np.uint32(0), np.uint32(0)
    rest = np.uint32(index - first * tiles)
    there = min(section, np.uint32(pairs - first))
    tile = ptx.div_u32(rest, there)
    pair = np.uint32(first + rest - tile * there)
    batch = ptx.div_u32(pair, heads)
    return batch, np.uint32(pair - batch * heads), tile


def make_packed_tile(rows: int) -> Callable:
    """packed_tile(index, heads, batches, starts_gl, base, before) -> (batch, head, tile from the last, base, before), for sequences that lie end to
    end. A warp looks at 32 sequences at a time, from `base` on, before which there are `before` tiles: indices must not fall.
    """

    @cuda.jit(device=True, forceinline=True)
    def packed_tile(index, heads, batches, starts_gl, base, before):
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        wanted = ptx.div_u32(index, heads)
        head = np.uint32(index - wanted * heads)
        while base < batches:
            here = np.uint32(base + lane)
            tiles = np.uint32(0)
            if here < batches:
                at = starts_gl + np.uint64(4) * np.uint64(here)
                length = np.uint32(ptx.ld_global_32(at + np.uint64(4)) - ptx.ld_global_32(at))
                tiles = np.uint32((length + np.uint32(rows - 1)) // np.uint32(rows))
            through = np.uint32(tiles)
            for step in (1, 2, 4, 8, 16):
                lower = ptx.shuffle_index(through, lane - np.uint32(step))
                if lane >= np.uint32(step):
                    through += lower
            passed = cuda.popc(ptx.ballot(np.uint32(before + through <= wanted)))
            if passed < 32:
                last = ptx.shuffle_index(np.uint32(before + through), np.uint32(passed))
                tiles = ptx.shuffle_index(tiles, np.uint32(passed))
                return np.uint32(base + np.uint32(passed)), head, np.uint32(wanted - (last - tiles)), base, before
            before += ptx.shuffle_index(through, np.uint32(31))
            base += np.uint32(32)
        return NOTHING, head, np.uint32(0), base, before

    return packed_tile
