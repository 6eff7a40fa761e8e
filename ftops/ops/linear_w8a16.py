"""A linear layer with weights of eight bits: y = act(x W^T + bias) + residual, W = q * scale, one scale a row.

The weights lie as ftops/packing.py says (ftops.quant makes them so). On a GPU few rows of x read them at memory speed in one kernel;
for more, W is written out once in x's dtype and the library multiplies.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ftops.op import Case, check_beside, check_tensors, invalid, register, straight
from ftops.ops.linear import check_beside_weight, library
from ftops.ops.linear import reference as linear_reference
from ftops.ops.linear_w4a16 import fake, on_gpu, sample
from ftops.packing import PIECE_K, dequantise_8bit, described, pack_8bit, pack_groups, tiles_of

KERNEL = "linear_packed"


def reference(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, bias: torch.Tensor | None,
              activation: str | None, residual: torch.Tensor | None) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear_reference(x, dequantise_8bit(packed, scales, features, x.shape[-1], wide), bias, activation, residual).to(x.dtype)


def _library(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, *rest: Any) -> torch.Tensor:
    return library(x, dequantise_8bit(packed, scales, features, x.shape[-1], x.dtype), *rest)


LINEAR_W8A16 = register("linear_w8a16(Tensor x, Tensor packed, Tensor scales, int features, Tensor? bias, str? activation, "
                        "Tensor? residual) -> Tensor", cpu=_library, cuda=on_gpu, fake=fake)
_linear_w8a16 = straight(LINEAR_W8A16)


def linear_w8a16(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None = None, *,
                 activation: str | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
    """act(x W^T + bias) + residual for x[..., K] and W of `shape` (N, K) in eight bits; the result [..., N] is contiguous.

    packed: int32 [tiles, pieces, 2, 32, 4]; scales [tiles, 1, 8, 4] of x's dtype (float32, float16, bfloat16). Sums in float32.
    Raises ValueError.
    """
    check_tensors("linear_w8a16", x=x, scales=scales, bias=bias, residual=residual)
    check_beside("linear_w8a16", x.device, packed=packed)
    N, K = shape
    tiles, pieces = tiles_of(N), -(-K // PIECE_K)
    if packed.dtype is not torch.int32 or packed.shape != (tiles, pieces, 2, 32, 4) or not packed.is_contiguous():
        raise invalid("linear_w8a16", "packed", described(packed), f"contiguous int32 ({tiles}, {pieces}, 2, 32, 4)")
    if scales.shape != (tiles, 1, 8, 4) or not scales.is_contiguous():
        raise invalid("linear_w8a16", "scales", described(scales), f"contiguous ({tiles}, 1, 8, 4)")
    check_beside_weight("linear_w8a16", x, N, K, bias, activation, residual)
    return _linear_w8a16(x, packed, scales, N, bias, activation, residual)


def cases() -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], N: int, **options: Any) -> Case:
        def make(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            packed = pack_8bit(torch.randint(-128, 128, (N, shape[-1]), dtype=torch.int8))
            scales = pack_groups((torch.rand(N, 1) + 0.5) / (100 * shape[-1] ** 0.5))
            return sample(shape, N, packed, scales, device, dtype, **options)
        return Case(name, make)

    yield case("row", (1, 1, 4096), 96)
    yield case("batch", (8, 1, 1024), 256, bias=True)
    yield case("everything", (3, 5, 768), 70, bias=True, activation="gelu", residual=True)
    yield case("two_batches", (40, 256), 64, activation="silu")
    yield case("many", (70, 256), 96, bias=True, residual=True)
    yield case("k_ends", (9, 1000), 33)
    yield case("odd", (2, 111), 7, bias=True)
    yield case("vector", (256,), 48, activation="relu")
    yield case("empty", (0, 64), 8, bias=True)
