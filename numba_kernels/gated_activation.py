"""gated_activation on the GPU: y = act(x[..., :I]) * x[..., I:], x[rows, 2 I] of any row stride. See elementwise.py.

Floor: (read of x + write of y) / copy bandwidth.
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
from ftops.numba_kernels.launch import Kernel, load, multiprocessors
from ftops.numba_kernels.rows import DTYPE_NAME, ITEM, make_convert, make_io, rows_of, widest, words_of

INPUTS = 2  # loads for an access of the result


def make(config: Config) -> Callable:
    vec, item, each = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec)
    most, kept = config.rows, config.rows * each
    fetch, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)
    place, activate = make_place(config), make_activate(vec)

    def gated_activation(x_gl, y_gl, x_stride, rows, length, shift, tiles, rows_each, form, linear, cubic):
        row, column, apart, left = place(shift, tiles, rows, length, rows_each)
        x_at, x_step = x_gl + np.uint64((row * x_stride + column) * item), np.uint64(apart * x_stride * item)
        y_at, y_step = y_gl + np.uint64((row * length + column) * item), np.uint64(apart * length * item)
        gates = cuda.local.array(kept, np.uint32)
        ups = cuda.local.array(kept, np.uint32)
        values = cuda.local.array(vec, np.float32)
        factors = cuda.local.array(vec, np.float32)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        for i in range(most):
            fetch(x_at, i * apart < left, gates, i * each)
            fetch(x_at + np.uint64(length * item), i * apart < left, ups, i * each)
            x_at += x_step
        for i in range(most):
            if i >= rows_each:
                break
            unpack(gates, i * each, values, 0)
            activate(values, form, linear, cubic)
            unpack(ups, i * each, factors, 0)
            for j in range(vec):
                values[j] *= factors[j]
            pack(values, 0, gates, i * each)
            store(y_at, i * apart < left, gates, i * each)
            y_at += y_step

    return gated_activation


def spec(config: Config) -> Spec:
    return Spec(make, config, "ppllluuuiff", THREADS, min_blocks=4, dependent=True, halves=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    return map(spec, configs(INPUTS))


@functools.cache
def _kernel(dtype: torch.dtype, length: int, vec: int, device: int) -> tuple[Kernel, int, int, int]:
    return load(spec(pick(DTYPE_NAME[dtype], vec, INPUTS)), device), *tiling(length, vec), multiprocessors(device)


def launch(x: torch.Tensor, kind: str) -> torch.Tensor:
    length = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], length))
    if x.numel() == 0:
        return y
    x, stride = rows_of(x)
    item, x_at = x.element_size(), x.data_ptr()
    vec = widest(item, (length | stride) * item | x_at)
    kernel, shift, tiles, processors = _kernel(x.dtype, length, vec, x.device.index)
    rows = y.numel() // length
    count, rows_each = blocks(rows, shift, tiles, kernel.spec.config.rows, processors)
    kernel(count, 1, 1, x_at, y.data_ptr(), stride, rows, length, shift, tiles, rows_each, *FORMS[kind])
    return y
