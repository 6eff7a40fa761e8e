"""A linear layer with weights of four bits: y = act(x W^T + bias) + residual, W = (q - zero) * scale, one scale a row and group of k.

The weights lie as ftops/packing.py says (ftops.quant makes them so). On a GPU few rows of x read them at memory speed in one kernel; more
have one of their own on Hopper, where that is faster, while elsewhere W is written out once in x's dtype and the library multiplies.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_beside, check_tensors, invalid, register, straight
from ftops.ops.gated_activation import GLU
from ftops.ops.linear import after_norm, check_beside_weight, columns, followed, library, with_gate, with_norm
from ftops.ops.linear import reference as linear_reference
from ftops.packing import PIECE_K, dequantise_4bit, described, pack_4bit, pack_groups, tiles_of
from ftops.samples import randn

GROUP_SIZES = (32, 64, 128)
MAX_ROWS = 64  # of x that the kernel for few is for; on Hopper that for many takes them earlier


def reference(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, *rest: Any) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear_reference(x, dequantise_4bit(packed, scales, features, x.shape[-1], wide), *rest).to(x.dtype)


def _library(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, *rest: Any) -> torch.Tensor:
    return library(x, dequantise_4bit(packed, scales, features, x.shape[-1], x.dtype), *rest)


def _cpu(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, *rest: Any) -> torch.Tensor:
    """One row by a kernel of ours; for more, W is written out."""
    if not 0 < x.numel() == x.shape[-1] or not features:
        return _library(x, packed, scales, features, *rest)
    from ftops.numba_kernels.linear_w4a16_cpu import one_row
    return followed(one_row(x, packed, scales, features).view(*x.shape[:-1], features), *rest)


ON_CPU = "PyTorch and Numba"  # the latter for one row of x


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels import linear_sm90_launch as hopper
    from ftops.numba_kernels import linear_w4a16 as few
    from ftops.numba_kernels.dequantise import launch as dequantise
    few_rows = with_norm(with_gate(few.launch, few.GATED_ROWS), few.NORM_ROWS)

    def many(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, *rest: Any) -> torch.Tensor:
        if x.dtype is torch.float32:
            return _library(x, packed, scales, features, *rest)
        bias, activation, residual = rest
        if not hopper.serves_w4a16(x, packed, scales, features):
            return library(x, dequantise(packed, scales, features, x.shape[-1]), bias, activation, residual)
        if activation in GLU:
            return followed(hopper.launch_w4a16(x, packed, scales, features, bias, None, None), None, activation, residual)
        return hopper.launch_w4a16(x, packed, scales, features, bias, activation, residual)
    others = after_norm(many)

    def linear(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, *rest: Any) -> torch.Tensor:
        most = hopper.left_to_others("int4", MAX_ROWS, x.device.index)
        if x.dtype is not torch.float32 and few.serves(x, packed, scales, features, most):
            return few_rows(features, x, packed, scales, features, *rest)
        return others(x, packed, scales, features, *rest)
    return linear


def _fake(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, bias: torch.Tensor | None, activation: str | None,
          *rest: Any) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], columns(features, activation)), dtype=x.dtype, device=x.device)


LINEAR_W4A16 = register("linear_w4a16(Tensor x, Tensor packed, Tensor scales, int features, Tensor? bias, str? activation, "
                        "Tensor? residual, Tensor? norm, float eps) -> Tensor", cpu=after_norm(_cpu), cuda=_cuda, fake=_fake)
_linear_w4a16 = straight(LINEAR_W4A16)


def linear_w4a16(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None = None, *,
                 activation: str | None = None, residual: torch.Tensor | None = None, norm: torch.Tensor | None = None,
                 eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual for x[..., K] and W of `shape` (N, K) in four bits; the result [..., N] is contiguous.

    packed: int32 [tiles, pieces, 32, 4]; scales [tiles, groups, 8, 4], or [tiles, groups, 8, 4, 2] with zero points, of x's dtype
    (float32, float16, bfloat16); groups of 32, 64 or 128 values of k. Sums in float32. norm[K]: x is first
    `ops.rms_norm(x, norm, eps)`. Raises ValueError.
    """
    check_tensors("linear_w4a16", x=x, scales=scales, bias=bias, residual=residual, norm=norm)
    check_beside("linear_w4a16", x.device, packed=packed)
    N, K = shape
    tiles, pieces = tiles_of(N), packed.shape[1] if packed.dim() == 4 else 0
    if packed.dtype is not torch.int32 or packed.shape != (tiles, pieces, 32, 4) or not packed.is_contiguous():
        raise invalid("linear_w4a16", "packed", described(packed), f"contiguous int32 [{tiles}, pieces, 32, 4]")
    sizes = [size for size in GROUP_SIZES if scales.dim() > 1 and scales.shape[1] * size == PIECE_K * pieces]
    if not (sizes and pieces and 0 <= PIECE_K * pieces - K < sizes[0]):
        raise invalid("linear_w4a16", "packed, scales", f"{described(packed)}, {described(scales)}",
                      f"groups of 32, 64 or 128 values of k, as many as K = {K} needs")
    if scales.shape not in ((tiles, scales.shape[1], 8, 4), (tiles, scales.shape[1], 8, 4, 2)) or not scales.is_contiguous():
        raise invalid("linear_w4a16", "scales", described(scales), f"contiguous [{tiles}, groups, 8, 4] or [{tiles}, groups, 8, 4, 2]")
    check_beside_weight("linear_w4a16", x, N, K, bias, activation, residual, norm)
    return _linear_w4a16(x, packed, scales, N, bias, activation, residual, norm, eps)


def cases() -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], N: int, group_size: int = 128, zeros: bool = False, bias: bool = False,
             activation: str | None = None, residual: bool = False, norm: bool = False) -> Case:
        def make(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            K = shape[-1]
            q = torch.randint(16, (N, K), dtype=torch.uint8)
            scales = (torch.rand(N, -(-K // group_size)) + 0.5) / (8 * K ** 0.5)
            if zeros:
                scales = torch.stack((scales, torch.randint(16, scales.shape)), -1)
            weight = pack_4bit(q, group_size).to(device), pack_groups(scales).to(device, dtype), (N, K)
            return (randn(shape, device, dtype), *weight, randn((N,), device, dtype) if bias else None), {
                "activation": activation, "residual": randn((*shape[:-1], columns(N, activation)), device, dtype) if residual else None,
                "norm": randn((K,), device, dtype) if norm else None}
        return Case(name, make)

    yield case("row", (1, 1, 4096), 96)
    yield case("zeros", (3, 5, 768), 70, zeros=True, activation="gelu", residual=True, bias=True)
    yield case("group_64", (16, 640), 64, 64, zeros=True)
    yield case("group_32", (20, 1, 352), 32, 32, residual=True)
    yield case("two_batches", (40, 256), 64, activation="silu")
    yield case("many", (70, 256), 96, bias=True, residual=True)
    yield case("k_ends", (9, 1000), 33, zeros=True)
    yield case("odd", (2, 111), 7, bias=True)
    yield case("row_odd", (1, 1000), 70, 64, zeros=True, activation="relu")
    yield case("gated", (2, 1, 768), 96, bias=True, activation="swiglu", residual=True)
    yield case("gated_tiles", (1, 1, 4096), 320, activation="swiglu")
    yield case("gated_everything", (9, 328), 192, 64, zeros=True, bias=True, activation="geglu", residual=True)
    yield case("gated_many", (70, 256), 64, activation="geglu")
    yield case("norm", (3, 1, 1000), 96, bias=True, norm=True)
    yield case("norm_gated", (8, 768), 128, activation="swiglu", norm=True)
    yield case("norm_many", (70, 256), 64, residual=True, norm=True)
    yield case("empty", (0, 64), 8, 64, bias=True)
    yield Case("columns", lambda device, dtype: (
        (randn((4, 512), device, dtype)[:, 124:380], pack_4bit(torch.randint(16, (48, 256), dtype=torch.uint8), 128).to(device),
         pack_groups(torch.rand(48, 2) * 0.02).to(device, dtype), (48, 256)), {}))
