"""rms_norm on the GPU: y = s * rsqrt(mean(s^2) + eps) * (offset + weight), s = x + residual rounded to the dtype.

A group of threads a row, see row_tile.py.
Floor: (reads of x and residual + writes of y and s) / copy bandwidth.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, empty_like, load
from ftops.numba_kernels.row_tile import FEW_ROWS, Config, configs, make_tile, pick
from ftops.numba_kernels.rows import DTYPE_NAME, ITEM, make_convert, make_io, make_sum, rows_of, rsqrt, widest, words_of

SIGNATURE = "pppppllllfff"


def make(config: Config) -> Callable:
    vec, item, each, accesses = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), config.accesses
    kept, step, tile, reread = each * accesses, config.threads * vec, config.threads * vec * accesses, config.reread
    _, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)
    place, within, fetch, gather, prefetch = make_tile(config)
    total, _ = make_sum(config.threads)

    @cuda.jit(device=True, forceinline=True)
    def squares(words):
        values = cuda.local.array(vec, np.float32)
        square = np.float32(0)
        for access in range(accesses):
            unpack(words, access * each, values, 0)
            for i in range(vec):
                square = ptx.fma(values[i], values[i], square)
        return square

    @cuda.jit(device=True, forceinline=True)
    def scatter(y_at, left, words, weights, scale, offset):
        values = cuda.local.array(vec, np.float32)
        factors = cuda.local.array(vec, np.float32)
        for access in range(accesses):
            unpack(words, access * each, values, 0)
            unpack(weights, access * each, factors, 0)
            for i in range(vec):
                values[i] = values[i] * scale * (offset + factors[i])
            pack(values, 0, words, access * each)
            store(y_at + np.uint64(access * step * item), access * step < left, words, access * each)

    def rms_norm(x_gl, residual_gl, weight_gl, y_gl, sum_gl, x_stride, residual_stride, rows, length, over_length, eps, offset):
        row, first, remains = place(rows, length)
        x_at = x_gl + np.uint64((row * x_stride + first) * item)
        y_at = y_gl + np.uint64((row * length + first) * item)
        weight_at = weight_gl + np.uint64(first * item)
        residual_at, sum_at = residual_gl, sum_gl
        if residual_gl != np.uint64(0):
            residual_at += np.uint64((row * residual_stride + first) * item)
            sum_at += np.uint64((row * length + first) * item)
        words = cuda.local.array(kept, np.uint32)
        weights = cuda.local.array(kept, np.uint32)
        if reread:
            ptx.wait_for_primary()
            square = np.float32(0)
            for done in range(0, remains, tile):
                gather(x_at, residual_at, sum_at, done, within(remains - done), words)
                square += squares(words)
            scale = rsqrt(ptx.fma(total(square), over_length, eps))
            for done in range(0, remains, tile):
                left, ahead = within(remains - done), np.uint64(done * item)
                gather(x_at, residual_at, np.uint64(0), done, left, words)
                fetch(weight_at + ahead, left, weights)
                scatter(y_at + ahead, left, words, weights, scale, offset)
        else:
            left = within(remains)
            if rows <= FEW_ROWS:
                prefetch(weight_at, left)
            ptx.wait_for_primary()
            ptx.launch_dependents()
            gather(x_at, residual_at, sum_at, 0, left, words)
            fetch(weight_at, left, weights)
            scale = rsqrt(ptx.fma(total(squares(words)), over_length, eps))
            scatter(y_at, left, words, weights, scale, offset)

    return rms_norm


def spec(config: Config) -> Spec:
    threads = config.threads * config.rows
    # Two blocks of a long row would spill on sm_120.
    return Spec(make, config, SIGNATURE, threads, min_blocks=1 if config.reread else 1024 // threads, dependent=True,
                halves=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    return map(spec, configs())


@functools.cache
def _kernel(dtype: torch.dtype, length: int, vec: int, device: int) -> tuple[Kernel, int]:
    config = pick(DTYPE_NAME[dtype], length, vec)
    return load(spec(config), device), config.rows


def launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
           offset: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    length = x.shape[-1]
    y = empty_like(x)
    total = None if residual is None else empty_like(y)
    if x.numel() == 0:
        return y, total
    x, x_stride = rows_of(x)
    weight = weight.contiguous()
    item = x.element_size()
    x_at, weight_at, y_at = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    if residual is None:
        residual_at, residual_stride, total_at = 0, 0, 0
    else:
        residual, residual_stride = rows_of(residual)
        residual_at, total_at = residual.data_ptr(), total.data_ptr()
    vec = widest(item, (length | x_stride | residual_stride) * item | x_at | weight_at | residual_at)
    kernel, rows_a_block = _kernel(x.dtype, length, vec, x.device.index)
    rows = x.numel() // length
    kernel(-(-rows // rows_a_block), 1, 1, x_at, residual_at, weight_at, y_at, total_at, x_stride, residual_stride, rows, length,
           1 / length, eps, offset)
    return y, total
