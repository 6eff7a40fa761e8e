"""The launch of the linear for many rows on Hopper: which problems it takes, tensor maps, how many blocks."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ftops.numba_kernels import tuned
from ftops.numba_kernels.launch import Kernel, capability, load, multiprocessors
from ftops.numba_kernels.linear_sm90 import spec
from ftops.numba_kernels.linear_sm90_config import BUFFER_ROWS, FEATURES, FROM_ROWS, Config, Plan, pick, plans, tiles_of, worthwhile
from ftops.numba_kernels.linear_tile import added, aligned_x, form_of, kind_of
from ftops.numba_kernels.rows import DTYPE_NAME
from ftops.numba_kernels.tma import tiles

GATED_ROWS = 16  # gate and up together are a multiple of this


def serves(x: torch.Tensor, weight: torch.Tensor, narrow: bool = False, after: int = 0) -> bool:
    """Whether this kernel is taken for x[..., K] and weight[N, width]: it was the fastest, or, unmeasured, from FROM_ROWS rows on, where it
    is worthwhile.

    narrow: with x rounded to the weight's 8 bits. after: as in `worthwhile`.
    """
    kind = kind_of(weight.dtype)
    return _wanted(f"{kind}_{kind}" if narrow else kind, 0, x, weight.shape, after) and can_serve(x, weight)


def can_serve(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """On Hopper, x of 16 bits, and rows of the weight that are whole 16-byte accesses apart."""
    stride, dense = weight.stride()
    return (x.numel() > 0 and x.dtype is not torch.float32 and weight.shape[0] > 0 and dense == 1
            and not (stride * weight.element_size() | weight.data_ptr()) & 15 and capability(x.device.index) == (9, 0))


def serves_w4a16(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int) -> bool:
    """As `serves`, for x of 16 bits."""
    return (_wanted("int4", 32 * packed.shape[1] // scales.shape[1], x, (features, x.shape[-1])) and x.numel() > 0
            and not (packed.data_ptr() | scales.data_ptr()) & 15 and capability(x.device.index) == (9, 0))


def _wanted(kind: str, group_size: int, x: torch.Tensor, shape: tuple[int, int], after: int = 0) -> bool:
    values, K, device = x.numel(), x.shape[-1], x.device.index
    if device in tuned.UNTUNED and values < FROM_ROWS[kind] * K:
        return False
    return _takes(kind, group_size, x.dtype, *shape, values // K, device, after)


@functools.lru_cache(maxsize=1 << 14)
def _takes(kind: str, group_size: int, dtype: torch.dtype, N: int, K: int, rows: int, device: int, after: int = 0) -> bool:
    problem = tuned.problem(tuned.op_of(kind, group_size), dtype, N, K)
    untuned = rows >= FROM_ROWS[kind] and worthwhile(kind, rows, N, K, multiprocessors(device), after)
    return tuned.takes("linear_sm90", problem, rows, untuned, device)


@functools.cache
def left_to_others(kind: str, most: int, device: int) -> int:
    """Up to how many rows of x, of `most`, another kernel is to take a weight where nothing was measured."""
    return min(most, FROM_ROWS[kind] - 1) if capability(device) == (9, 0) else most


def candidates(kind: str, dtype: str, rows: int, N: int, K: int, device: int) -> dict[str, Plan]:
    """What `ftops tune` measures, by name: first what `pick` gives, then all others."""
    problem = kind, dtype, rows, N, K, multiprocessors(device)
    return {f"{tuned.name_of('linear_sm90', plan.config)}, splits {plan.splits}": plan for plan in (pick(*problem), *plans(*problem))}


@functools.cache
def _picked(kind: str, group_size: int, dtype: torch.dtype, rows: int, N: int, width: int, K: int, device: int) -> Plan:
    problem = tuned.problem(tuned.op_of(kind, group_size), dtype, N, width)
    return tuned.chosen(problem, rows, device, candidates(kind, DTYPE_NAME[dtype], rows, N, K, device))


@functools.cache
def _loaded(config: Config, splits: int, device: int) -> Kernel:
    return load(spec(config, splits), device)


def launch(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, activation: str | None,
           residual: torch.Tensor | None, gated: bool = False, picked: Plan | None = None) -> torch.Tensor:
    """weight[N, width], width K or, in 8 bits, more: zeros to whole accesses; then scales[N], float32. gated: N a multiple of 16. picked:
    in place of what `pick` gives."""
    return _start((kind_of(weight.dtype), 0, weight.shape[1]), x, x.dtype, None, weight.shape[0], _by_rows(weight, scales, gated), bias,
                  activation, residual, gated, picked)


def launch_narrow(x: torch.Tensor, x_scales: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor, scales: torch.Tensor,
                  bias: torch.Tensor | None, activation: str | None, residual: torch.Tensor | None, gated: bool = False,
                  picked: Plan | None = None) -> torch.Tensor:
    """x[rows, width] and weight[N, width], both int8 or both e4m3, x_scales[rows] and scales[N], float32, to [rows, N] of `dtype`."""
    kind = kind_of(weight.dtype)
    return _start((f"{kind}_{kind}", 0, weight.shape[1]), x, dtype, x_scales, weight.shape[0], _by_rows(weight, scales, gated), bias,
                  activation, residual, gated, picked)


def launch_w4a16(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, bias: torch.Tensor | None,
                 activation: str | None, residual: torch.Tensor | None, picked: Plan | None = None) -> torch.Tensor:
    """packed [tiles, pieces, 32, 4]; scales [tiles, groups, 8, 4], or [..., 2] with zero points."""
    (of_32, pieces), groups = packed.shape[:2], scales.shape[1]
    shift, record = (pieces // groups).bit_length() - 1, scales[0, 0, 0].nbytes

    def stored(config: Config) -> tuple[bytes | int, ...]:
        w_map = tiles(packed.data_ptr(), torch.int8, (128, 4 * pieces, of_32, 1), (128, 512 * pieces, 512 * pieces * of_32),
                      (128, 4 * config.pieces, FEATURES // 32, 1))
        scale_map = tiles(scales.data_ptr(), scales.dtype, (4 * record, groups, of_32, 1), (4 * record, 4 * record * groups,
                          4 * record * groups * of_32), (4 * record, max(1, config.pieces >> shift), FEATURES // 32, 1))
        return w_map, scale_map, 0, shift, record

    return _start(("int4", 32 * pieces // groups, x.shape[-1]), x, x.dtype, None, features, stored, bias, activation, residual, False,
                  picked)


def _by_rows(weight: torch.Tensor, scales: torch.Tensor | None, gated: bool) -> Callable[[Config], tuple[bytes | int, ...]]:
    """`stored` of a weight [N, width]. gated: rows by eights, of gate and of up in turn."""
    (N, width), stride = weight.shape, weight.stride(0)

    def stored(config: Config) -> tuple[bytes | int, ...]:
        if gated:
            w_map = tiles(weight.data_ptr(), weight.dtype, (width, 8, 2, N // 16), (stride, N // 2 * stride, 8 * stride),
                          (config.depth, 8, 2, FEATURES // 16))
        else:
            w_map = tiles(weight.data_ptr(), weight.dtype, (width, N, 1, 1), (stride, 0, 0), (config.depth, FEATURES, 1, 1))
        return w_map, w_map, 0 if scales is None else scales.data_ptr(), 0, 0
    return stored


def _start(weight: tuple[str, int, int], x: torch.Tensor, dtype: torch.dtype, x_scales: torch.Tensor | None, N: int,
           stored: Callable[[Config], tuple[bytes | int, ...]], bias: torch.Tensor | None, activation: str | None,
           residual: torch.Tensor | None, gated: bool, picked: Plan | None) -> torch.Tensor:
    """weight: kind, values of k that share a scale of int4, columns; dtype: of the result. stored(config): maps of W and of int4's scales,
    address of other scales, how int4 is grouped."""
    rows, device, half = x.numel() // x.shape[-1], x.device.index, N // 2 if gated else 0
    out = x.new_empty((*x.shape[:-1], half or N), dtype=dtype)
    x, x_stride, K = aligned_x(x, rows)
    bias_at, residual_at, residual_stride, _held = added(bias, residual)
    wide = int(not ((half or N) % 4 or residual_stride % 4 or residual_at % 8))
    config, splits = picked or _picked(*weight[:2], dtype, rows, N, weight[2], K, device)
    of_features, of_rows = tiles_of(config, rows, N)
    blocks = of_features * of_rows * splits if splits > 1 else min(of_features * of_rows, multiprocessors(device))
    w_map, scale_map, scale_at, shift, record = stored(config)
    out_map, of_out = w_map, half or N
    if splits == 1 and not of_out % 8 and not (residual_at and (gated or residual_stride % 8 or residual_at % 16)):
        wide, out_map = 2, tiles(out.data_ptr(), dtype, (of_out, rows), (of_out,), (32 if gated else 64, BUFFER_ROWS))
    x_map = tiles(x.data_ptr(), x.dtype, (K, rows), (x_stride,), (config.chunk, config.columns))
    _loaded(config, splits, device)(
        blocks, 1, 1, w_map, x_map, scale_map, out_map, scale_at, 0 if x_scales is None else x_scales.data_ptr(), bias_at, residual_at,
        out.data_ptr(), residual_stride, rows, N, half, -(-K // config.depth), splits, wide, shift, record, *form_of(activation))
    return out
