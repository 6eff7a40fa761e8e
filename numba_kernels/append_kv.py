"""append_kv on the GPU: cache[row, slot] = k[b, t] for keys and values, quantised on the way where the cache has 8 bits.

A thread moves 16 bytes of a key or value at a time (one element where addresses or strides do not allow that), those of up to four
tokens together; a block takes whole tokens of keys (y = 0) or of values (y = 1).
Floor: (reads of k and v + writes of their places in the cache) / copy bandwidth; of a few tokens, the latency of a launch.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, load
from ftops.numba_kernels.narrow import NARROW_NAME, make_narrow, scaled_down
from ftops.numba_kernels.rows import DTYPE_NAME, ITEM, make_convert, make_io, words_of

SIGNATURE = "pppppppp" + "llll" * 4 + "lll" + "ll" + "iiiiiii"
THREADS, ACCESSES = 256, 4
FEW_TOKENS = 1024  # up to here a thread makes one access, so that more multiprocessors take part; beyond, four are on their way at once


@dataclass(frozen=True)
class Config:
    """dtype of k and v; cache: that of the cache, or "same" (then float16 stands for bfloat16 too); vec: elements a thread moves."""

    dtype: str
    cache: str
    vec: int


def pick(dtype: torch.dtype, cache: torch.dtype, wide: bool) -> Config:
    """wide: 16 bytes of k and v are one access, and so is what becomes of them in the cache."""
    narrow = NARROW_NAME.get(cache, "same")
    name = "float16" if narrow == "same" and dtype is torch.bfloat16 else DTYPE_NAME[dtype]
    return Config(name, narrow, 16 // ITEM[name] if wide else 1)


def make(config: Config) -> Callable:
    vec, item, n_words, quantises = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), config.cache != "same"
    n_kept, cache_item = n_words * ACCESSES, 1 if quantises else item
    fetch, copy = make_io(config.dtype, vec)
    unpack, _ = make_convert(config.dtype, vec)
    narrow = make_narrow(config.cache, vec) if quantises else None

    def append_kv(k_gl, v_gl, k_cache_gl, v_cache_gl, positions_gl, table_gl, k_scale_gl, v_scale_gl, k_batch, k_new, k_head, k_dense,
                  v_batch, v_new, v_head, v_dense, k_page, k_slot, k_cache_head, k_cache_dense, v_page, v_slot, v_cache_head, v_cache_dense,
                  positions_batch, positions_new, table_row, capacity, tokens, tokens_a_block, new, heads, units, pages, page_size,
                  wide_positions):
        ptx.launch_dependents()
        first_token = np.int64(cuda.blockIdx.x) * tokens_a_block
        x_gl, cache_gl, scale_gl = np.int64(k_gl), np.int64(k_cache_gl), np.int64(k_scale_gl)
        if cuda.blockIdx.y == 1:
            x_gl, cache_gl, scale_gl = np.int64(v_gl), np.int64(v_cache_gl), np.int64(v_scale_gl)
            k_batch, k_new, k_head, k_dense = v_batch, v_new, v_head, v_dense
            k_page, k_slot, k_cache_head, k_cache_dense = v_page, v_slot, v_cache_head, v_cache_dense
        words = cuda.local.array(n_kept, np.uint32)
        values = cuda.local.array(vec, np.float32)
        place = cuda.local.array(ACCESSES, np.int64)
        slot = cuda.local.array(ACCESSES, np.int64)
        a_token = heads * units
        team = min(a_token, THREADS)
        teams = np.int32(ptx.div_u32(THREADS, team))
        own = np.int32(ptx.div_u32(cuda.threadIdx.x, team))
        for turn in range(np.int32(cuda.threadIdx.x) - own * team, a_token if own < teams else 0, team):
            head = np.int64(ptx.div_u32(turn, units))
            element = (turn - head * units) * vec
            scale = inverse = np.float32(1)
            if quantises:
                scale = ptx.ld_global_f32(scale_gl + 4 * head)
                inverse = ptx.divide_rn(np.float32(1), scale)
            for i in range(ACCESSES):
                token, place[i], slot[i] = first_token + own + i * teams, -1, -1
                live = own + i * teams < tokens_a_block and token < tokens
                batch = np.int64(ptx.div_u32(token, new))
                at = batch * k_batch + (token - batch * new) * k_new + head * k_head + element * k_dense
                fetch(x_gl + item * at, 1 if live else 0, words, n_words * i)
                if live:
                    place[i], at = batch, batch * positions_batch + (token - batch * new) * positions_new
                    if wide_positions != 0:
                        slot[i] = np.int64(ptx.ld_global_u64(np.int64(positions_gl) + 8 * at))
                    else:
                        slot[i] = np.int64(np.int32(ptx.ld_global_32(np.int64(positions_gl) + 4 * at)))
            if table_gl != 0:
                for i in range(ACCESSES):
                    if slot[i] >= 0 and slot[i] < capacity:
                        index = np.int64(ptx.div_u32(slot[i], page_size))
                        place[i] = np.int64(ptx.ld_global_32(np.int64(table_gl) + 4 * (place[i] * table_row + index)))
                        slot[i] -= index * page_size
                    else:
                        place[i] = pages
            for i in range(ACCESSES):
                # Unsigned: a page below 0 is far above.
                if place[i] < pages and slot[i] >= 0 and slot[i] < capacity:
                    to = cache_gl + cache_item * (place[i] * k_page + slot[i] * k_slot + head * k_cache_head + element * k_cache_dense)
                    if quantises:
                        unpack(words, n_words * i, values, 0)
                        for n in range(vec):
                            values[n] = scaled_down(values[n], scale, inverse)
                        narrow(to, values, 0)
                    else:
                        copy(to, 1, words, n_words * i)

    return append_kv


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=THREADS, min_blocks=3)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for wide in (True, False):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for cache in NARROW_NAME:
                yield spec(pick(dtype, cache, wide))
            if dtype is not torch.bfloat16:
                yield spec(pick(dtype, dtype, wide))


@functools.cache
def _kernel(dtype: torch.dtype, cache: torch.dtype, wide: bool, device: int) -> tuple[Kernel, int]:
    config = pick(dtype, cache, wide)
    return load(spec(config), device), config.vec


def launch(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
           page_table: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    batch, new, heads, head_dim = k.shape
    pages, page_size, _, _ = k_cache.shape
    tokens = batch * new
    if tokens * head_dim == 0 or pages * page_size == 0:
        return
    k_at, v_at, k_cache_at, v_cache_at = k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    k_strides, v_strides, k_cache_strides, v_cache_strides = k.stride(), v.stride(), k_cache.stride(), v_cache.stride()
    capacity, table_at, table_row = page_size, 0, 0
    if page_table is not None:
        if page_table.stride(1) != 1:
            page_table = page_table.contiguous()
        capacity, table_at, table_row = page_size * page_table.shape[1], page_table.data_ptr(), page_table.stride(0)
    k_scale_at = v_scale_at = 0
    if k_scale is not None:
        k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
        k_scale_at, v_scale_at = k_scale.data_ptr(), v_scale.data_ptr()

    unit = 16 // k.element_size()  # elements; as many in the cache are an access there
    steps = head_dim
    for *outer, dense in (k_strides, v_strides, k_cache_strides, v_cache_strides):
        steps |= outer[0] | outer[1] | outer[2] | (0 if dense == 1 else 1)
    wide = not (steps % unit or (k_at | v_at) & 15 or (k_cache_at | v_cache_at) % (unit * k_cache.element_size()))
    kernel, vec = _kernel(k.dtype, k_cache.dtype, wide, k.device.index)
    units = head_dim // vec
    positions_batch, positions_new = positions.stride()
    tokens_a_block = max(1, THREADS // (heads * units)) * (1 if tokens <= FEW_TOKENS else ACCESSES)
    kernel(-(-tokens // tokens_a_block), 2, 1, k_at, v_at, k_cache_at, v_cache_at, positions.data_ptr(), table_at, k_scale_at,
           v_scale_at, *k_strides, *v_strides, *k_cache_strides, *v_cache_strides, positions_batch, positions_new, table_row, capacity,
           tokens, tokens_a_block, new, heads, units, pages, page_size, positions.element_size() == 8)
