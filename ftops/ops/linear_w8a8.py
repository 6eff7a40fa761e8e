"""A linear layer in 8-bit integers: y = act((x / smooth) W^T + bias) + residual, W = values * scale, one scale a row.

smooth moves the outliers of activations, a column each, into the weights (Xiao et al., "SmoothQuant", 2023); W is what was multiplied
with it. On a GPU, many rows of x / smooth are rounded to int8, one scale a row, and a kernel of ours (on Hopper, where it is faster) or the
library multiplies in integers; few meet the weights as they are, in one kernel at memory speed.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_beside, invalid, register, straight
from ftops.ops.gated_activation import GLU
from ftops.ops.linear import columns, fake, followed, make_narrow, normed, reference_normed
from ftops.ops.linear_w8a16 import LINEAR_W8A16, MAX_ROWS, check_8bit
from ftops.ops.linear_w8a16 import reference as w8a16_reference
from ftops.packing import described
from ftops.samples import randn


def smoothed(x: torch.Tensor, smooth: torch.Tensor | None) -> torch.Tensor:
    """x / smooth, rounded once to x's dtype."""
    return x if smooth is None else (x / smooth).to(x.dtype)


def reference(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, smooth: torch.Tensor | None, *given: Any) -> torch.Tensor:
    *rest, norm, eps = given
    return w8a16_reference(smoothed(reference_normed(x, norm, eps), smooth), values, scales, *rest).to(x.dtype)


def _w8a16(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, smooth: torch.Tensor | None, *given: Any) -> torch.Tensor:
    """With a norm in the same pass where nothing lies between."""
    if smooth is None:
        return LINEAR_W8A16(x, values, scales, *given)
    *rest, norm, eps = given
    return LINEAR_W8A16(smoothed(normed(x, norm, eps), smooth), values, scales, *rest, None, eps)


KERNEL = "linear"  # its file serves this op too
ON_CPU = "PyTorch and Numba"  # the latter for one row of x


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.linear_sm90_launch import serves as serves_many
    narrow, narrow_library = make_narrow(torch.int8), make_narrow_library()

    def many(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, smooth: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        N, width = values.shape
        if serves_many(x, values, narrow=True):
            return narrow(x, smooth, values, scales, *rest)
        if (N | width) % 16 or not values.is_contiguous():
            return _w8a16(x, values, scales, smooth, *rest)
        return narrow_library(x, smooth, values, scales, *rest)

    def linear(x: torch.Tensor, *given: Any) -> torch.Tensor:
        few = x.numel() <= MAX_ROWS * x.shape[-1] or x.dtype is torch.float32
        return (_w8a16 if few else many)(x, *given)
    return linear


def make_narrow_library() -> Callable[..., torch.Tensor]:
    """narrow(x, smooth, values, scales, bias, activation, residual, norm, eps): x, by its norm and by smooth, rounded to int8, and the
    library's product."""
    from ftops.numba_kernels.quantise_rows import launch as quantise
    from ftops.numba_kernels.scale_product import launch as scale_product

    def narrow(x: torch.Tensor, smooth: torch.Tensor | None, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
               activation: str | None, residual: torch.Tensor | None, norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
        x8, x_scales = quantise(x, torch.int8, smooth, norm, eps)
        product, late = torch._int_mm(x8, values.t()), activation in GLU
        y = scale_product(product, x_scales, scales, x.dtype, bias, None if late else activation, None if late else residual)
        y = y.view(*x.shape[:-1], -1)
        return followed(y, None, activation, residual) if late else y
    return narrow


LINEAR_W8A8 = register("linear_w8a8(Tensor x, Tensor values, Tensor scales, Tensor? smooth, Tensor? bias, str? activation, "
                       "Tensor? residual, Tensor? norm, float eps) -> Tensor", cpu=_w8a16, cuda=_cuda, fake=fake)
_linear_w8a8 = straight(LINEAR_W8A8)


def linear_w8a8(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, smooth: torch.Tensor | None = None,
                bias: torch.Tensor | None = None, *, activation: str | None = None, residual: torch.Tensor | None = None,
                norm: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """act((x / smooth) W^T + bias) + residual for x[..., K], W = values[N, K] * scales[N] and smooth[K]; the result is contiguous.

    values: int8; scales, smooth: float32; x, bias and residual of one dtype (float32, float16, bfloat16). values may have more columns
    than x, to the next multiple of 16, which are zeros. On a GPU more than 64 rows of x, in 16 bits, are rounded to int8, one scale a
    row; before Hopper if N is a multiple of 16. norm[K]: x is first `ops.rms_norm(x, norm, eps)`, as in `linear`, or in the pass that
    rounds it, without being rounded to its own dtype between. Raises ValueError.
    """
    check_8bit("linear_w8a8", torch.int8, x, values, scales, bias, activation, residual, norm)
    check_beside("linear_w8a8", x.device, smooth=smooth)
    K = x.shape[-1]
    if smooth is not None and (smooth.dtype is not torch.float32 or smooth.shape != (K,) or not smooth.is_contiguous()):
        raise invalid("linear_w8a8", "smooth", described(smooth), f"contiguous float32 ({K},)")
    return _linear_w8a8(x, values, scales, smooth, bias, activation, residual, norm, eps)


def cases() -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], N: int, smooth: bool = False, bias: bool = False, activation: str | None = None,
             residual: bool = False, norm: bool = False) -> Case:
        def make(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            K = shape[-1]
            values = torch.nn.functional.pad(torch.randint(-127, 128, (N, K), dtype=torch.int8), (0, -K % 16)).to(device)
            scales, smoothing = (torch.rand(N) + 0.5) / (100 * K ** 0.5), torch.rand(K) + 0.5
            return (randn(shape, device, dtype), values, scales.to(device), smoothing.to(device) if smooth else None,
                    randn((N,), device, dtype) if bias else None), {
                "activation": activation, "residual": randn((*shape[:-1], columns(N, activation)), device, dtype) if residual else None,
                "norm": randn((K,), device, dtype) if norm else None}
        return Case(name, make)

    yield case("row", (1, 1, 4096), 96)
    yield case("everything", (3, 5, 768), 70, smooth=True, bias=True, activation="gelu", residual=True)
    yield case("many", (70, 256), 96, bias=True, residual=True)
    yield case("many_everything", (5, 20, 200), 80, smooth=True, bias=True, activation="silu", residual=True)
    yield case("many_odd", (80, 111), 33, smooth=True, bias=True, activation="relu")
    yield case("gated", (2, 1, 768), 96, bias=True, activation="swiglu", residual=True)
    yield case("gated_many", (70, 256), 64, activation="geglu")
    yield case("norm", (3, 1, 1000), 96, bias=True, norm=True)
    yield case("norm_gated", (16, 768), 96, activation="swiglu", norm=True)
    yield case("norm_smooth", (3, 256), 64, smooth=True, norm=True)
    yield case("norm_many", (70, 256), 64, residual=True, norm=True)
    yield case("norm_smooth_many", (5, 20, 200), 80, smooth=True, norm=True)
    yield case("empty", (0, 64), 8, bias=True)
