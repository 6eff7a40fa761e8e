"""The launch of the linear for many rows on Hopper: which problems it takes, tensor maps, how many blocks."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ftops.numba_kernels.launch import Kernel, capability, load, multiprocessors
from ftops.numba_kernels.linear_sm90 import spec
from ftops.numba_kernels.linear_sm90_config import CHUNK, FEATURES, FROM_ROWS, Config, pick, splits_of, tiles_of
from ftops.numba_kernels.linear_tile import aligned_x, form_of
from ftops.numba_kernels.rows import DTYPE_NAME, rows_of
from ftops.numba_kernels.tma import tiles

KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this kernel is the fastest for x[..., K] and weight[N, width], whose rows must be whole 16-byte accesses apart."""
    if x.numel() < FROM_ROWS[KINDS.get(weight.dtype, "16-bit")] * x.shape[-1] or not x.numel() or x.dtype is torch.float32:
        return False
    stride, dense = weight.stride()
    return (weight.shape[0] > 0 and dense == 1 and not (stride * weight.element_size() | weight.data_ptr()) & 15
            and capability(x.device.index) == (9, 0))


@functools.cache
def _picked(kind: str, dtype: torch.dtype, rows: int, N: int, K: int, device: int) -> tuple[Config, int]:
    config = pick(kind, DTYPE_NAME[dtype], rows, N, K, multiprocessors(device))
    return config, splits_of(config, rows, N, K, multiprocessors(device))


@functools.cache
def _loaded(config: Config, splits: int, device: int) -> Kernel:
    return load(spec(config, splits), device)


def launch(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, activation: str | None,
           residual: torch.Tensor | None, picked: tuple[Config, int] | None = None) -> torch.Tensor:
    """weight[N, width], width K or, in 8 bits, more: zeros to whole accesses; then scales[N], float32. picked: a tile, and how many blocks
    share its k, in place of those that `pick` and `splits_of` give."""
    N, width = weight.shape
    scale_at = 0 if scales is None else scales.data_ptr()

    def stored(config: Config) -> tuple[bytes | int, ...]:
        w_map = tiles(weight.data_ptr(), weight.dtype, (width, N), (weight.stride(0),), (config.depth, FEATURES))
        return w_map, w_map, scale_at, 0, 0

    return _start(KINDS.get(weight.dtype, "16-bit"), x, N, stored, bias, activation, residual, picked)


def launch_w4a16(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, bias: torch.Tensor | None,
                 activation: str | None, residual: torch.Tensor | None, picked: tuple[Config, int] | None = None) -> torch.Tensor:
    """packed [tiles, pieces, 32, 4]; scales [tiles, groups, 8, 4], or [..., 2] with zero points."""
    (of_32, pieces), groups = packed.shape[:2], scales.shape[1]
    shift, record = (pieces // groups).bit_length() - 1, scales[0, 0, 0].nbytes

    def stored(config: Config) -> tuple[bytes | int, ...]:
        w_map = tiles(packed.data_ptr(), torch.int8, (128, 4 * pieces, of_32, 1), (128, 512 * pieces, 512 * pieces * of_32),
                      (128, 4 * config.pieces, FEATURES // 32, 1))
        scale_map = tiles(scales.data_ptr(), scales.dtype, (4 * record, groups, of_32, 1), (4 * record, 4 * record * groups,
                          4 * record * groups * of_32), (4 * record, max(1, config.pieces >> shift), FEATURES // 32, 1))
        return w_map, scale_map, 0, shift, record

    return _start("int4", x, features, stored, bias, activation, residual, picked)


def _start(kind: str, x: torch.Tensor, N: int, stored: Callable[[Config], tuple[bytes | int, ...]], bias: torch.Tensor | None,
           activation: str | None, residual: torch.Tensor | None, picked: tuple[Config, int] | None) -> torch.Tensor:
    """stored(config): maps of W and of int4's scales, address of other scales, how int4 is grouped."""
    rows, device = x.numel() // x.shape[-1], x.device.index
    out = x.new_empty((*x.shape[:-1], N))
    x, x_stride, K = aligned_x(x, rows)
    wide = not N % 4
    bias_at = residual_at = residual_stride = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    if residual is not None:
        residual, residual_stride = rows_of(residual)
        residual_at = residual.data_ptr()
        wide = wide and not (residual_stride % 4 or residual_at % 8)
    config, splits = picked or _picked(kind, x.dtype, rows, N, K, device)
    of_features, of_rows = tiles_of(config, rows, N)
    blocks = of_features * of_rows * splits if splits > 1 else min(of_features * of_rows, multiprocessors(device))
    w_map, scale_map, scale_at, shift, record = stored(config)
    x_map = tiles(x.data_ptr(), x.dtype, (K, rows), (x_stride,), (CHUNK, config.columns))
    _loaded(config, splits, device)(
        blocks, 1, 1, w_map, x_map, scale_map, scale_at, bias_at, residual_at, out.data_ptr(), residual_stride, rows, N,
        -(-K // config.depth), splits, wide, shift, record, *form_of(activation))
    return out
