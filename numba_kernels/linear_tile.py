"""What the kernels of linear for few rows of x share: fragments of x, and the end of a tile, where a block's warps add their sums.

The weights are the A operand of mma.m16n8k16 (16 rows of the weights), x is B (8 rows of x): nothing is padded to 16 rows of x. The
order of k inside a product is free as long as both operands agree: of each 32 values of k, lane (g, t) owns 8 t .. 8 t + 7, so what it
loads at once, 16 bytes of a row of x, is its fragment of two products. Each warp takes its own part of K with its own cp.async ring, of
which a lane reads back what it has copied itself, so that nothing waits for a barrier before the end.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.activation import FORMS, make_activate
from ftops.numba_kernels.rows import rows_of

NO_FORM = (-1, 0.0, 0.0)


def form_of(activation: str | None) -> tuple[int, float, float]:
    """The last three arguments of a kernel of linear."""
    return NO_FORM if activation is None else FORMS[activation]


def aligned_x(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, int, int]:
    """(x, elements between its rows, K): rows from 16-byte boundaries and whole accesses of k; where need be a copy with zeros past K."""
    K = x.shape[-1]
    x, stride = rows_of(x)
    if x.data_ptr() & 15 or (stride | K) & 7:
        x = torch.nn.functional.pad(x.reshape(rows, K), (0, -K % 8)).clone(memory_format=torch.contiguous_format)
        stride = K = x.shape[-1]
    return x, stride, K


@functools.cache
def spread(blocks: int, ring_bytes: int, device: int) -> int:
    """Bytes of shared memory a block that let so many reside on a multiprocessor as there are for each, if that many fit.

    Else the first to be free, where the kernel before ends early, take more than their share: 256 blocks of 64 KiB for 132
    multiprocessors took 36 us to read what took 27.6 with places for two.
    """
    properties = torch.cuda.get_device_properties(device)
    places = -(-blocks // properties.multi_processor_count)
    share = properties.shared_memory_per_multiprocessor // places - 1024  # which the system takes of each block
    return min(share, properties.shared_memory_per_block_optin) if share >= ring_bytes else 0


def make_finish(dtype: str, batch: int, tile_rows: int, warps: int, warp_bytes: int) -> Callable:
    """finish(acc, ...): out[first_x : first_x + batch, first : first + tile_rows] from the sums of all warps, in their order.

    acc[4 (i * batch / 8 + j) + r]: fragment of 16 rows of the weights i and of 8 rows of x j. The rings, warp_bytes each, hold the sums.
    """
    low, pair = ptx.LOW[dtype], ptx.PAIR[dtype]
    row_tiles, batch_tiles, threads, shift = tile_rows // 16, batch // 8, 32 * warps, tile_rows.bit_length() - 1
    activate = make_activate(1)

    @cuda.jit(device=True, forceinline=True)
    def finish(acc, shared_sh, thread, first, first_x, rows, N, bias_gl, residual_gl, residual_stride, out_gl, form, linear, cubic):
        lane, warp = thread & 31, thread >> 5
        mine_sh = shared_sh + warp * warp_bytes + 4 * batch * (lane >> 2) + 8 * (lane & 3)
        ptx.cp_async_wait_0()
        ptx.warp_sync()
        for i in range(row_tiles):
            for j in range(batch_tiles):
                at = 4 * (i * batch_tiles + j)
                here_sh = mine_sh + 64 * batch * i + 32 * j
                ptx.st_shared_64(here_sh, ptx.f32_bits(acc[at]), ptx.f32_bits(acc[at + 1]))
                ptx.st_shared_64(here_sh + 32 * batch, ptx.f32_bits(acc[at + 2]), ptx.f32_bits(acc[at + 3]))
        cuda.syncthreads()
        value = cuda.local.array(1, np.float32)
        for item in range(thread, min(rows - first_x, batch) * tile_rows, threads):
            row, column = item >> shift, item & (tile_rows - 1)
            if first + column < N:
                sum_sh = shared_sh + 4 * (batch * column + row)
                value[0] = ptx.ld_shared_f32(sum_sh)
                for w in range(1, warps):
                    value[0] += ptx.ld_shared_f32(sum_sh + w * warp_bytes)
                if bias_gl != 0:
                    value[0] += low(ptx.ld_written_16(bias_gl + 2 * np.int64(first + column)))
                if form >= 0:
                    activate(value, form, linear, cubic)
                if residual_gl != 0:
                    value[0] += low(ptx.ld_written_16(residual_gl + 2 * ((first_x + row) * residual_stride + first + column)))
                ptx.st_global_16(out_gl + 2 * (np.int64(first_x + row) * N + first + column), pair(value[0], np.float32(0)))

    return finish
