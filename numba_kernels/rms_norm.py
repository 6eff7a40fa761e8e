"""rms_norm on the GPU: y = s * rsqrt(mean(s^2) + eps) * (offset + weight), s = x + residual.

One block a row (one warp for short rows, several rows a block). A row of up to chunks * 32 * warps * vec elements stays in registers between
the sum and the scaling, so memory is read once; longer rows are read twice, the second time from L2.
Floor: (reads of x and residual + writes of y and s) / copy bandwidth.
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
from ftops.numba_kernels.rows import DTYPE_NAME, ITEM, make_block_sum, make_io, rows_of, widest

SIGNATURE = "ppppplliiff"


@dataclass(frozen=True)
class Config:
    """dtype; vec: elements an access; warps: warps a row; rows: rows a block; chunks: accesses a thread keeps, 0 = reread."""

    dtype: str
    vec: int
    warps: int
    rows: int
    chunks: int


def pick(dtype: str, length: int, vec: int) -> Config:
    """A warp a row up to 2 KiB, so that nothing waits for a barrier; 8 warps beyond; the accesses of a thread are all in flight at once."""
    accesses = -(-length // vec)
    if vec * ITEM[dtype] < 16:  # rows that 16-byte accesses do not fit: rare, one variant each
        return Config(dtype, 1, 1, 4, 0) if length <= 512 else Config(dtype, 1, 8, 1, 0)
    if accesses <= 128:
        return Config(dtype, vec, 1, 4, 1 if accesses <= 32 else 2 if accesses <= 64 else 4)
    if accesses <= 1024:
        return Config(dtype, vec, 8, 1, 1 if accesses <= 256 else 2 if accesses <= 512 else 4)
    return Config(dtype, vec, 16, 1, 4 if accesses <= 2048 else 0)


def make(config: Config) -> Callable:
    vec, chunks, kept = config.vec, max(config.chunks, 1), config.vec * max(config.chunks, 1)
    item, width = ITEM[config.dtype], 32 * config.warps
    reread = config.chunks == 0
    fetch, put = make_io(config.dtype, vec)
    block_sum = make_block_sum(config.warps)
    rows_a_block = config.rows

    @cuda.jit(device=True, forceinline=True)
    def gather(x_row, residual_row, sum_row, at, values, slot):
        """values[slot:] = the elements at `at`, x + residual rounded to the dtype and written out."""
        offset = np.uint64(at) * np.uint64(item)
        fetch(x_row + offset, values, slot)
        if residual_row != np.uint64(0):
            other = cuda.local.array(vec, np.float32)
            fetch(residual_row + offset, other, 0)
            for i in range(vec):
                values[slot + i] += other[i]
            put(sum_row + offset, values, slot)

    def rms_norm(x_gl, residual_gl, weight_gl, y_gl, sum_gl, x_stride, residual_stride, rows, length, eps, offset):
        thread = np.int32(cuda.threadIdx.x)
        row = np.int64(cuda.blockIdx.x) * np.int64(rows_a_block) + np.int64(thread // np.int32(width))
        lane = thread % np.int32(width)
        if row < rows:
            x_row = x_gl + np.uint64(row * x_stride * np.int64(item))
            residual_row = residual_gl
            if residual_gl != np.uint64(0):
                residual_row += np.uint64(row * residual_stride * np.int64(item))
            y_row = y_gl + np.uint64(row * np.int64(length) * np.int64(item))
            sum_row = sum_gl + np.uint64(row * np.int64(length) * np.int64(item))
            values = cuda.local.array(kept, np.float32)
            weights = cuda.local.array(vec, np.float32)
            square = np.float32(0)
            step = np.int32(width * vec)
            if reread:
                for at in range(lane * np.int32(vec), length, step):
                    gather(x_row, residual_row, sum_row, at, values, 0)
                    for i in range(vec):
                        square = ptx.fma(values[i], values[i], square)
            else:
                for chunk in range(chunks):
                    at = lane * np.int32(vec) + np.int32(chunk) * step
                    for i in range(vec):
                        values[chunk * vec + i] = np.float32(0)
                    if at < length:
                        gather(x_row, residual_row, sum_row, at, values, chunk * vec)
                    for i in range(vec):
                        square = ptx.fma(values[chunk * vec + i], values[chunk * vec + i], square)
            scale = ptx.rsqrt(block_sum(square) * ptx.reciprocal(np.float32(length)) + eps)
            if reread:
                for at in range(lane * np.int32(vec), length, step):
                    address = np.uint64(at) * np.uint64(item)
                    fetch(weight_gl + address, weights, 0)
                    if residual_gl != np.uint64(0):
                        fetch(sum_row + address, values, 0)
                    else:
                        fetch(x_row + address, values, 0)
                    for i in range(vec):
                        values[i] = values[i] * scale * (offset + weights[i])
                    put(y_row + address, values, 0)
            else:
                for chunk in range(chunks):
                    at = lane * np.int32(vec) + np.int32(chunk) * step
                    if at < length:
                        address = np.uint64(at) * np.uint64(item)
                        fetch(weight_gl + address, weights, 0)
                        for i in range(vec):
                            values[chunk * vec + i] = values[chunk * vec + i] * scale * (offset + weights[i])
                        put(y_row + address, values, chunk * vec)

    return rms_norm


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=32 * config.warps * config.rows)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype, item in ITEM.items():
        vec = 16 // item
        picked = [pick(dtype, accesses * vec, vec) for accesses in (32, 64, 128, 256, 512, 1024, 2048, 4096)]
        yield from (spec(config) for config in [*picked, pick(dtype, 512, 1), pick(dtype, 513, 1)])


@functools.cache
def _kernel(dtype: torch.dtype, length: int, vec: int, device: int) -> tuple[Kernel, int]:
    config = pick(DTYPE_NAME[dtype], length, vec)
    return load(spec(config), device), config.rows


def launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
           offset: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    length = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
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
    vec = widest(item, length, x_at | weight_at | residual_at, x_stride * item, residual_stride * item)
    kernel, rows_a_block = _kernel(x.dtype, length, vec, x.device.index)
    rows = x.numel() // length
    kernel(-(-rows // rows_a_block), 1, 1, x_at, residual_at, weight_at, y_at, total_at, x_stride, residual_stride, rows, length, eps, offset)
    return y, total
