"""A linear layer with weights of eight bits: y = act(x W^T + bias) + residual, W = values * scale, one scale a row.

The values lie as W does, int8, row by row. On a GPU few rows of x read them at memory speed in one kernel; more have one of their own on
Hopper, while elsewhere W is written out once in x's dtype and the library multiplies.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_beside, check_tensors, invalid, register, straight
from ftops.ops.linear import after_norm, check_beside_weight, columns, fake, followed, library, make_few_rows, make_many_rows
from ftops.ops.linear import reference as linear_reference
from ftops.packing import described
from ftops.samples import randn

MAX_ROWS = 64  # of x that the kernel for few is for; on Hopper that for many takes them earlier


def dequantise(values: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """values * scale [N, columns], rounded once to `dtype`, in one pass."""
    out = torch.empty((values.shape[0], columns), dtype=dtype, device=values.device)
    return torch.mul(values[:, :columns], scales.unsqueeze(-1), out=out)


def reference(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear_reference(x, dequantise(values, scales, x.shape[-1], wide), *rest).to(x.dtype)


def _library(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
    return library(x, dequantise(values, scales, x.shape[-1], x.dtype), *rest)


def _cpu(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, activation: str | None,
         residual: torch.Tensor | None) -> torch.Tensor:
    """One row by a kernel of ours, which is of one thread; else PyTorch's product of bfloat16 and int8, a third of the time of its
    bfloat16 product, where that of float16 takes 18 times.

    Of widths that are no multiple of 16 it crashes, or is wrong.
    """
    K, (N, width) = x.shape[-1], values.shape
    if 0 < x.numel() == K and N and values.is_contiguous() and (torch.get_num_threads() == 1 or x.dtype is not torch.bfloat16):
        from ftops.numba_kernels.linear_cpu import one_row
        return followed(one_row(x, values, scales).view(*x.shape[:-1], N), bias, activation, residual)
    if x.dtype is not torch.bfloat16 or not x.numel() or not N or width % 16:
        return _library(x, values, scales, bias, activation, residual)
    rows = torch.nn.functional.pad(x.reshape(-1, K), (0, width - K)).contiguous()
    y = torch._weight_int8pack_mm(rows, values.contiguous(), scales.to(x.dtype))
    return followed(y.view(*x.shape[:-1], -1), bias, activation, residual)


KERNEL = "linear"  # its file serves this op too
ON_CPU = "PyTorch and Numba"  # the latter for one row of x


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.linear import serves
    from ftops.numba_kernels.linear_sm90_launch import left_to_others
    from ftops.numba_kernels.linear_sm90_launch import serves as serves_many
    few_rows, many_rows = make_few_rows(), make_many_rows()

    def many(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
        return (many_rows if serves_many(x, values) else _library)(x, values, scales, *rest)
    others = after_norm(many)

    def linear(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
        few = serves(x, values, left_to_others("int8", MAX_ROWS, x.device.index))
        return (few_rows if few else others)(x, values, scales, *rest)
    return linear


LINEAR_W8A16 = register("linear_w8a16(Tensor x, Tensor values, Tensor scales, Tensor? bias, str? activation, Tensor? residual, "
                        "Tensor? norm, float eps) -> Tensor", cpu=after_norm(_cpu), cuda=_cuda, fake=fake)
_linear_w8a16 = straight(LINEAR_W8A16)


def check_8bit(op: str, kind: torch.dtype, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
               activation: str | None, residual: torch.Tensor | None, norm: torch.Tensor | None) -> None:
    """What a linear op is given whose weights are values[N, K] of `kind`, one scale a row."""
    check_tensors(op, x=x, bias=bias, residual=residual, norm=norm)
    check_beside(op, x.device, values=values, scales=scales)
    if values.dtype is not kind or values.dim() != 2:
        raise invalid(op, "values", described(values), f"{str(kind).removeprefix('torch.')} [N, K]")
    N, width = values.shape
    if scales.dtype is not torch.float32 or scales.shape != (N,) or not scales.is_contiguous():
        raise invalid(op, "scales", described(scales), f"contiguous float32 ({N},)")
    K = x.shape[-1] if x.dim() else 0
    check_beside_weight(op, x, N, K if 0 <= width - K < 16 else width, bias, activation, residual, norm)


def linear_w8a16(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None, *,
                 activation: str | None = None, residual: torch.Tensor | None = None, norm: torch.Tensor | None = None,
                 eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual for x[..., K] and W = values[N, K] * scales[N]; the result [..., N] is contiguous.

    values: int8; scales: float32; x, bias and residual of one dtype (float32, float16, bfloat16; sums in float32). values may have
    more columns than x, to the next multiple of 16, which are zeros: the kernel for few rows of x takes whole accesses alone.
    norm[K]: x is first `ops.rms_norm(x, norm, eps)`, as in `linear`. Raises ValueError.
    """
    check_8bit("linear_w8a16", torch.int8, x, values, scales, bias, activation, residual, norm)
    return _linear_w8a16(x, values, scales, bias, activation, residual, norm, eps)


def cases() -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], N: int, bias: bool = False, activation: str | None = None,
             residual: bool = False, norm: bool = False) -> Case:
        def make(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            K = shape[-1]
            values = torch.nn.functional.pad(torch.randint(-128, 128, (N, K), dtype=torch.int8), (0, -K % 16))
            scales = (torch.rand(N) + 0.5) / (100 * K ** 0.5)
            return (randn(shape, device, dtype), values.to(device), scales.to(device), randn((N,), device, dtype) if bias else None), {
                "activation": activation, "residual": randn((*shape[:-1], columns(N, activation)), device, dtype) if residual else None,
                "norm": randn((K,), device, dtype) if norm else None}
        return Case(name, make)

    yield case("row", (1, 1, 4096), 96)
    yield case("everything", (3, 5, 768), 70, bias=True, activation="gelu", residual=True)
    yield case("two_batches", (40, 256), 64, activation="silu")
    yield case("many", (70, 256), 96, bias=True, residual=True)
    yield case("k_ends", (9, 1000), 33)
    yield case("odd", (2, 111), 7, bias=True)
    yield case("row_odd", (1, 111), 7, bias=True, activation="relu")
    yield case("gated", (2, 1, 768), 96, bias=True, activation="swiglu", residual=True)
    yield case("gated_many", (70, 256), 64, activation="geglu")
    yield case("norm", (3, 1, 1000), 96, bias=True, norm=True)
    yield case("norm_gated", (16, 768), 96, activation="swiglu", norm=True)
    yield case("norm_many", (70, 256), 64, residual=True, norm=True)
    yield case("empty", (0, 64), 8, bias=True)
