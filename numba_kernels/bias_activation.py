"""bias_activation on the GPU: y = act(x + bias), x[rows, length] of any row stride. See elementwise.py.

Floor: (read of x + write of y) / copy bandwidth; the bias comes from L2.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.activation import FORMS, make_activate
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.elementwise import THREADS, Config, blocks, configs, make_place, pick, tiling
from ftops.numba_kernels.launch import Kernel, empty_like, load, multiprocessors
from ftops.numba_kernels.rows import DTYPE_NAME, ITEM, make_convert, make_io, rows_of, widest, words_of

INPUTS = 1


def make(config: Config) -> Callable:
    vec, item, each = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec)
    most, kept = config.rows, config.rows * each
    fetch, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)
    place, activate = make_place(config), make_activate(vec)

    @cuda.jit(device=True, forceinline=True)
    def finish(y_at, y_step, count, apart, left, words, shifts, form, linear, cubic):
        values = cuda.local.array(vec, np.float32)
        for i in range(count):
            unpack(words, i * each, values, 0)
            for j in range(vec):
                values[j] += shifts[j]
            activate(values, form, linear, cubic)
            pack(values, 0, words, i * each)
            store(y_at, i * apart < left, words, i * each)
            y_at += y_step

    def bias_activation(x_gl, bias_gl, y_gl, x_stride, rows, length, shift, tiles, rows_each, form, linear, cubic):
        row, column, apart, left = place(shift, tiles, rows, length, rows_each)
        x_at, x_step = x_gl + np.uint64((row * x_stride + column) * item), np.uint64(apart * x_stride * item)
        y_at, y_step = y_gl + np.uint64((row * length + column) * item), np.uint64(apart * length * item)
        words = cuda.local.array(kept, np.uint32)
        biases = cuda.local.array(each, np.uint32)
        shifts = cuda.local.array(vec, np.float32)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        for i in range(most):
            fetch(x_at, i * apart < left, words, i * each)
            x_at += x_step
        fetch(bias_gl + np.uint64(column * item), left > 0 and bias_gl != np.uint64(0), biases, 0)
        unpack(biases, 0, shifts, 0)
        # Not a loop with an end in it: that kept the rows apart, at 5 % of the time.
        if rows_each == np.uint32(1):
            finish(y_at, y_step, 1, apart, left, words, shifts, form, linear, cubic)
        else:
            finish(y_at, y_step, most, apart, left, words, shifts, form, linear, cubic)

    return bias_activation


def spec(config: Config) -> Spec:
    return Spec(make, config, "pppllluuuiff", THREADS, min_blocks=4, dependent=True, halves=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    return map(spec, configs(INPUTS))


@functools.cache
def _kernel(dtype: torch.dtype, length: int, vec: int, device: int) -> tuple[Kernel, int, int, int]:
    return load(spec(pick(DTYPE_NAME[dtype], vec, INPUTS)), device), *tiling(length, vec), multiprocessors(device)


def launch(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    length = x.shape[-1]
    y = empty_like(x)
    if x.numel() == 0:
        return y
    x, stride = rows_of(x)
    bias_at = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    item, x_at = x.element_size(), x.data_ptr()
    vec = widest(item, (length | stride) * item | x_at | bias_at)
    kernel, shift, tiles, processors = _kernel(x.dtype, length, vec, x.device.index)
    rows = x.numel() // length
    count, rows_each = blocks(rows, shift, tiles, kernel.spec.config.rows, processors)
    kernel(count, 1, 1, x_at, bias_at, y.data_ptr(), stride, rows, length, shift, tiles, rows_each, *FORMS[kind])
    return y
