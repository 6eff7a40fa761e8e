"""append_kv on the GPU: cache[row, slot] = k[b, t] for keys and values, quantised on the way where the cache has 8 bits.

A thread moves 16 bytes of a key or value (one element where addresses or strides do not allow that); a block takes whole tokens of keys
(y = 0) or of values (y = 1). Quantising divides by the scale, as the reference does: a product with its reciprocal rounds otherwise.
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
from ftops.numba_kernels.narrow import make_narrow
from ftops.numba_kernels.rows import DTYPE_NAME, ITEM, make_convert, make_io, words_of

SIGNATURE = "pppppppp" + "llll" * 4 + "lll" + "l" + "iiiiiii"
CACHES_8BIT = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}
THREADS = 256


@dataclass(frozen=True)
class Config:
    """dtype of k and v; cache: that of the cache, or "same" (then float16 stands for bfloat16 too); vec: elements a thread moves."""

    dtype: str
    cache: str
    vec: int


def pick(dtype: torch.dtype, cache: torch.dtype, wide: bool) -> Config:
    """wide: 16 bytes of k and v are one access, and so is what becomes of them in the cache."""
    narrow = CACHES_8BIT.get(cache, "same")
    name = "float16" if narrow == "same" and dtype is torch.bfloat16 else DTYPE_NAME[dtype]
    return Config(name, narrow, 16 // ITEM[name] if wide else 1)


def make(config: Config) -> Callable:
    vec, item, n_words, quantises = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), config.cache != "same"
    cache_item = 1 if quantises else item
    fetch, copy = make_io(config.dtype, vec)
    unpack, _ = make_convert(config.dtype, vec)
    narrow = make_narrow(config.cache, vec) if quantises else None

    def append_kv(k_gl, v_gl, k_cache_gl, v_cache_gl, positions_gl, table_gl, k_scale_gl, v_scale_gl, k_batch, k_new, k_head, k_dense,
                  v_batch, v_new, v_head, v_dense, k_page, k_slot, k_cache_head, k_cache_dense, v_page, v_slot, v_cache_head, v_cache_dense,
                  positions_batch, positions_new, table_row, capacity, tokens, new, heads, units, pages, page_size, wide_positions):
        ptx.launch_dependents()
        x_gl, cache_gl, scale_gl = np.int64(k_gl), np.int64(k_cache_gl), np.int64(k_scale_gl)
        if cuda.blockIdx.y == 1:
            x_gl, cache_gl, scale_gl = np.int64(v_gl), np.int64(v_cache_gl), np.int64(v_scale_gl)
            k_batch, k_new, k_head, k_dense = v_batch, v_new, v_head, v_dense
            k_page, k_slot, k_cache_head, k_cache_dense = v_page, v_slot, v_cache_head, v_cache_dense
        words = cuda.local.array(n_words, np.uint32)
        values = cuda.local.array(vec, np.float32)
        a_token = heads * units
        tokens_a_block = max(np.int32(1), np.int32(ptx.div_u32(THREADS, a_token)))
        for turn in range(np.int32(cuda.threadIdx.x), tokens_a_block * a_token, THREADS):
            in_block = np.int64(ptx.div_u32(turn, a_token))
            in_token = turn - in_block * a_token
            token, head = np.int64(cuda.blockIdx.x) * tokens_a_block + in_block, np.int64(ptx.div_u32(in_token, units))
            if token < tokens:
                batch, element = np.int64(ptx.div_u32(token, new)), (in_token - head * units) * vec
                fetch(x_gl + item * (batch * k_batch + (token - batch * new) * k_new + head * k_head + element * k_dense), 1, words, 0)
                at = batch * positions_batch + (token - batch * new) * positions_new
                if wide_positions != 0:
                    position = np.int64(ptx.ld_global_u64(np.int64(positions_gl) + 8 * at))
                else:
                    position = np.int64(np.int32(ptx.ld_global_32(np.int64(positions_gl) + 4 * at)))
                if position >= 0 and position < capacity:
                    page, slot = batch, position
                    if table_gl != 0:
                        index = np.int64(ptx.div_u32(position, page_size))
                        page = np.int64(ptx.ld_global_32(np.int64(table_gl) + 4 * (batch * table_row + index)))
                        slot = position - index * page_size
                    if page < pages:  # unsigned: a page below 0 is far above
                        to = cache_gl + cache_item * (page * k_page + slot * k_slot + head * k_cache_head + element * k_cache_dense)
                        if quantises:
                            scale = ptx.ld_global_f32(scale_gl + 4 * head)
                            unpack(words, 0, values, 0)
                            for i in range(vec):
                                values[i] = ptx.divide_rn(values[i], scale)
                            narrow(to, values)
                        else:
                            copy(to, 1, words, 0)

    return append_kv


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=THREADS)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for wide in (True, False):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for cache in CACHES_8BIT:
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
    tokens_a_block = max(1, THREADS // (heads * units))
    kernel(-(-tokens // tokens_a_block), 2, 1, k_at, v_at, k_cache_at, v_cache_at, positions.data_ptr(), table_at, k_scale_at,
           v_scale_at, *k_strides, *v_strides, *k_cache_strides, *v_cache_strides, positions_batch, positions_new, table_row, capacity,
           tokens, new, heads, units, pages, page_size, positions.element_size() == 8)
