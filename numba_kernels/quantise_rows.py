"""Activations in eight bits, and the RMS norm before that: values = n / scale rounded to int8 or float8 e4m3, scale = largest of a row of
|n| / largest of the format, n = x / sqrt(mean(x^2) + eps) * norm / smooth, in float32.

x[rows, K], 16 bits, rows of any stride; norm[K], of x's dtype, and smooth[K], float32, or none. A row is a block, whose threads have four
16-byte loads of it on their way at once and keep it in registers between the largest and the rounding; longer rows are read again. What
all of a row is multiplied by is in its scale alone: the values are the same whatever its mean square.
Floor: (read of x + write of the values) / copy bandwidth.
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
from ftops.numba_kernels.linear_tile import aligned_x, norm_address
from ftops.numba_kernels.narrow import LARGEST, NARROW_NAME, make_narrow
from ftops.numba_kernels.rows import DTYPE_NAME, make_convert, rsqrt

ACCESSES, VEC = 4, 8  # of a thread, values each
SIZES = (128, 256, 512)  # threads of a block; rows of up to 4096, 8192, 16384 values stay in their registers
MULTIPLE = 16  # columns of the values: whole accesses of the products that read them


@dataclass(frozen=True)
class Config:
    """dtype of x; narrow: int8 or float8_e4m3fn; threads of a row."""

    dtype: str
    narrow: str
    threads: int


def pick(dtype: str, narrow: str, K: int) -> Config:
    """The fewest threads that hold the row: with fewer of them waiting at a barrier, more rows are on their way at once."""
    return Config(dtype, narrow, next((threads for threads in SIZES if threads * VEC * ACCESSES >= K), SIZES[-1]))


def make(config: Config) -> Callable:
    unpack, _ = make_convert(config.dtype, VEC)
    narrow, largest = make_narrow(config.narrow, VEC), np.float32(LARGEST[config.narrow])
    warps, step, tile, kept = config.threads // 32, config.threads * VEC, config.threads * VEC * ACCESSES, 4 * ACCESSES
    of_thread, least = VEC * ACCESSES, np.float32(LARGEST[config.narrow] * 2.0 ** -125)  # below it 1 / scale may not be a number
    zero, one = np.float32(0), np.float32(1)
    x1, x2, x4, x8, x16 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))

    @cuda.jit(device=True, forceinline=True)
    def fetch(at, k, K, words):
        """16-bit values from k on."""
        for i in range(ACCESSES):
            here = np.int32(k + np.int32(i * step))
            words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = ptx.ld_written_128_if(
                at + np.uint64(2) * np.uint64(np.uint32(here)), np.uint32(here < K))

    @cuda.jit(device=True, forceinline=True)
    def gather(x_gl, norm_gl, smooth_gl, k, K, values):
        """values := those of x from k on, times norm, by smooth; zeros past K. The sum of x's squares, if there is a norm."""
        words = cuda.local.array(kept, np.uint32)
        factors = cuda.local.array(kept, np.uint32)
        wide = cuda.local.array(VEC, np.float32)
        square = zero
        fetch(x_gl, k, K, words)
        if norm_gl != np.uint64(0):
            fetch(norm_gl, k, K, factors)
        for i in range(ACCESSES):
            unpack(words, 4 * i, values, VEC * i)
        if norm_gl != np.uint64(0):
            for i in range(ACCESSES):
                unpack(factors, 4 * i, wide, 0)
                for j in range(VEC):
                    square = ptx.fma(values[VEC * i + j], values[VEC * i + j], square)
                    values[VEC * i + j] *= wide[j]
        if smooth_gl != np.uint64(0):
            for i in range(ACCESSES):
                here = np.int32(k + np.int32(i * step))
                if here < K:
                    at = smooth_gl + np.uint64(4) * np.uint64(np.uint32(here))
                    for j in range(2):
                        four = ptx.ld_written_128(at + np.uint64(16 * j))
                        for r in range(4):
                            values[VEC * i + 4 * j + r] = ptx.divide(values[VEC * i + 4 * j + r], ptx.bits_f32(four[r]))
        return square

    def quantise_rows(x_gl, norm_gl, smooth_gl, values_gl, scale_gl, x_stride, K, width, over_length, eps):
        highest_sh, square_sh = cuda.shared.array(warps, np.float32), cuda.shared.array(warps, np.float32)
        thread, row = np.uint32(cuda.threadIdx.x), np.uint64(cuda.blockIdx.x)
        x_gl, values_gl = x_gl + np.uint64(2) * row * np.uint64(x_stride), values_gl + row * np.uint64(np.uint32(width))
        values, first = cuda.local.array(of_thread, np.float32), np.int32(np.uint32(VEC) * thread)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        highest, square = zero, zero
        for k in range(np.int32(0), K, np.int32(tile)):
            square += gather(x_gl, norm_gl, smooth_gl, np.int32(first + k), K, values)
            for i in range(of_thread):
                highest = ptx.maximum_nan(highest, abs(values[i]))
        highest = ptx.maximum_nan(highest, x1(highest))
        highest = ptx.maximum_nan(highest, x2(highest))
        highest = ptx.maximum_nan(highest, x4(highest))
        highest = ptx.maximum_nan(highest, x8(highest))
        highest = ptx.maximum_nan(highest, x16(highest))
        square += x1(square)
        square += x2(square)
        square += x4(square)
        square += x8(square)
        square += x16(square)
        if thread & np.uint32(31) == np.uint32(0):
            highest_sh[thread >> np.uint32(5)], square_sh[thread >> np.uint32(5)] = highest, square
        cuda.syncthreads()
        square = zero
        for i in range(warps):
            highest = ptx.maximum_nan(highest, highest_sh[i])
            square += square_sh[i]
        scale = one if highest <= least else ptx.divide_rn(highest, largest)  # NaN stays NaN, in the whole row
        if thread == np.uint32(0):
            factor = rsqrt(ptx.fma(square, over_length, eps)) if norm_gl != np.uint64(0) else one
            ptx.st_global_f32(scale_gl + np.uint64(4) * row, scale * factor)
        inverse = ptx.divide_rn(one, scale)
        for k in range(np.int32(0), width, np.int32(tile)):
            if np.int32(tile) < K:
                gather(x_gl, norm_gl, smooth_gl, np.int32(first + k), K, values)
            for i in range(ACCESSES):
                here = np.int32(first + k + np.int32(i * step))
                if here < width:
                    for j in range(VEC):
                        values[VEC * i + j] *= inverse
                    narrow(values_gl + np.uint64(np.uint32(here)), values, VEC * i)

    return quantise_rows


def spec(config: Config) -> Spec:
    return Spec(make, config, "pppppliiff", threads=config.threads, min_blocks=1024 // config.threads, dependent=True, halves=True)


def variants() -> Iterator[Spec]:
    for dtype in ("float16", "bfloat16"):
        for narrow in LARGEST:
            for threads in SIZES:
                yield spec(Config(dtype, narrow, threads))


@functools.cache
def _kernel(dtype: torch.dtype, narrow: torch.dtype, K: int, device: int) -> Kernel:
    return load(spec(pick(DTYPE_NAME[dtype], NARROW_NAME[narrow], K)), device)


def launch(x: torch.Tensor, narrow: torch.dtype, smooth: torch.Tensor | None, norm: torch.Tensor | None = None,
           eps: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [rows, K up to a multiple of 16], scales float32 [rows]) of x[..., K]."""
    length = x.shape[-1]
    rows, width = x.numel() // length, -(-length // MULTIPLE) * MULTIPLE
    x, stride, K = aligned_x(x, rows)
    norm_at, _norm = norm_address(norm)
    if smooth is not None and (length < K or smooth.data_ptr() & 15):
        smooth = torch.nn.functional.pad(smooth, (0, K - length), value=1.0)
    values = torch.empty((rows, width), dtype=narrow, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    _kernel(x.dtype, narrow, K, x.device.index)(rows, 1, 1, x.data_ptr(), norm_at, 0 if smooth is None else smooth.data_ptr(),
                                                values.data_ptr(), scales.data_ptr(), stride, K, width, 1 / length, eps)
    return values, scales
