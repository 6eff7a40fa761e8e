"""What the kernels of linear for few rows of x share: the walk of a warp over K, x in shared memory, and the end of a tile.

The weights are the A operand of mma.m16n8k16 (16 rows of the weights), x is B (8 rows of x): nothing is padded to 16 rows of x. The
order of k inside a product is free as long as both operands agree, so that what lane (g, t) loads at once are its fragments of several
products. Each warp takes its own STAGE_K values of k of every `warps`, with its own cp.async ring of weights and x, so that nothing waits
for a barrier before a tile's end, where the warps add their sums. Blocks stay: when one tile has been read the ring goes on with the next.

x comes by the ring and not straight to registers, since what L2 holds is handed over behind the weights that were asked for before: with
one row of x, 4096 x 14336 in four bits took 22 us where it took 13 without reading x.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.activation import FORMS, make_activate
from ftops.numba_kernels.rows import rows_of, rsqrt

STAGE_K = 128  # values of k a stage of a warp
X_ROW_BYTES = 2 * STAGE_K
NO_FORM = (-1, 0.0, 0.0)
_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


def kind_of(dtype: torch.dtype) -> str:
    """What the kernels call weights of `dtype` that lie row by row."""
    return _KINDS.get(dtype, "16-bit")


def form_of(activation: str | None) -> tuple[int, float, float]:
    """The last three arguments of a kernel of linear."""
    return NO_FORM if activation is None else FORMS[activation]


def normalises(x: torch.Tensor, most: int) -> bool:
    """Whether a kernel that takes an RMS norm of up to `most` rows normalises x[..., K] itself. In bfloat16: x times the norm's weight may
    pass float16's range where the norm does not."""
    return x.dtype is torch.bfloat16 and x.numel() <= most * x.shape[-1]


def norm_address(norm: torch.Tensor | None) -> tuple[int, torch.Tensor | None]:
    """Of the norm's weight [K], in whole accesses; 0 where there is none. Then a tensor to hold until the launch."""
    if norm is None:
        return 0, None
    norm = aligned_x(norm, 1)[0]
    return norm.data_ptr(), norm


def added(bias: torch.Tensor | None, residual: torch.Tensor | None) -> tuple[int, int, int, tuple[torch.Tensor | None, ...]]:
    """Addresses of bias and residual and elements between the latter's rows, 0 where there is none; tensors to hold until the launch."""
    bias_at = residual_at = stride = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    if residual is not None:
        residual, stride = rows_of(residual)
        residual_at = residual.data_ptr()
    return bias_at, residual_at, stride, (bias, residual)


def aligned_x(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, int, int]:
    """(x, elements between its rows, K): rows from 16-byte boundaries and whole accesses of k; where need be a copy with zeros past K."""
    K = x.shape[-1]
    x, stride = rows_of(x)
    if x.data_ptr() & 15 or (stride | K) & 7:
        x = torch.nn.functional.pad(x.reshape(rows, K), (0, -K % 8)).clone(memory_format=torch.contiguous_format)
        stride = K = x.shape[-1]
    return x, stride, K


@functools.cache
def spread(tiles: int, blocks_x: int, needed: int, most: int, device: int) -> tuple[int, int]:
    """(blocks for the tiles, shared memory a block): as many as reside at once, and on each multiprocessor as many as on the others.

    needed: bytes of a block; most: blocks that the registers of a multiprocessor allow. More memory than needed keeps further blocks
    away: where the kernel before ends early, the first to be free would take more than their share (256 blocks of 64 KiB for 132
    multiprocessors took 36 us to read what took 27.6 with places for two).
    """
    properties = torch.cuda.get_device_properties(device)
    whole, processors = properties.shared_memory_per_multiprocessor, properties.multi_processor_count
    places = min(most, whole // (needed + 1024), -(-tiles * blocks_x // processors))  # the system takes 1 KiB of each block
    share = min(whole // places - 1024, properties.shared_memory_per_block_optin)
    return min(tiles, max(1, places * processors // blocks_x)), max(share, needed)


def make_x(batch: int, unit: int) -> tuple[Callable, Callable]:
    """(copy_x, place_x) of a stage's x in shared memory, [batch, STAGE_K].

    copy_x(x_sh, x_gl, jump, count, own_count, left): of lane l, row l / 16 and every second one after it, access l % 16, of `count` rows,
    `own_count` from the lane's first on; zeros beyond K.
    place_x(row, lane_bytes) -> where the lane reads its accesses of even and of odd number, `unit` bytes apart. Odd rows have even and odd
    accesses swapped, so that a quarter of a warp, reading two rows, meets all banks.
    """
    @cuda.jit(device=True, forceinline=True)
    def copy_x(x_sh, x_gl, jump, count, own_count, left):
        for i in range(batch // 2):
            if 2 * i < count:
                ptx.cp_async_16_l1(np.int32(x_sh + 2 * X_ROW_BYTES * i), x_gl, np.uint32(16 if left > 0 and 2 * i < own_count else 0))
                x_gl += jump

    @cuda.jit(device=True, forceinline=True)
    def place_x(row, lane_bytes):
        swap = np.int32(unit * (row & 1))
        even = np.int32(X_ROW_BYTES * row + lane_bytes + swap)
        return even, np.int32(even - 2 * swap)
    return copy_x, place_x


def make_norm(dtype: str, batch: int, words: int, tile_rows: int) -> tuple[Callable, Callable, Callable]:
    """(square, weigh, keep_squares) of an RMS norm of x: what is multiplied is x times the norm's weight, rounded, and `finish` multiplies
    the sums of a row by 1 / sqrt(mean(x^2) + eps). For up to 16 rows of x.

    square(s, x, squares): the two words of each 8 rows of x, `words` apart, that product s takes, times themselves. Sums of squares are on
    the diagonal of x x^T: a product of the tensor cores a word, where four other instructions would add its squares. Its A operand is the
    two words as they lie in registers, so that the first one's squares are in the upper half of one sum, the second one's in the lower half
    of another; the other halves mean nothing. (One product of 16 values of k for both words took four moves.)
    weigh(at, weight, x): x[at : at + 4] and those of further rows times the four words of the norm's weight.
    keep_squares(squares, sums_sh, thread): behind a warp's sums, a float32 for each row of x.
    """
    mma, multiply, minus_zero, tiles = ptx.MMA_K8[dtype], ptx.FMA_PAIR[dtype], np.uint32(0x80008000), batch // 8

    @cuda.jit(device=True, forceinline=True)
    def square(s, x, squares):
        at, other = 2 * s, 2 * s + words
        mma(squares, 0, x[at], x[at + 1], x[at])
        mma(squares, 4, x[at], x[at + 1], x[at + 1])
        if tiles > 1:
            mma(squares, 8, x[other], x[other + 1], x[other])
            mma(squares, 12, x[other], x[other + 1], x[other + 1])

    @cuda.jit(device=True, forceinline=True)
    def weigh(at, weight, x):
        for j in range(tiles):
            for i in range(4):
                x[words * j + at + i] = multiply(x[words * j + at + i], weight[i], minus_zero)

    @cuda.jit(device=True, forceinline=True)
    def keep_squares(squares, sums_sh, thread):
        lane, warp = thread & 31, thread >> 5
        row = lane >> 2
        if lane & 3 == row >> 1:
            row_sh = np.int32(sums_sh + 4 * batch * (warp * (tile_rows + 1) + tile_rows) + 4 * row)
            ptx.st_shared_f32(row_sh, squares[1] + squares[7] if row & 1 else squares[0] + squares[6])
            if tiles > 1:
                ptx.st_shared_f32(row_sh + 32, squares[9] + squares[15] if row & 1 else squares[8] + squares[14])
    return square, weigh, keep_squares


def make_finish(dtype: str, batch: int, tile_rows: int, warps: int, normed: bool = False) -> tuple[Callable, Callable]:
    """(keep, finish): out[first_x : first_x + batch, first : first + 2 ** across] from the sums of all warps, in their order.

    keep(acc, sums_sh, thread): acc[4 (i * batch / 8 + j) + r] is the fragment of 16 rows of the weights i and of 8 rows of x j. sums_sh:
    tile_rows * batch float32 a warp; normed, then the rows' sums of squares, of which over_length and eps make a factor of each row.
    There are two such, since a tile's are read until the next one's barrier.
    finish(sums_sh, up, across, ...), behind a barrier. half: 0, or where act(gate) * up is written, rows of the weights between gate and
    up, whose sums lie `up` bytes behind the gate's; N is then the columns of the result.
    """
    low, pair = ptx.LOW[dtype], ptx.PAIR[dtype]
    row_tiles, batch_tiles, threads, warp_bytes = tile_rows // 16, batch // 8, 32 * warps, 4 * (tile_rows + normed) * batch
    activate = make_activate(1)

    @cuda.jit(device=True, forceinline=True)
    def keep(acc, sums_sh, thread):
        lane, warp = thread & 31, thread >> 5
        mine_sh = sums_sh + warp * warp_bytes + 4 * batch * (lane >> 2) + 8 * (lane & 3)
        for i in range(row_tiles):
            for j in range(batch_tiles):
                at = 4 * (i * batch_tiles + j)
                here_sh = mine_sh + 64 * batch * i + 32 * j
                ptx.st_shared_64(here_sh, ptx.f32_bits(acc[at]), ptx.f32_bits(acc[at + 1]))
                ptx.st_shared_64(here_sh + 32 * batch, ptx.f32_bits(acc[at + 2]), ptx.f32_bits(acc[at + 3]))

    @cuda.jit(device=True, forceinline=True)
    def added_up(sum_sh):
        value = ptx.ld_shared_f32(sum_sh)
        for w in range(1, warps):
            value += ptx.ld_shared_f32(sum_sh + w * warp_bytes)
        return value

    @cuda.jit(device=True, forceinline=True)
    def summed(sum_sh, factor, bias_gl, column):
        value = added_up(sum_sh)
        if normed:
            value *= factor
        if bias_gl != 0:
            value += low(ptx.ld_written_16(bias_gl + 2 * np.int64(column)))
        return value

    @cuda.jit(device=True, forceinline=True)
    def finish(sums_sh, up, across, thread, first, first_x, rows, N, half, bias_gl, residual_gl, residual_stride, out_gl, form, linear,
               cubic, over_length, eps):
        value = cuda.local.array(1, np.float32)
        factor = np.float32(1)
        for item in range(thread, min(rows - first_x, batch) << across, threads):
            row, column = item >> across, item & (1 << across) - 1
            if first + column < N:
                sum_sh = sums_sh + 4 * (batch * column + row)
                if normed:
                    factor = rsqrt(ptx.fma(added_up(sums_sh + 4 * (batch * tile_rows + row)), over_length, eps))
                value[0] = summed(sum_sh, factor, bias_gl, first + column)
                if form >= 0:
                    activate(value, form, linear, cubic)
                if half > 0:
                    value[0] *= summed(sum_sh + up, factor, bias_gl, first + column + half)
                if residual_gl != 0:
                    value[0] += low(ptx.ld_written_16(residual_gl + 2 * ((first_x + row) * residual_stride + first + column)))
                ptx.st_global_16(out_gl + 2 * (np.int64(first_x + row) * N + first + column), pair(value[0], np.float32(0)))

    return keep, finish
