"""Device helpers for kernels that walk the rows of a tensor: vector loads and stores as float32, activations, block reductions."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx

ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_NAME = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def make_io(dtype: str, vec: int) -> tuple[Callable, Callable]:
    """(load, store) of `vec` elements: load(address, values, at) fills values[at : at + vec] with float32, store writes them back.

    vec elements are 2, 4, 8 or 16 bytes, at an address that they divide.
    """
    if dtype == "float32":
        return _make_io_f32(vec)
    low, high, pair = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.PAIR[dtype]

    if vec == 1:
        @cuda.jit(device=True, forceinline=True)
        def load(address, values, at):
            values[at] = low(ptx.ld_global_16(address))

        @cuda.jit(device=True, forceinline=True)
        def store(address, values, at):
            ptx.st_global_16(address, pair(values[at], np.float32(0)))
    elif vec == 2:
        @cuda.jit(device=True, forceinline=True)
        def load(address, values, at):
            word = ptx.ld_global_32(address)
            values[at], values[at + 1] = low(word), high(word)

        @cuda.jit(device=True, forceinline=True)
        def store(address, values, at):
            ptx.st_global_32(address, pair(values[at], values[at + 1]))
    elif vec == 4:
        @cuda.jit(device=True, forceinline=True)
        def load(address, values, at):
            words = ptx.ld_global_64(address)
            values[at], values[at + 1], values[at + 2], values[at + 3] = low(words[0]), high(words[0]), low(words[1]), high(words[1])

        @cuda.jit(device=True, forceinline=True)
        def store(address, values, at):
            ptx.st_global_64(address, pair(values[at], values[at + 1]), pair(values[at + 2], values[at + 3]))
    else:
        @cuda.jit(device=True, forceinline=True)
        def load(address, values, at):
            words = ptx.ld_global_128(address)
            for i in range(4):
                values[at + 2 * i], values[at + 2 * i + 1] = low(words[i]), high(words[i])

        @cuda.jit(device=True, forceinline=True)
        def store(address, values, at):
            ptx.st_global_128(address, pair(values[at], values[at + 1]), pair(values[at + 2], values[at + 3]),
                              pair(values[at + 4], values[at + 5]), pair(values[at + 6], values[at + 7]))
    return load, store


def _make_io_f32(vec: int) -> tuple[Callable, Callable]:
    if vec == 1:
        @cuda.jit(device=True, forceinline=True)
        def load(address, values, at):
            values[at] = ptx.ld_global_f32(address)

        @cuda.jit(device=True, forceinline=True)
        def store(address, values, at):
            ptx.st_global_f32(address, values[at])
    elif vec == 2:
        @cuda.jit(device=True, forceinline=True)
        def load(address, values, at):
            words = ptx.ld_global_64(address)
            values[at], values[at + 1] = ptx.bits_f32(words[0]), ptx.bits_f32(words[1])

        @cuda.jit(device=True, forceinline=True)
        def store(address, values, at):
            ptx.st_global_64(address, ptx.f32_bits(values[at]), ptx.f32_bits(values[at + 1]))
    else:
        @cuda.jit(device=True, forceinline=True)
        def load(address, values, at):
            words = ptx.ld_global_128(address)
            for i in range(4):
                values[at + i] = ptx.bits_f32(words[i])

        @cuda.jit(device=True, forceinline=True)
        def store(address, values, at):
            ptx.st_global_128(address, ptx.f32_bits(values[at]), ptx.f32_bits(values[at + 1]), ptx.f32_bits(values[at + 2]),
                              ptx.f32_bits(values[at + 3]))
    return load, store


def make_block_sum(warps: int) -> Callable:
    """block_sum(x): the sum of x over a block of `warps` warps, given to every thread. Two barriers."""
    x1, x2, x4, x8, x16 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))

    @cuda.jit(device=True, forceinline=True)
    def warp_sum(x):
        x += x16(x)
        x += x8(x)
        x += x4(x)
        x += x2(x)
        return x + x1(x)

    if warps == 1:
        return warp_sum

    @cuda.jit(device=True, forceinline=True)
    def block_sum(x):
        partial = cuda.shared.array(32, np.float32)
        thread = np.int32(cuda.threadIdx.x)
        x = warp_sum(x)
        cuda.syncthreads()  # the values of an earlier call have been read
        if thread & np.int32(31) == 0:
            partial[thread >> np.int32(5)] = x
        cuda.syncthreads()
        total = np.float32(0)
        for warp in range(warps):
            total += partial[warp]
        return total

    return block_sum


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x[..., N] as (tensor whose rows are one stride apart and dense inside, that stride in elements); copies only if it must."""
    if x.dim() == 1:
        return (x if x.stride(0) == 1 else x.contiguous()), x.shape[0]
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        stride = None
        expected = None
        for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if stride is None:
                stride = expected = step
            if step != expected:
                break
            expected = step * size
        else:
            return x, x.shape[-1] if stride is None else stride
    return x.contiguous(), x.shape[-1]


def widest(item: int, length: int, *multiples: int) -> int:
    """How many elements of `item` bytes one access may take: at most 16 bytes, dividing `length` and every address and stride (bytes)."""
    vec = 16 // item
    while vec > 1 and (length % vec or any(m % (vec * item) for m in multiples)):
        vec //= 2
    return vec
