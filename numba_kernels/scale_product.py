"""The end of a product of 8-bit integers: out = act(acc * x_scale * w_scale + bias) + residual, from int32 sums to 16 bits.

acc[rows, N], x_scale[rows] and w_scale[N] float32; N a multiple of 8. A thread takes eight neighbouring columns of one row.
Floor: (read of acc and residual + write of out) / copy bandwidth.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.activation import make_activate
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, load
from ftops.numba_kernels.linear_tile import form_of
from ftops.numba_kernels.rows import DTYPE_NAME, make_convert, rows_of

THREADS, VEC = 256, 8


@dataclass(frozen=True)
class Config:
    """dtype of out, bias and residual."""

    dtype: str


def make(config: Config) -> Callable:
    unpack, pack = make_convert(config.dtype, VEC)
    activate = make_activate(VEC)

    def scale_product(acc_gl, x_scale_gl, w_scale_gl, bias_gl, residual_gl, out_gl, residual_stride, N, blocks_a_row, form, linear, cubic):
        block = np.uint32(cuda.blockIdx.x)
        row = np.int64(ptx.div_u32(block, blocks_a_row))
        column = np.int64(VEC * (THREADS * (np.int64(block) - row * blocks_a_row) + np.int64(cuda.threadIdx.x)))
        words = cuda.local.array(4, np.uint32)
        values = cuda.local.array(VEC, np.float32)
        more = cuda.local.array(VEC, np.float32)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        if column < N:
            acc_gl = np.int64(acc_gl) + 4 * (row * N + column)
            w_scale_gl = np.int64(w_scale_gl) + 4 * column
            first, second = ptx.ld_written_128(acc_gl), ptx.ld_written_128(acc_gl + 16)
            first_scales, second_scales = ptx.ld_written_128(w_scale_gl), ptx.ld_written_128(w_scale_gl + 16)
            x_scale = ptx.ld_written_f32(np.int64(x_scale_gl) + 4 * row)
            for i in range(4):
                values[i] = np.float32(np.int32(first[i])) * x_scale * ptx.bits_f32(first_scales[i])
                values[4 + i] = np.float32(np.int32(second[i])) * x_scale * ptx.bits_f32(second_scales[i])
            if bias_gl != 0:
                words[0], words[1], words[2], words[3] = ptx.ld_written_128(np.int64(bias_gl) + 2 * column)
                unpack(words, 0, more, 0)
                for i in range(VEC):
                    values[i] += more[i]
            if form >= 0:
                activate(values, form, linear, cubic)
            if residual_gl != 0:
                at = np.int64(residual_gl) + 2 * (row * residual_stride + column)
                words[0], words[1], words[2], words[3] = ptx.ld_written_128(at)
                unpack(words, 0, more, 0)
                for i in range(VEC):
                    values[i] += more[i]
            pack(values, 0, words, 0)
            ptx.st_global_128(np.int64(out_gl) + 2 * (row * N + column), words[0], words[1], words[2], words[3])

    return scale_product


def spec(config: Config) -> Spec:
    return Spec(make, config, "pppppplluiff", threads=THREADS, min_blocks=4, dependent=True, halves=True)


def variants() -> Iterator[Spec]:
    for dtype in ("float16", "bfloat16"):
        yield spec(Config(dtype))


@functools.cache
def _kernel(dtype: torch.dtype, device: int) -> Kernel:
    return load(spec(Config(DTYPE_NAME[dtype])), device)


def launch(acc: torch.Tensor, x_scales: torch.Tensor, w_scales: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None,
           activation: str | None, residual: torch.Tensor | None) -> torch.Tensor:
    """[rows, N] of `dtype`; residual as [..., N] of as many rows."""
    rows, N = acc.shape
    out = torch.empty((rows, N), dtype=dtype, device=acc.device)
    bias_at = residual_at = residual_stride = 0
    if bias is not None:
        bias = bias.clone() if bias.stride(0) != 1 or bias.data_ptr() & 15 else bias
        bias_at = bias.data_ptr()
    if residual is not None:
        residual, residual_stride = rows_of(residual)
        if residual.data_ptr() & 15 or residual_stride & 7:
            residual, residual_stride = residual.clone(memory_format=torch.contiguous_format), N
        residual_at = residual.data_ptr()
    blocks_a_row = -(-N // (THREADS * VEC))
    _kernel(dtype, acc.device.index)(rows * blocks_a_row, 1, 1, acc.data_ptr(), x_scales.data_ptr(), w_scales.data_ptr(), bias_at,
                                     residual_at, out.data_ptr(), residual_stride, N, blocks_a_row, *form_of(activation))
    return out
