"""8-bit V on Hopper, turned: wgmma takes 8-bit operands only with the summed dimension adjacent, and in V that is the keys'."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.attention_sm90_config import INFO_BYTES, INFO_SLOTS, Config
from ftops.numba_kernels.attention_sm90_load import NOTHING

WARPS = 3  # that turn V: the producer warp's neighbours


def make_ones(config: Config) -> Callable:
    """ones(base): a block fills the rows of ones after each tile of V."""
    threads, chunks, columns = config.threads, config.stages * config.v_bytes // config.v_chunk_bytes, config.head_dim
    v_at, chunk_bytes = np.uint32(config.v_at), np.uint32(config.v_chunk_bytes)
    one = np.uint32(0x38383838)

    @cuda.jit(device=True, forceinline=True)
    def ones(base):
        at = np.uint32(np.uint32(16) * np.uint32(cuda.threadIdx.x))
        while at < np.uint32(1024 * chunks):
            chunk = np.uint32(base + v_at + (at >> np.uint32(10)) * chunk_bytes)
            ptx.st_shared_128(chunk + np.uint32(128 * columns) + (at & np.uint32(1023)), one, one, one, one)
            at += np.uint32(16 * threads)
        hopper.fence_proxy_async()

    return ones


def make_turn(config: Config) -> Callable:
    """turn(base, warp): WARPS warps bring each tile of V that TMA has brought into head_dim rows of 128 keys, 128-byte swizzle.

    Of 16 keys, position 4 t + e is that of key 2 t + e % 2 + 8 (e // 2): four scores of a row that a thread holds are adjacent then, so
    that P needs no exchange between threads. ldmatrix takes two columns of a key for an element of 16 bits; the bytes are sorted after.
    Of 16 columns, row 8 p + n is column 2 n + p: eight rows that are written together lie in all banks, and four columns of the result that
    a thread holds are adjacent.
    """
    keys, stages, head_dim = config.keys, config.stages, config.head_dim
    v_at, raw_at, info_at = np.uint32(config.v_at), np.uint32(config.raw_at), np.uint32(config.info_at)
    v_bytes, chunk_bytes, tile_bytes = np.uint32(config.v_bytes), np.uint32(config.v_chunk_bytes), np.uint32(config.tile_bytes)
    q_full, q_empty, last = np.uint32(config.q_full), np.uint32(config.q_empty), np.uint32(stages - 1)
    v_full, v_empty, raw_full, raw_empty = (np.uint32(at) for at in (config.v_full, config.v_empty, config.raw_full, config.raw_empty))
    groups, parts, word_count = np.uint32(keys // 16), head_dim // 32, head_dim // 8
    even, odd = np.uint32(0x6420), np.uint32(0x7531)

    @cuda.jit(device=True, forceinline=True)
    def turn_group(raw, to, group, low, middle, high):
        """16 keys."""
        words = cuda.local.array(word_count, np.uint32)
        row = np.uint32(raw + (np.uint32(16) * group + np.uint32(8) * middle + low) * np.uint32(128))
        for d in range(parts):
            at = np.uint32(row + np.uint32(16) * (np.uint32(np.uint32(2 * d) + high) ^ low))
            words[4 * d], words[4 * d + 1], words[4 * d + 2], words[4 * d + 3] = ptx.ldmatrix_x4_trans(at)
        row = np.uint32(np.uint32(16) * high + np.uint32(8) * middle + low)
        to = np.uint32(to + (group >> np.uint32(3)) * chunk_bytes + row * np.uint32(128) + np.uint32(16) * ((group ^ row) & np.uint32(7)))
        for d in range(parts):
            hopper.stmatrix_x4(to + np.uint32(32 * 128 * d), ptx.permute(words[4 * d], words[4 * d + 1], even),
                               ptx.permute(words[4 * d], words[4 * d + 1], odd), ptx.permute(words[4 * d + 2], words[4 * d + 3], even),
                               ptx.permute(words[4 * d + 2], words[4 * d + 3], odd))

    @cuda.jit(device=True, forceinline=True)
    def turn(base, warp):
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        low, middle, high = lane & np.uint32(7), (lane >> np.uint32(3)) & np.uint32(1), lane >> np.uint32(4)
        tile, slot, phase = np.uint32(0), np.uint32(0), np.uint32(0)
        while True:
            hopper.mbarrier_wait(base + q_full, tile & np.uint32(1))
            count = ptx.ld_shared_32(base + info_at + np.uint32(INFO_BYTES) * (tile & np.uint32(INFO_SLOTS - 1)))
            if count == NOTHING:
                break
            cuda.syncwarp()
            if lane == np.uint32(0):
                hopper.mbarrier_arrive(base + q_empty)
            while count != np.uint32(0):
                hopper.mbarrier_wait(base + raw_full + np.uint32(8) * slot, phase)
                hopper.mbarrier_wait(base + v_empty + np.uint32(8) * slot, phase ^ np.uint32(1))
                group = np.uint32(warp)
                while group < groups:
                    turn_group(base + raw_at + slot * tile_bytes, base + v_at + slot * v_bytes, group, low, middle, high)
                    group = ptx.here(np.uint32(group + np.uint32(WARPS)))
                hopper.fence_proxy_async()
                cuda.syncwarp()
                if lane == np.uint32(0):
                    hopper.mbarrier_arrive(base + v_full + np.uint32(8) * slot)
                    hopper.mbarrier_arrive(base + raw_empty + np.uint32(8) * slot)
                phase = np.uint32(phase ^ np.uint32(slot == last))
                slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                count = ptx.here(np.uint32(count - np.uint32(1)))
            tile = np.uint32(tile + np.uint32(1))

    return turn
