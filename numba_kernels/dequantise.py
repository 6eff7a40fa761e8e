"""Packed int4 weights (ftops/packing.py) written out as W[N, K] = (q - zero) * scale in 16 bits, for a matmul with many rows of x.

A warp takes pieces of 32 x 32 values; a lane's words are eight neighbouring values of a row, which it stores at once. The product is
rounded once: q - zero and scale are 16-bit numbers. Floor: (bytes of q + bytes of W) / copy bandwidth.
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
from ftops.numba_kernels.linear_dequantise import SIGN, ZERO, make_int4
from ftops.numba_kernels.rows import DTYPE_NAME

TILE_ROWS, PIECE_K, WARPS = 32, 32, 8


@dataclass(frozen=True)
class Config:
    """dtype of W."""

    dtype: str


def make(config: Config) -> Callable:
    low, high, pair = ptx.LOW[config.dtype], ptx.HIGH[config.dtype], ptx.PAIR[config.dtype]
    times, nothing, symmetric = ptx.FMA_PAIR[config.dtype], np.uint32(SIGN), np.float32(ZERO)
    values, minus_of = make_int4(config.dtype, True)

    def dequantise(w_gl, scale_gl, out_gl, rows, row_bytes, count, groups, record):
        thread = np.int32(cuda.threadIdx.x)
        lane, piece, tile = thread & 31, np.int32(WARPS * np.int32(cuda.blockIdx.x)) + (thread >> 5), np.int64(cuda.blockIdx.y)
        g, t = lane >> 2, lane & 3
        ptx.wait_for_primary()
        ptx.launch_dependents()
        if piece < count:
            w_gl = np.int64(w_gl) + 512 * (tile * count + piece) + 16 * lane
            scale_gl = np.int64(scale_gl) + ((tile * groups + piece * groups // count) * 8 + g) * record
            scale = cuda.local.array(4, np.float32)
            zero = cuda.local.array(4, np.float32)
            out = cuda.local.array(16, np.uint32)
            for r in range(4):
                if record == 16:
                    word = ptx.ld_written_32(scale_gl + 4 * r)
                    scale[r], zero[r] = low(word), high(word)
                else:
                    word = ptx.ld_written_32(scale_gl + 4 * (r >> 1))
                    scale[r], zero[r] = high(word) if r & 1 else low(word), symmetric
            words = ptx.ld_written_128(w_gl)
            for i in range(2):
                minus, minus_below = minus_of(zero[2 * i], zero[2 * i + 1])
                upper, lower = pair(scale[2 * i], scale[2 * i]), pair(scale[2 * i + 1], scale[2 * i + 1])
                for s in range(2):
                    a = values(words[2 * i + s], minus, minus_below)
                    at = 8 * i + 2 * s
                    out[at], out[at + 1] = times(a[0], upper, nothing), times(a[2], upper, nothing)
                    out[at + 4], out[at + 5] = times(a[1], lower, nothing), times(a[3], lower, nothing)
            row = np.int32(TILE_ROWS * np.int32(tile) + g)
            out_gl = np.int64(out_gl) + np.int64(row) * row_bytes + 2 * PIECE_K * piece + 16 * t
            for r in range(4):
                ptx.st_global_128_if(out_gl + 8 * r * row_bytes, out[4 * r], out[4 * r + 1], out[4 * r + 2], out[4 * r + 3],
                                     np.uint32(row + 8 * r < rows))

    return dequantise


def spec(config: Config) -> Spec:
    return Spec(make, config, "pppiliii", threads=32 * WARPS, min_blocks=4, dependent=True)


def variants() -> Iterator[Spec]:
    for dtype in ("float16", "bfloat16"):
        yield spec(Config(dtype))


@functools.cache
def _kernel(dtype: torch.dtype, device: int) -> Kernel:
    return load(spec(Config(DTYPE_NAME[dtype])), device)


def launch(packed: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """W[rows, columns] in the dtype of scales, its rows whole pieces apart; packed and scales as linear_w4a16.py has them."""
    tiles, count = packed.shape[:2]
    out = scales.new_empty((rows, PIECE_K * count))
    _kernel(scales.dtype, packed.device.index)(
        -(-count // WARPS), tiles, 1, packed.data_ptr(), scales.data_ptr(), out.data_ptr(), rows, 2 * PIECE_K * count, count,
        scales.shape[1], 8 if scales.dim() == 4 else 16)
    return out[:, :columns]
