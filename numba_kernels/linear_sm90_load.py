"""The order of tiles of the linear on Hopper, and its producer: one thread that has TMA bring W and x to shared memory."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.linear_sm90_config import FEATURES, GROUP, ROW_BYTES, Config


@cuda.jit(device=True, forceinline=True)
def place(tile, of_features, of_rows):
    """(tile of features, tile of rows) number `tile`: GROUP tiles of features with the first rows, with the next, ..., the next GROUP."""
    first = np.uint32(ptx.div_u32(tile, np.uint32(GROUP) * of_rows) * np.uint32(GROUP))
    there = np.uint32(min(np.uint32(GROUP), np.uint32(of_features - first)))
    rest = np.uint32(tile - first * of_rows)
    row = ptx.div_u32(rest, there)
    return np.uint32(first + rest - row * there), row


def make_fetch(config: Config) -> tuple[Callable, Callable]:
    """(fetch, foretell), of W of a stage, and int4's scales.

    fetch(stage, full, w_tensor, scale_tensor, k, feature, gated, group_shift, record): counted at `full`. gated: the map of W has 8 rows of
    gate, 8 of up, and so on. foretell(w_tensor, scale_tensor, k, feature, gated, group_shift): into L2.
    """
    scale_at, pieces, other_bytes = np.uint32(config.scale_at), np.uint32(config.pieces), np.uint32(config.scale_at)
    four, five, zero = np.uint32(4), np.uint32(5), np.uint32(0)

    if config.kind != "int4":
        @cuda.jit(device=True, forceinline=True)
        def fetch(stage, full, w_tensor, scale_tensor, k, feature, gated, group_shift, record):
            hopper.mbarrier_expect(full, other_bytes)
            hopper.tma_load_4d(stage, w_tensor, full, k, zero if gated else feature, zero, np.uint32(feature >> four) if gated else zero)

        @cuda.jit(device=True, forceinline=True)
        def foretell(w_tensor, scale_tensor, k, feature, gated, group_shift):
            hopper.tma_prefetch_4d(w_tensor, k, zero if gated else feature, zero, np.uint32(feature >> four) if gated else zero)
    else:
        @cuda.jit(device=True, forceinline=True)
        def fetch(stage, full, w_tensor, scale_tensor, k, feature, gated, group_shift, record):
            """A piece of 32 rows and 32 values of k is four rows of 128 bytes; a group of 32 rows has 8 records."""
            piece, rows = np.uint32(k >> five), np.uint32(feature >> five)
            groups = np.uint32(max(np.uint32(pieces >> group_shift), np.uint32(1)))
            hopper.mbarrier_expect(full, other_bytes + np.uint32(FEATURES // 32) * groups * record * np.uint32(8))
            hopper.tma_load_4d(stage, w_tensor, full, zero, piece * four, rows, zero)
            hopper.tma_load_4d(stage + scale_at, scale_tensor, full, zero, np.uint32(piece >> group_shift), rows, zero)

        @cuda.jit(device=True, forceinline=True)
        def foretell(w_tensor, scale_tensor, k, feature, gated, group_shift):
            piece, rows = np.uint32(k >> five), np.uint32(feature >> five)
            hopper.tma_prefetch_4d(w_tensor, zero, piece * four, rows, zero)
            hopper.tma_prefetch_4d(scale_tensor, zero, np.uint32(piece >> group_shift), rows, zero)
    return fetch, foretell


def make_produce(config: Config) -> Callable:
    """produce(base, w_tensor, x_tensor, scale_tensor, tile, apart, of_features, of_rows, begin, end, gated, group_shift, record): stages
    `begin` to `end` of every apart-th tile. What the ring holds of the first tile's W is asked into L2 while the kernel before still runs.
    """
    depth, columns, chunk, chunks = np.uint32(config.depth), np.uint32(config.columns), config.chunk, config.depth // config.chunk
    stage_bytes, w_bytes, chunk_bytes = np.uint32(config.stage_bytes), np.uint32(config.w_bytes), ROW_BYTES * config.columns
    full_at, empty_at, stages = np.uint32(config.full_at), np.uint32(config.empty_at), np.uint32(config.stages)
    (fetch, foretell), last = make_fetch(config), np.uint32(config.stages - 1)

    @cuda.jit(device=True, forceinline=True)
    def produce(base, w_tensor, x_tensor, scale_tensor, tile, apart, of_features, of_rows, begin, end, gated, group_shift, record):
        slot, phase, waiting = np.uint32(0), np.uint32(1), np.uint32(min(stages, np.uint32(end - begin)))
        k, feature = np.uint32(begin * depth), np.uint32(place(tile, of_features, of_rows)[0] * np.uint32(FEATURES))
        while waiting != np.uint32(0):
            foretell(w_tensor, scale_tensor, k, feature, gated, group_shift)
            k, waiting = np.uint32(k + depth), ptx.here(np.uint32(waiting - np.uint32(1)))
        ptx.wait_for_primary()
        while tile < of_features * of_rows:
            feature_tile, row_tile = place(tile, of_features, of_rows)
            k, feature, row = np.uint32(begin * depth), np.uint32(feature_tile * np.uint32(FEATURES)), np.uint32(row_tile * columns)
            waiting = np.uint32(end - begin)
            while waiting != np.uint32(0):
                hopper.mbarrier_wait(base + empty_at + np.uint32(8) * slot, phase)
                full, stage = np.uint32(base + full_at + np.uint32(8) * slot), np.uint32(base + slot * stage_bytes)
                fetch(stage, full, w_tensor, scale_tensor, k, feature, gated, group_shift, record)
                for c in range(chunks):
                    hopper.tma_load_2d(stage + w_bytes + np.uint32(c * chunk_bytes), x_tensor, full, k + np.uint32(chunk * c), row)
                phase = np.uint32(phase ^ np.uint32(slot == last))
                slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                k = np.uint32(k + depth)
                waiting = ptx.here(np.uint32(waiting - np.uint32(1)))  # not unrolled
            tile = np.uint32(tile + apart)
        ptx.launch_dependents()  # not earlier: what the next kernel asks into L2 would be gone before it is used

    return produce
