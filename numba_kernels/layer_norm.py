"""layer_norm on the GPU: y = (s - mean(s)) * rsqrt(var(s) + eps) * weight + bias, s = x + residual rounded to the dtype.

A group of threads a row, see row_tile.py. The variance is that of the centred values, from the registers: s * s would lose rows far
from zero.
Floor: (reads of x and residual + writes of y and, where it is kept, s) / copy bandwidth.
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

SIGNATURE = "ppppppllllfff"


def make(config: Config) -> Callable:
    vec, item, each, accesses = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), config.accesses
    kept, step, tile, reread = each * accesses, config.threads * vec, config.threads * vec * accesses, config.reread
    half = accesses if accesses % 2 else accesses // 2
    half_kept = each * half
    load_access, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)
    place, within, fetch, gather, prefetch = make_tile(config)
    (total, _), (_, totals) = make_sum(config.threads), make_sum(config.threads)

    @cuda.jit(device=True, forceinline=True)
    def add_up(words):
        """The sum of a tile; what lies beyond the row is 0."""
        values = cuda.local.array(vec, np.float32)
        result = np.float32(0)
        for access in range(accesses):
            unpack(words, access * each, values, 0)
            for i in range(vec):
                result += values[i]
        return result

    @cuda.jit(device=True, forceinline=True)
    def moments(words, left, mean):
        """(sum of s - mean, sum of its square) of a tile."""
        values = cuda.local.array(vec, np.float32)
        rest, square = np.float32(0), np.float32(0)
        for access in range(accesses):
            unpack(words, access * each, values, 0)
            centre = mean if access * step < left else np.float32(0)
            for i in range(vec):
                centred = values[i] - centre
                rest += centred
                square = ptx.fma(centred, centred, square)
        return rest, square

    @cuda.jit(device=True, forceinline=True)
    def scale_of(rest, square, mean, over_length, eps):
        """(mean, 1 / deviation, what is yet to be added to (s - mean) / deviation), from the sums of s - mean and of its square.

        The mean is rounded: its rest is taken off too, and the square of that from the variance.
        """
        rest, square = totals(rest, square)
        rest *= over_length
        scale = rsqrt(ptx.fma(-rest, rest, square * over_length) + eps)
        better = mean + rest
        return better, scale, (better - mean - rest) * scale

    @cuda.jit(device=True, forceinline=True)
    def scatter(y_at, weight_at, weight_left, bias_at, bias_left, left, words, mean, scale, shift, unit):
        weights = cuda.local.array(kept, np.uint32)
        biases = cuda.local.array(half_kept, np.uint32)
        values = cuda.local.array(vec, np.float32)
        factors = cuda.local.array(vec, np.float32)
        shifts = cuda.local.array(vec, np.float32)
        fetch(weight_at, weight_left, weights)  # before the first store, which no load passes; of the bias all would spill
        for begin in range(0, accesses, half):
            for i in range(half):
                access = begin + i
                load_access(bias_at + np.uint64(access * step * item), access * step < bias_left, biases, i * each)
            for i in range(half):
                access = begin + i
                unpack(weights, access * each, factors, 0)
                unpack(biases, i * each, shifts, 0)
                unpack(words, access * each, values, 0)
                for j in range(vec):
                    values[j] = ptx.fma(ptx.fma(values[j] - mean, scale, shift), unit + factors[j], shifts[j])
                pack(values, 0, words, access * each)
                store(y_at + np.uint64(access * step * item), access * step < left, words, access * each)

    def layer_norm(x_gl, residual_gl, weight_gl, bias_gl, y_gl, sum_gl, x_stride, residual_stride, rows, length, over_length, eps, unit):
        row, first, remains = place(rows, length)
        x_at = x_gl + np.uint64((row * x_stride + first) * item)
        y_at = y_gl + np.uint64((row * length + first) * item)
        residual_at, sum_at = residual_gl, sum_gl
        if residual_gl != np.uint64(0):
            residual_at += np.uint64((row * residual_stride + first) * item)
        if sum_gl != np.uint64(0):
            sum_at += np.uint64((row * length + first) * item)
        weight_at, bias_at = weight_gl + np.uint64(first * item), bias_gl + np.uint64(first * item)
        words = cuda.local.array(kept, np.uint32)
        if reread:
            ptx.wait_for_primary()
            # The mean of the first tile is near enough to centre all: its error squared is at most length / tile of the variance.
            gather(x_at, residual_at, np.uint64(0), 0, within(remains), words)
            mean = total(add_up(words)) * np.float32(1 / tile)
            rest, square = np.float32(0), np.float32(0)
            for done in range(0, remains, tile):
                gather(x_at, residual_at, sum_at, done, within(remains - done), words)
                more_rest, more_square = moments(words, within(remains - done), mean)
                rest += more_rest
                square += more_square
            mean, scale, shift = scale_of(rest, square, mean, over_length, eps)
            for done in range(0, remains, tile):
                left, ahead = within(remains - done), np.uint64(done * item)
                gather(x_at, residual_at, np.uint64(0), done, left, words)
                scatter(y_at + ahead, weight_at + ahead, left if weight_gl != np.uint64(0) else np.int32(0), bias_at + ahead,
                        left if bias_gl != np.uint64(0) else np.int32(0), left, words, mean, scale, shift, unit)
        else:
            left = within(remains)
            weight_left = left if weight_gl != np.uint64(0) else np.int32(0)
            bias_left = left if bias_gl != np.uint64(0) else np.int32(0)
            if rows <= FEW_ROWS:
                prefetch(weight_at, weight_left)
                prefetch(bias_at, bias_left)
            ptx.wait_for_primary()
            ptx.launch_dependents()
            gather(x_at, residual_at, sum_at, 0, left, words)
            mean = total(add_up(words)) * over_length
            rest, square = moments(words, left, mean)
            mean, scale, shift = scale_of(rest, square, mean, over_length, eps)
            scatter(y_at, weight_at, weight_left, bias_at, bias_left, left, words, mean, scale, shift, unit)

    return layer_norm


def spec(config: Config) -> Spec:
    threads = config.threads * config.rows
    # Two blocks of a long row would spill on sm_120, more than 512 threads with 16 accesses on sm_90a.
    resident = threads if config.reread else 1024 if config.vec > 1 else 512
    return Spec(make, config, SIGNATURE, threads, min_blocks=resident // threads, dependent=True, halves=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    return map(spec, configs())


@functools.cache
def _kernel(dtype: torch.dtype, length: int, vec: int, device: int) -> tuple[Kernel, int]:
    config = pick(DTYPE_NAME[dtype], length, vec)
    return load(spec(config), device), config.rows


def launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
           eps: float, keep_sum: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, x + residual); without keep_sum or a residual y alone."""
    length = x.shape[-1]
    y = empty_like(x)
    total = None if residual is None or not keep_sum else empty_like(y)
    if x.numel() == 0:
        return y, total
    x, x_stride = rows_of(x)
    item = x.element_size()
    residual_at = residual_stride = total_at = weight_at = bias_at = 0
    if residual is not None:
        residual, residual_stride = rows_of(residual)
        residual_at, total_at = residual.data_ptr(), 0 if total is None else total.data_ptr()
    if weight is not None:
        weight = weight.contiguous()
        weight_at = weight.data_ptr()
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    x_at = x.data_ptr()
    vec = widest(item, (length | x_stride | residual_stride) * item | x_at | weight_at | bias_at | residual_at)
    kernel, rows_a_block = _kernel(x.dtype, length, vec, x.device.index)
    rows = x.numel() // length
    kernel(-(-rows // rows_a_block), 1, 1, x_at, residual_at, weight_at, bias_at, y.data_ptr(), total_at, x_stride, residual_stride,
           rows, length, 1 / length, eps, 1.0 if weight is None else 0.0)
    return y, total
