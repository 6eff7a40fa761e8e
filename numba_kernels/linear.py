"""linear on the GPU for few rows of x: out = act(x W^T + bias) + residual, one pass over 16-bit weights W[N, K] as they lie. sm_80 and up.

A block takes 16 rows of W and splits K over its warps (see linear_tile.py). On sm_90 its first bytes are asked into L2 while the kernel
before still runs; the copies themselves wait for its end, so that weights which that kernel writes are read as they should be.
Floor: bytes of the weights / read bandwidth.
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
from ftops.numba_kernels.linear_tile import STAGE_BYTES, form_of, make_finish
from ftops.numba_kernels.rows import DTYPE_NAME, rows_of

MAX_ROWS = 16
TILE_ROWS, STAGE_K = 16, 64  # rows of W a block, values of K a stage of a warp


@dataclass(frozen=True)
class Config:
    """dtype; batch: rows of x that the fragments hold, 8 or 16; warps of a block, stages of a warp's ring."""

    dtype: str
    batch: int
    warps: int = 4
    stages: int = 4


def pick(dtype: str, rows: int) -> Config:
    return Config(dtype, 8 if rows <= 8 else 16)


def make(config: Config) -> Callable:
    warps, stages, batch_tiles = config.warps, config.stages, config.batch // 8
    warp_bytes, last_stage, step_k = stages * STAGE_BYTES, stages - 1, STAGE_K * warps
    n_acc, n_at, ring_row_bytes, step_shift = 4 * batch_tiles, batch_tiles, 2 * step_k * stages, step_k.bit_length() - 1
    mma, wait_for_oldest, zero = ptx.MMA[config.dtype], ptx.CP_ASYNC_WAIT[last_stage], np.float32(0)
    nothing = np.uint32(0)
    finish = make_finish(config.dtype, config.batch, TILE_ROWS, warps, warp_bytes)

    @cuda.jit(device=True, forceinline=True)
    def copy(stage_sh, low_gl, high_gl, left):
        """Rows g and g + 8 of W, 64 values of k of the warp's; beyond K zeros."""
        first, second = np.uint32(16 if left > 0 else 0), np.uint32(16 if left > 32 else 0)
        ptx.cp_async_16(stage_sh, low_gl, first)
        ptx.cp_async_16(stage_sh + 512, high_gl, first)
        ptx.cp_async_16(stage_sh + 1024, low_gl + 64, second)
        ptx.cp_async_16(stage_sh + 1536, high_gl + 64, second)

    def linear(x_gl, w_gl, bias_gl, residual_gl, out_gl, x_stride, w_stride, residual_stride, rows, N, K, form, linear, cubic):
        shared_sh = np.int32(ptx.shared_address(cuda.shared.array(0, np.uint8)))
        thread = np.int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        first, last = TILE_ROWS * np.int32(cuda.blockIdx.x), N - 1
        w_gl = np.int64(w_gl)
        if thread < TILE_ROWS and first + thread <= last:
            ptx.prefetch_l2_bulk(w_gl + 2 * w_stride * (first + thread), min(2 * K, ring_row_bytes))
        k = STAGE_K * warp + 8 * t
        steps, left = (K - STAGE_K * warp + step_k - 1) >> step_shift, K - k
        low_gl = w_gl + 2 * (w_stride * min(first + g, last) + k)  # rows past the last are its copies, and not stored
        high_gl = w_gl + 2 * (w_stride * min(first + g + 8, last) + k)
        ring_sh = shared_sh + warp * warp_bytes + 16 * lane
        x_at = cuda.local.array(n_at, np.int64)
        acc = cuda.local.array(n_acc, np.float32)
        for i in range(n_acc):
            acc[i] = zero
        for j in range(batch_tiles):
            x_at[j] = np.int64(x_gl) + 2 * (x_stride * min(g + 8 * j, rows - 1) + k)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        for i in range(last_stage):
            if i < steps:
                copy(ring_sh + STAGE_BYTES * i, low_gl, high_gl, left - i * step_k)
                low_gl += 2 * step_k
                high_gl += 2 * step_k
            ptx.cp_async_commit()
        filling, using = np.int32(last_stage), np.int32(0)
        for step in range(steps):
            if step + last_stage < steps:
                copy(ring_sh + STAGE_BYTES * filling, low_gl, high_gl, left - last_stage * step_k)
                low_gl += 2 * step_k
                high_gl += 2 * step_k
                filling = np.int32(0) if filling == last_stage else np.int32(filling + 1)
            ptx.cp_async_commit()
            wait_for_oldest()
            stage_sh = ring_sh + STAGE_BYTES * using
            using = np.int32(0) if using == last_stage else np.int32(using + 1)
            for piece in range(2):
                low, high = ptx.ld_shared_128(stage_sh + 1024 * piece), ptx.ld_shared_128(stage_sh + 1024 * piece + 512)
                for j in range(batch_tiles):
                    x = (nothing, nothing, nothing, nothing)
                    if left > 32 * piece:
                        x = ptx.ld_written_128(x_at[j] + 64 * piece)
                    mma(acc, 4 * j, low[0], high[0], low[1], high[1], x[0], x[1])
                    mma(acc, 4 * j, low[2], high[2], low[3], high[3], x[2], x[3])
            left -= step_k
            for j in range(batch_tiles):
                x_at[j] += 2 * step_k
        finish(acc, shared_sh, thread, first, 0, rows, N, np.int64(bias_gl), np.int64(residual_gl), residual_stride, np.int64(out_gl),
               form, linear, cubic)

    return linear


def spec(config: Config) -> Spec:
    return Spec(make, config, "ppppplll" + "iiiiff", threads=32 * config.warps, shared_bytes=config.warps * config.stages * STAGE_BYTES,
                min_blocks=4, dependent=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype in ("float16", "bfloat16"):
        for rows in (8, 16):
            yield spec(pick(dtype, rows))


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this kernel is for x[..., K] and weight[N, K]: up to MAX_ROWS rows, rows of 16 bytes from 16-byte boundaries."""
    N, K = weight.shape
    stride, dense = weight.stride()
    return (0 < x.numel() <= MAX_ROWS * K and x.dtype is not torch.float32 and N > 0 and dense == 1 and not (K | stride) & 7
            and not weight.data_ptr() & 15)


@functools.cache
def _kernel(dtype: torch.dtype, rows: int, device: int) -> Kernel:
    return load(spec(pick(DTYPE_NAME[dtype], rows)), device)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None,
           residual: torch.Tensor | None) -> torch.Tensor:
    N, K = weight.shape
    rows = x.numel() // K
    out = x.new_empty((*x.shape[:-1], N))
    x, x_stride = rows_of(x)
    if x.data_ptr() & 15 or x_stride & 7:
        x, x_stride = x.clone(memory_format=torch.contiguous_format), K
    bias_at = residual_at = residual_stride = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    if residual is not None:
        residual, residual_stride = rows_of(residual)
        residual_at = residual.data_ptr()
    _kernel(x.dtype, rows, x.device.index)(
        -(-N // TILE_ROWS), 1, 1, x.data_ptr(), weight.data_ptr(), bias_at, residual_at, out.data_ptr(), x_stride, weight.stride(0),
        residual_stride, rows, N, K, *form_of(activation))
    return out
