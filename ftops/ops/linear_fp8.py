"""A linear layer with weights in float8 e4m3: y = act(x W^T + bias) + residual, W = values * scale, one scale a row.

The values lie as W does, row by row. On a GPU few rows of x, as they are, meet them in one kernel at memory speed. More are rounded
to e4m3 as well, one scale a row, and a kernel of ours (on Hopper, where it is faster or the library refuses) or the library multiplies
in eight bits (compute capability 8.9 and up, N and K multiples of 16); elsewhere W is written out in x's dtype.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, register, straight
from ftops.ops.bias_activation import ACTIVATIONS
from ftops.ops.gated_activation import GLU
from ftops.ops.linear import after_norm, columns, fake, followed, library, make_few_rows, make_many_rows, make_narrow
from ftops.ops.linear import reference as linear_reference
from ftops.ops.linear_w8a16 import check_8bit
from ftops.samples import randn

MAX_ROWS = 64  # of x that are multiplied as they are
FP8 = torch.float8_e4m3fn


def dequantise(values: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """values * scale [N, columns], rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return (values[:, :columns].to(wide) * scales.unsqueeze(-1)).to(dtype)


def reference(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear_reference(x, dequantise(values, scales, x.shape[-1], wide), *rest).to(x.dtype)


def _library(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
    return library(x, dequantise(values, scales, x.shape[-1], x.dtype), *rest)


KERNEL = "linear"  # its file serves this op too


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.linear import serves
    from ftops.numba_kernels.linear_sm90_launch import can_serve, left_to_others
    from ftops.numba_kernels.linear_sm90_launch import serves as serves_many
    few_rows, narrow, narrow_library = make_few_rows(), make_narrow(FP8), make_narrow_library()
    many_rows, written_out = after_norm(make_many_rows()), after_norm(_library)

    def many(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
        N, width = values.shape
        beyond, refused = x.numel() > MAX_ROWS * x.shape[-1], (N | width) % 16 or not values.is_contiguous()
        if not beyond and serves_many(x, values):
            return many_rows(x, values, scales, *rest)
        # What the library refuses ours multiplies in 8 bits too: 5000x2064, 256 rows, written out took 107 us on an H100 and cuBLAS 15.
        if beyond and (serves_many(x, values, True, behind(*rest[:3])) or (refused and can_serve(x, values))):
            return narrow(x, None, values, scales, *rest)
        if refused or x.dtype is torch.float32 or not x.numel() or not multiplies_fp8(x.device):
            return written_out(x, values, scales, *rest)
        return narrow_library(x, None, values, scales, *rest)

    def linear(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
        few = serves(x, values, left_to_others("e4m3", MAX_ROWS, x.device.index))
        return (few_rows if few else many)(x, values, scales, *rest)
    return linear


def behind(bias: torch.Tensor | None, activation: str | None, residual: torch.Tensor | None) -> int:
    """Bytes that are read and written for each value of the library's product to do what comes after it."""
    return (4 if bias is not None or activation in ACTIVATIONS else 0) + (3 if activation in GLU else 0) + (0 if residual is None else 6)


def multiplies_fp8(device: torch.device) -> bool:
    from ftops.numba_kernels.launch import capability
    return capability(device.index) >= (8, 9)


def make_narrow_library() -> Callable[..., torch.Tensor]:
    """narrow(x, None, values, scales, bias, activation, residual, norm, eps): x, normed, rounded to e4m3, and the library's product."""
    from ftops.numba_kernels.quantise_rows import launch as quantise

    def narrow(x: torch.Tensor, smooth: None, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
               activation: str | None, residual: torch.Tensor | None, norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
        x8, x_scales = quantise(x, FP8, smooth, norm, eps)
        y = torch._scaled_mm(x8, values.t(), scale_a=x_scales.unsqueeze(1), scale_b=scales.unsqueeze(0), out_dtype=torch.bfloat16)
        return followed(y.to(x.dtype).view(*x.shape[:-1], -1), bias, activation, residual)
    return narrow


LINEAR_FP8 = register("linear_fp8(Tensor x, Tensor values, Tensor scales, Tensor? bias, str? activation, Tensor? residual, "
                      "Tensor? norm, float eps) -> Tensor", cpu=after_norm(_library), cuda=_cuda, fake=fake)
_linear_fp8 = straight(LINEAR_FP8)


def linear_fp8(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None, *,
               activation: str | None = None, residual: torch.Tensor | None = None, norm: torch.Tensor | None = None,
               eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual for x[..., K] and W = values[N, K] * scales[N]; the result [..., N] is contiguous.

    values: float8_e4m3fn without NaN; scales: float32; x, bias and residual of one dtype (float32, float16, bfloat16; sums in float32).
    values may have more columns than x, to the next multiple of 16, which are zeros. More than 64 rows of x are rounded to e4m3 on
    GPUs that multiply it. norm[K]: x is first `ops.rms_norm(x, norm, eps)`, as in `linear`, or in the pass that rounds it, without being
    rounded to its own dtype between. Raises ValueError.
    """
    check_8bit("linear_fp8", FP8, x, values, scales, bias, activation, residual, norm)
    return _linear_fp8(x, values, scales, bias, activation, residual, norm, eps)


def cases() -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], N: int, bias: bool = False, activation: str | None = None,
             residual: bool = False, norm: bool = False) -> Case:
        def make(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            K = shape[-1]
            values = torch.nn.functional.pad(torch.randn(N, K) * 100, (0, -K % 16)).clamp(-448, 448).to(FP8)
            scales = (torch.rand(N) + 0.5) / (100 * K ** 0.5)
            return (randn(shape, device, dtype), values.to(device), scales.to(device), randn((N,), device, dtype) if bias else None), {
                "activation": activation, "residual": randn((*shape[:-1], columns(N, activation)), device, dtype) if residual else None,
                "norm": randn((K,), device, dtype) if norm else None}
        return Case(name, make)

    yield case("row", (1, 1, 4096), 96)
    yield case("everything", (3, 5, 768), 70, bias=True, activation="gelu", residual=True)
    yield case("two_batches", (40, 256), 64, activation="silu")
    yield case("many", (70, 256), 96, bias=True, residual=True)
    yield case("many_odd", (5, 20, 200), 33, bias=True, activation="relu")
    yield case("k_ends", (9, 1000), 33)
    yield case("gated", (2, 1, 768), 96, bias=True, activation="swiglu", residual=True)
    yield case("gated_many", (70, 256), 64, activation="geglu")
    yield case("norm", (3, 1, 1000), 96, bias=True, norm=True)
    yield case("norm_gated", (16, 768), 96, activation="swiglu", norm=True)
    yield case("norm_many", (70, 256), 64, residual=True, norm=True)
    yield case("empty", (0, 64), 8, bias=True)
