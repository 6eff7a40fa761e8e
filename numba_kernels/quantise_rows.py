"""Activations in eight bits: values = x / scale rounded to int8 or float8 e4m3, scale = largest of a row / largest of the format.

x[rows, K], 16 bits, rows of any stride; with smooth[K], float32, x / smooth in its place. One block a row, which it reads twice, the
second time from the cache. Floor: (read of x + write of the values) / copy bandwidth.
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
from ftops.numba_kernels.linear_tile import aligned_x
from ftops.numba_kernels.narrow import NARROW_NAME, make_narrow
from ftops.numba_kernels.rows import DTYPE_NAME, make_convert

THREADS, WARPS, VEC = 256, 8, 8
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
MULTIPLE = 16  # columns of the values: whole accesses of the products that read them


@dataclass(frozen=True)
class Config:
    """dtype of x; narrow: int8 or float8_e4m3fn."""

    dtype: str
    narrow: str


def make(config: Config) -> Callable:
    unpack, _ = make_convert(config.dtype, VEC)
    narrow, largest, step = make_narrow(config.narrow, VEC), np.float32(LARGEST[config.narrow]), THREADS * VEC
    zero, one = np.float32(0), np.float32(1)
    x1, x2, x4, x8, x16 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))

    @cuda.jit(device=True, forceinline=True)
    def load(x_gl, smooth_gl, k, K, words, values):
        """Eight values of the row from k on; zeros past K."""
        words[0], words[1], words[2], words[3] = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
        if k < K:
            words[0], words[1], words[2], words[3] = ptx.ld_written_128(x_gl + 2 * k)
        unpack(words, 0, values, 0)
        if smooth_gl != 0 and k < K:
            for i in range(VEC):
                values[i] = ptx.divide_rn(values[i], ptx.ld_written_f32(smooth_gl + 4 * (k + i)))

    def quantise_rows(x_gl, smooth_gl, values_gl, scale_gl, x_stride, K, width):
        highest_sh = cuda.shared.array(WARPS, np.float32)
        thread, row = np.int32(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        x_gl, smooth_gl, values_gl = np.int64(x_gl) + 2 * row * x_stride, np.int64(smooth_gl), np.int64(values_gl) + row * width
        words = cuda.local.array(4, np.uint32)
        values = cuda.local.array(VEC, np.float32)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        highest = zero
        for k in range(VEC * thread, K, step):
            load(x_gl, smooth_gl, k, K, words, values)
            for i in range(VEC):
                highest = ptx.maximum(highest, abs(values[i]))
        highest = ptx.maximum(highest, x1(highest))
        highest = ptx.maximum(highest, x2(highest))
        highest = ptx.maximum(highest, x4(highest))
        highest = ptx.maximum(highest, x8(highest))
        highest = ptx.maximum(highest, x16(highest))
        if thread & 31 == 0:
            highest_sh[thread >> 5] = highest
        cuda.syncthreads()
        for i in range(WARPS):
            highest = ptx.maximum(highest, highest_sh[i])
        scale = ptx.divide_rn(highest, largest) if highest > zero else one
        if thread == 0:
            ptx.st_global_f32(np.int64(scale_gl) + 4 * row, scale)
        inverse = ptx.divide_rn(one, scale)
        for k in range(VEC * thread, width, step):
            load(x_gl, smooth_gl, k, K, words, values)
            for i in range(VEC):
                values[i] *= inverse
            narrow(values_gl + k, values, 0)

    return quantise_rows


def spec(config: Config) -> Spec:
    return Spec(make, config, "pppplii", threads=THREADS, min_blocks=4, dependent=True, halves=True)


def variants() -> Iterator[Spec]:
    for dtype in ("float16", "bfloat16"):
        for narrow in LARGEST:
            yield spec(Config(dtype, narrow))


@functools.cache
def _kernel(dtype: torch.dtype, narrow: torch.dtype, device: int) -> Kernel:
    return load(spec(Config(DTYPE_NAME[dtype], NARROW_NAME[narrow])), device)


def launch(x: torch.Tensor, narrow: torch.dtype, smooth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [rows, K up to a multiple of 16], scales float32 [rows]) of x[..., K]."""
    rows, width = x.numel() // x.shape[-1], -(-x.shape[-1] // MULTIPLE) * MULTIPLE
    x, stride, K = aligned_x(x, rows)
    values = torch.empty((rows, width), dtype=narrow, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    _kernel(x.dtype, narrow, x.device.index)(rows, 1, 1, x.data_ptr(), 0 if smooth is None else smooth.data_ptr(), values.data_ptr(),
                                            scales.data_ptr(), stride, K, width)
    return values, scales
