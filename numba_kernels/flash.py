"""Device helpers of attention on mma.sync: swizzled 16-bit tiles in shared memory, their fragments, and the online softmax.

A tile is rows of head_dim elements, cut into 16-byte chunks. Chunk c of row r lies at place c ^ s(r) of its row, so that the eight rows
that ldmatrix reads at one c, and the chunks that cp.async writes side by side, fall into different banks.
Fragments are those of the PTX ISA, section "mma.m16n8k16": a thread holds columns 2t, 2t + 1 of rows g and g + 8, where lane = 4 g + t.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.attention_common import MINUS_INFINITY


@dataclass(frozen=True)
class Layout:
    """A tile in shared memory: bytes of a row, and s(r) = (r >> shift) & mask. Row pitches of an odd number of chunks need no swizzle."""

    pitch: int
    shift: int
    mask: int

    @property
    def places(self) -> int:
        """How many 16-element column blocks the swizzle tells apart; block b lies as block b % places, (b - b % places) * 32 bytes on."""
        return max(1, (self.mask + 1) // 2)


def layout(head_dim: int) -> Layout:
    """head_dim is a multiple of 16. Two rows of 64 bytes share the 128 bytes of the banks, four rows of 32 bytes do."""
    shift = 0 if head_dim % 64 == 0 else 1 if head_dim % 32 == 0 else 2
    return Layout(2 * head_dim, shift, 7 >> shift)


@functools.cache
def make_fetch(head_dim: int, rows: int, threads: int) -> tuple[Callable, Callable, Callable]:
    """cp.async of `rows` rows by a block, from the last to the first: (fetch_place, fetch_sizes, fetch).

    fetch_place() -> (row, byte of the row, place in the tile) of this thread's last pass, row counted from the tile's first.
    fetch_sizes(sizes, dim) fills how many bytes it may read in each column step, 0 past the last of `dim` elements.
    fetch(place, source, step, sizes, left) copies, rows at and beyond `left` as zeros, `step` bytes back after each pass, and returns
    the source of the tile before.
    """
    shape = layout(head_dim)
    pitch, shift, mask = shape.pitch, np.uint32(shape.shift), np.uint32(shape.mask)
    lanes = mask + np.uint32(1)
    columns = head_dim // 8 // int(lanes)
    row_step = threads // int(lanes)
    passes = rows // row_step
    pass_bytes, column_bytes = row_step * pitch, 16 * int(lanes)
    if passes * row_step != rows:
        raise ValueError(f"{threads} threads fetch {row_step} rows at a time, which do not divide {rows}")

    @cuda.jit(device=True, forceinline=True)
    def fetch_place():
        thread = np.uint32(cuda.threadIdx.x)
        chunk = np.uint32(thread % lanes)
        row = np.uint32(thread // lanes + np.uint32(rows - row_step))
        place = np.uint32(row * np.uint32(pitch) + ((chunk ^ ((row >> shift) & mask)) << np.uint32(4)))
        return row, np.uint32(chunk << np.uint32(4)), place

    @cuda.jit(device=True, forceinline=True)
    def fetch_sizes(sizes, dim):
        chunk = np.int32(np.uint32(cuda.threadIdx.x) % lanes)
        for column in range(columns):
            sizes[column] = np.uint32(16) if np.int32(8) * (chunk + np.int32(column) * np.int32(lanes)) < dim else np.uint32(0)

    @cuda.jit(device=True, forceinline=True)
    def fetch(place, source, step, sizes, left):
        if left >= np.int32(rows):
            for p in range(passes):
                for column in range(columns):
                    ptx.cp_async_16(place + np.uint32(column * column_bytes - p * pass_bytes), source + np.uint64(column * column_bytes),
                                    sizes[column])
                source -= step
        else:
            left = np.int32(left - np.int32(np.uint32(cuda.threadIdx.x) // lanes))
            for p in range(passes):
                for column in range(columns):
                    size = sizes[column] if np.int32(rows - (p + 1) * row_step) < left else np.uint32(0)
                    ptx.cp_async_16(place + np.uint32(column * column_bytes - p * pass_bytes), source + np.uint64(column * column_bytes),
                                    size)
                source -= step
        return source

    return fetch_place, fetch_sizes, fetch


@functools.cache
def make_places(head_dim: int) -> tuple[Callable, Callable]:
    """(row_places, key_places), which fill where in a tile at `base` this lane points ldmatrix for the column blocks 0 .. places - 1.

    row_places: 16 rows as an A fragment (Q), or transposed as two B fragments side by side (V). key_places: 16 rows as two B fragments of
    8 rows each (K): read as Q is, their registers would not be neighbours, as mma wants them, and moves cost a tenth of the time.
    """
    shape = layout(head_dim)
    pitch, shift, mask, places = np.uint32(shape.pitch), np.uint32(shape.shift), np.uint32(shape.mask), shape.places

    @cuda.jit(device=True, forceinline=True)
    def fill(at, base, row, chunk):
        for block in range(places):
            at[block] = np.uint32(base + row * pitch + (((chunk + np.uint32(2 * block)) ^ ((row >> shift) & mask)) << np.uint32(4)))

    @cuda.jit(device=True, forceinline=True)
    def row_places(at, base):
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        fill(at, base, lane & np.uint32(15), lane >> np.uint32(4))

    @cuda.jit(device=True, forceinline=True)
    def key_places(at, base):
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        fill(at, base, (lane & np.uint32(7)) | ((lane >> np.uint32(4)) << np.uint32(3)), (lane >> np.uint32(3)) & np.uint32(1))

    return row_places, key_places


def make_products(dtype: str, head_dim: int, keys: int, row_tiles: int, q_registers: bool) -> tuple[Callable, Callable, Callable]:
    """(load_q, scores, accumulate) of a warp that holds 16 * row_tiles query rows; at and k_at are row_places and key_places.

    load_q(q_reg, at, q) reads all of Q's fragments, q bytes on. scores(score, q_reg, at, q, k_at, k): score = Q K^T,
    [row_tiles][keys / 8][4], K's tile k bytes on. accumulate(out, total, score, at, v): out += P V, [row_tiles][head_dim / 8][4], with
    P = score rounded to the dtype: the accumulator fragments of two 8-key tiles, packed, are the A fragment of 16 keys. total += P 1, so
    that the weights that are used sum to 1; adding them up took 6 % longer at head_dim 128.
    """
    shape = layout(head_dim)
    pitch, places = shape.pitch, shape.places
    dim_blocks, key_blocks = head_dim // 16, keys // 16
    mma, pair = ptx.MMA[dtype], ptx.PAIR[dtype]
    kept = 4 * row_tiles
    ones = ptx.ONES[dtype]

    @cuda.jit(device=True, forceinline=True)
    def load_q(q_reg, at, q):
        for d in range(dim_blocks):
            for r in range(row_tiles):
                a = ptx.ldmatrix_x4(at[d % places] + q + np.uint32(16 * r * pitch + (d - d % places) * 32))
                for i in range(4):
                    q_reg[(d * row_tiles + r) * 4 + i] = a[i]

    @cuda.jit(device=True, forceinline=True)
    def scores(score, q_reg, at, q, k_at, k):
        a = cuda.local.array(kept, np.uint32)
        for i in range(row_tiles * key_blocks * 8):
            score[i] = np.float32(0)
        for d in range(dim_blocks):
            for r in range(row_tiles):
                if q_registers:
                    for i in range(4):
                        a[4 * r + i] = q_reg[(d * row_tiles + r) * 4 + i]
                else:
                    a[4 * r], a[4 * r + 1], a[4 * r + 2], a[4 * r + 3] = ptx.ldmatrix_x4(
                        at[d % places] + q + np.uint32(16 * r * pitch + (d - d % places) * 32))
            for n in range(key_blocks):
                b0, b1, b2, b3 = ptx.ldmatrix_x4(k_at[d % places] + k + np.uint32(16 * n * pitch + (d - d % places) * 32))
                for r in range(row_tiles):
                    to = (r * key_blocks + n) * 8
                    mma(score, to, a[4 * r], a[4 * r + 1], a[4 * r + 2], a[4 * r + 3], b0, b1)
                    mma(score, to + 4, a[4 * r], a[4 * r + 1], a[4 * r + 2], a[4 * r + 3], b2, b3)

    @cuda.jit(device=True, forceinline=True)
    def accumulate(out, total, score, at, v):
        p = cuda.local.array(kept, np.uint32)
        for n in range(key_blocks):
            for r in range(row_tiles):
                of = (r * key_blocks + n) * 8
                for i in range(4):
                    p[4 * r + i] = pair(score[of + 2 * i], score[of + 2 * i + 1])
                mma(total, 4 * r, p[4 * r], p[4 * r + 1], p[4 * r + 2], p[4 * r + 3], ones(), ones())
            for d in range(dim_blocks):
                b0, b1, b2, b3 = ptx.ldmatrix_x4_trans(at[d % places] + v + np.uint32(16 * n * pitch + (d - d % places) * 32))
                for r in range(row_tiles):
                    to = (r * dim_blocks + d) * 8
                    mma(out, to, p[4 * r], p[4 * r + 1], p[4 * r + 2], p[4 * r + 3], b0, b1)
                    mma(out, to + 4, p[4 * r], p[4 * r + 1], p[4 * r + 2], p[4 * r + 3], b2, b3)

    return load_q, scores, accumulate


def make_softmax(head_dim: int, keys: int, row_tiles: int) -> tuple[Callable, Callable]:
    """(softmax, finish). softmax(score, out, top, total, factor): score := 2 ** (factor * (score - running maximum)), and what was summed
    before, out and total, is brought to the new maximum. top has one entry for each of a thread's 2 * row_tiles rows, total two alike.
    finish(out, total): out / total, and 0 for a row that saw nothing.
    """
    halves, tiles = 2 * row_tiles, keys // 8
    row_size, scale = head_dim // 2, ptx.scale_fragments(head_dim // 8)
    quad_1, quad_2 = ptx.shuffle_xor[1], ptx.shuffle_xor[2]

    @cuda.jit(device=True, forceinline=True)
    def half(score, top, total, rescale, factor, h):
        at = (h // 2) * tiles * 4 + 2 * (h % 2)
        high = top[h]
        for j in range(tiles):
            high = ptx.maximum(high, ptx.maximum(score[at + 4 * j], score[at + 4 * j + 1]))
        high = ptx.maximum(high, quad_1(high))
        high = ptx.maximum(high, quad_2(high))
        # A row that has seen nothing is measured from 0: -inf - -inf would be NaN.
        origin = np.float32(0) if high == MINUS_INFINITY else high
        rescale[h] = ptx.exp2((top[h] - origin) * factor)
        offset = -origin * factor
        top[h] = high
        for j in range(tiles):
            low = ptx.exp2(ptx.fma(score[at + 4 * j], factor, offset))
            next_ = ptx.exp2(ptx.fma(score[at + 4 * j + 1], factor, offset))
            score[at + 4 * j], score[at + 4 * j + 1] = low, next_
        total[2 * h] *= rescale[h]

    @cuda.jit(device=True, forceinline=True)
    def softmax(score, out, top, total, factor):
        rescale = cuda.local.array(halves, np.float32)
        half(score, top, total, rescale, factor, 0)
        half(score, top, total, rescale, factor, 1)
        if row_tiles == 2:
            half(score, top, total, rescale, factor, 2)
            half(score, top, total, rescale, factor, 3)
        for r in range(row_tiles):
            scale(out, r * row_size, rescale[2 * r], rescale[2 * r + 1])

    @cuda.jit(device=True, forceinline=True)
    def finish(out, total):
        inverse = cuda.local.array(halves, np.float32)
        for h in range(halves):
            whole = total[2 * h]
            inverse[h] = np.float32(0) if whole == np.float32(0) else ptx.reciprocal(whole)
        for r in range(row_tiles):
            scale(out, r * row_size, inverse[2 * r], inverse[2 * r + 1])

    return softmax, finish


@functools.cache
def make_store(dtype: str, head_dim: int, row_tiles: int) -> Callable:
    """store(out, own_sh, out_gl, step, left, dim): a warp's rows, rounded, to memory `step` bytes apart, the first `left` of them.

    They pass through the warp's own part of Q's tile, so that memory is written 16 bytes a lane and whole sectors at a time.
    """
    shape = layout(head_dim)
    pitch, shift, mask, lanes = np.uint32(shape.pitch), np.uint32(shape.shift), np.uint32(shape.mask), shape.mask + 1
    columns, out_tiles = head_dim // 8 // lanes, head_dim // 8
    row_step = 32 // lanes
    passes = 16 * row_tiles // row_step
    pair = ptx.PAIR[dtype]

    @cuda.jit(device=True, forceinline=True)
    def store(out, own_sh, out_gl, step, left, dim):
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        row = np.uint32(lane >> np.uint32(2))
        swizzle = (row >> shift) & mask
        place = np.uint32(own_sh + row * pitch + np.uint32(4) * (lane & np.uint32(3)))
        for r in range(row_tiles):
            for j in range(out_tiles):
                at = (r * out_tiles + j) * 4
                to = np.uint32(place + np.uint32(16 * r) * pitch + ((np.uint32(j) ^ swizzle) << np.uint32(4)))
                ptx.st_shared_32(to, pair(out[at], out[at + 1]))
                ptx.st_shared_32(to + np.uint32(8) * pitch, pair(out[at + 2], out[at + 3]))
        cuda.syncwarp()
        for p in range(passes):
            row = np.uint32(lane // np.uint32(lanes) + np.uint32(p * row_step))
            swizzle = (row >> shift) & mask
            for column in range(columns):
                chunk = np.uint32(lane % np.uint32(lanes) + np.uint32(column * lanes))
                if np.int32(row) < left and np.int32(8) * np.int32(chunk) < dim:
                    w0, w1, w2, w3 = ptx.ld_shared_128(own_sh + row * pitch + ((chunk ^ swizzle) << np.uint32(4)))
                    ptx.st_global_128(out_gl + np.uint64(row) * step + np.uint64(np.uint32(16) * chunk), w0, w1, w2, w3)

    return store
