"""Rotary embedding on the GPU: pairs (x0, x1) of every head turn to (x0 cos - x1 sin, x1 cos + x0 sin); q and k in one launch.

A thread owns one unit, two accesses of `vec` elements, of some heads of one token: the pairs of `vec` angles, whose cosines it has once
for all these heads, or beyond rotary_dim two accesses to pass on. The heads of q and of k are counted through.
Floor: (reads of q and k + writes of the two) / copy bandwidth; cosines come from L2.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.angles import cos_sin, make_table, table_layout
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, empty_like, load
from ftops.numba_kernels.rows import DTYPE_NAME, DTYPES, ITEM, make_convert, make_io, widest, words_of

THREADS = 128


@dataclass(frozen=True)
class Config:
    """dtype; vec: elements an access, 16 bytes of them or one; interleaved: pairs are neighbours, else half of rotary_dim apart;
    heads: of a thread."""

    dtype: str
    vec: int
    interleaved: bool
    heads: int


@functools.cache
def pick(dtype: str, vec: int, interleaved: bool) -> Config:
    """Eight loads on their way a thread; four in float32, where eight of four values go to local memory on sm_100 and sm_120."""
    return Config(dtype, vec, interleaved, heads=2 if vec == 4 else 4)


def make(config: Config) -> Callable:
    vec, item, each, interleaved = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), config.interleaved
    heads_each, both, kept = config.heads, 2 * vec, 2 * each * config.heads
    fetch, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)
    table = make_table(config.dtype, config.vec)

    @cuda.jit(device=True, forceinline=True)
    def turn(words, at, cos, sin):
        """The pairs of one unit, words[at : at + 2 each], in place."""
        values = cuda.local.array(both, np.float32)
        unpack(words, at, values, 0)
        unpack(words, at + each, values, vec)
        for i in range(vec):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, vec + i)
            x0, x1 = values[first], values[second]
            values[first] = ptx.fma(x0, cos[i], -(x1 * sin[i]))
            values[second] = ptx.fma(x1, cos[i], x0 * sin[i])
        pack(values, 0, words, at)
        pack(values, vec, words, at + each)

    def rotary(q_gl, k_gl, positions_gl, cos_gl, sin_gl, q_out_gl, k_out_gl, q_batch, q_token, q_head, k_batch, k_token, k_head,
               position_batch, position_token, table_batch, table_token, table_position, table_step, layout,
               work, length, heads, kv_heads, head_dim, half, units, groups):
        thread = np.uint32(cuda.blockIdx.x) * np.uint32(THREADS) + np.uint32(cuda.threadIdx.x)
        rest = ptx.div_u32(thread, units)
        unit = thread - rest * units
        token = ptx.div_u32(rest, groups)
        head = (rest - token * groups) * np.uint32(heads_each)
        batch = ptx.div_u32(token, length)
        step = token - batch * length
        rotated = unit * np.uint32(vec) < half
        first = unit * np.uint32(both)
        second = first + np.uint32(vec)
        if not interleaved and rotated:
            first = unit * np.uint32(vec)
            second = first + half
        q_at = q_gl + np.uint64((np.int64(batch) * q_batch + np.int64(step) * q_token) * item)
        k_at = k_gl + np.uint64((np.int64(batch) * k_batch + np.int64(step) * k_token) * item)
        words = cuda.local.array(kept, np.uint32)
        for i in range(heads_each):
            of_k = np.int64(head) + i - np.int64(heads)
            at = q_at + np.uint64((np.int64(head) + i) * q_head * item) if of_k < 0 else k_at + np.uint64(of_k * k_head * item)
            live = thread < work and of_k < np.int64(kv_heads)
            fetch(at + np.uint64(first) * np.uint64(item), live, words, 2 * i * each)
            fetch(at + np.uint64(second) * np.uint64(item), live and second < head_dim, words, (2 * i + 1) * each)
        if rotated and thread < work:
            cos = cuda.local.array(vec, np.float32)
            sin = cuda.local.array(vec, np.float32)
            position = np.int64(0)
            if positions_gl != np.uint64(0):  # the low word of int32 or int64
                position = np.int64(np.int32(ptx.ld_global_32(
                    positions_gl + np.uint64(np.int64(batch) * position_batch + np.int64(step) * position_token))))
            row = np.uint64(np.int64(batch) * table_batch + np.int64(step) * table_token + position * table_position
                            + np.int64(unit * np.uint32(vec)) * np.int64(table_step))
            table(cos_gl + row, layout, np.uint64(table_step), cos)
            if sin_gl != np.uint64(0):
                table(sin_gl + row, layout, np.uint64(table_step), sin)
            else:
                for i in range(vec):
                    cos[i], sin[i] = cos_sin(np.float32(position) * cos[i])
            for i in range(heads_each):
                turn(words, 2 * i * each, cos, sin)
        for i in range(heads_each):
            of_k = np.int64(head) + i - np.int64(heads)
            row_of_q, row_of_k = np.int64(token) * np.int64(heads) + np.int64(head) + i, np.int64(token) * np.int64(kv_heads) + of_k
            at = (q_out_gl if of_k < 0 else k_out_gl) + np.uint64((row_of_q if of_k < 0 else row_of_k) * np.int64(head_dim) * item)
            live = thread < work and of_k < np.int64(kv_heads)
            store(at + np.uint64(first) * np.uint64(item), live, words, 2 * i * each)
            store(at + np.uint64(second) * np.uint64(item), live and second < head_dim, words, (2 * i + 1) * each)

    return rotary


def spec(config: Config) -> Spec:
    return Spec(make, config, "p" * 7 + "l" * 11 + "ui" + "u" * 8, THREADS, min_blocks=4, halves=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype in DTYPES:
        for vec in (16 // ITEM[dtype], 1):
            yield from (spec(pick(dtype, vec, interleaved)) for interleaved in (False, True))


@functools.cache
def _kernel(dtype: torch.dtype, vec: int, interleaved: bool, device: int) -> tuple[Kernel, int]:
    config = pick(DTYPE_NAME[dtype], vec, interleaved)
    return load(spec(config), device), config.heads


def launch(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None,
           interleaved: bool, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = empty_like(q), empty_like(k)
    batch, length, heads, head_dim = q.shape
    kv_heads, half, item = k.shape[2], rotary_dim // 2, q.element_size()
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if sin is not None and sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    (q_batch, q_token, q_head, _), (k_batch, k_token, k_head, _) = q.stride(), k.stride()
    q_at, k_at, cos_at, sin_at = q.data_ptr(), k.data_ptr(), cos.data_ptr(), 0 if sin is None else sin.data_ptr()
    vec = widest(item, (head_dim | half | q_batch | q_token | q_head | k_batch | k_token | k_head) * item | q_at | k_at)
    position_at = position_batch = position_token = 0
    if positions is not None:
        position_at, size = positions.data_ptr(), positions.element_size()
        position_batch, position_token = positions.stride(0) * size, positions.stride(1) * size
    layout, step, table_batch, table_token, table_position = table_layout(cos, cos_at | sin_at, vec)
    units = half // vec + -(-(head_dim - rotary_dim) // (2 * vec))
    kernel, heads_each = _kernel(q.dtype, vec, interleaved, q.device.index)
    groups = -(-(heads + kv_heads) // heads_each)
    work = batch * length * units * groups
    if work >= 1 << 32:
        raise ValueError(f"rotary: {q.numel() + k.numel()} elements that 16-byte accesses do not fit are too many for one launch; "
                         "split the batch, or make q and k contiguous")
    kernel(
        -(-work // THREADS), 1, 1, q_at, k_at, position_at, cos_at, sin_at, q_out.data_ptr(), k_out.data_ptr(), q_batch, q_token, q_head,
        k_batch, k_token, k_head, position_batch, position_token, table_batch, table_token, table_position, step, layout, work, length,
        heads, kv_heads, head_dim, half, units, groups)
    return q_out, k_out
