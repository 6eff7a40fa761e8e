"""Layer normalisation with an optional fused residual.

    s = x + residual (rounded to x's dtype);   y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Ba, Kiros & Hinton, "Layer Normalization", 2016. The variance is the biased one, as in torch.nn.LayerNorm.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_tensors, invalid, register, straight
from ftops.samples import randn


def reference(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
              residual: torch.Tensor | None = None) -> torch.Tensor:
    x = _total(x, residual)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight
    if bias is not None:
        wide = wide + bias
    return wide.to(x.dtype)


def reference_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
                       eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return reference(total, weight, bias, eps), total


def _total(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return x if residual is None else x + residual


def _cpu(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
         residual: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.layer_norm(_total(x, residual), x.shape[-1:], weight, bias, eps).contiguous()


def _cpu_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
                  eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).contiguous()
    return _cpu(total, weight, bias, eps), total


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.layer_norm import launch
    return lambda x, weight, bias, eps, residual=None: launch(x, residual, weight, bias, eps, False)[0]


def _cuda_residual() -> Callable[..., Any]:
    from ftops.numba_kernels.layer_norm import launch
    return launch


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


LAYER_NORM = register("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual=None) -> Tensor",
                      cpu=_cpu, cuda=_cuda, fake=lambda x, *_: _empty(x))
_layer_norm = straight(LAYER_NORM)
ADD_LAYER_NORM = register("add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
                          cpu=_cpu_residual, cuda=_cuda_residual, fake=lambda x, *_: (_empty(x), _empty(x)))
_add_layer_norm = straight(ADD_LAYER_NORM)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *,
               residual: torch.Tensor | None = None, return_sum: bool = True) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalises the last dimension of x[..., N] to mean 0 and variance 1, then scales by weight[N] and adds bias[N].

    With residual[..., N], normalises x + residual and returns (y, x + residual), or y alone, which spares a GPU a quarter of the bytes,
    without return_sum. weight and bias may be None. All of one dtype (float32, float16, bfloat16; sums in float32), any strides; the
    results are contiguous. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_tensors("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    shape = x.shape
    if not shape:
        raise invalid("layer_norm", "x.dim()", 0, "1 or more")
    if weight is not None and weight.shape != shape[-1:]:
        raise invalid("layer_norm", "weight.shape", tuple(weight.shape), f"({shape[-1]},), x's last dimension")
    if bias is not None and bias.shape != shape[-1:]:
        raise invalid("layer_norm", "bias.shape", tuple(bias.shape), f"({shape[-1]},), x's last dimension")
    if residual is None:
        return _layer_norm(x, weight, bias, eps)
    if residual.shape != shape:
        raise invalid("layer_norm", "residual.shape", tuple(residual.shape), f"{tuple(shape)}, x's shape")
    return _add_layer_norm(x, residual, weight, bias, eps) if return_sum else _layer_norm(x, weight, bias, eps, residual)


def cases() -> Iterator[Case]:
    def vectors(size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return randn((size,), device, dtype), randn((size,), device, dtype)

    for name, shape in {"row": (1, 4096), "odd": (3, 7, 111), "one": (5, 1), "bert": (2, 9, 768), "long": (2, 20000),
                        "empty": (0, 64), "vector": (768,)}.items():
        yield Case(name, lambda device, dtype, shape=shape: ((randn(shape, device, dtype), *vectors(shape[-1], device, dtype), 1e-6), {}))
    for name, shape in {"residual": (4, 33, 1024), "residual_odd": (7, 111), "residual_empty": (0, 64)}.items():
        yield Case(name, lambda device, dtype, shape=shape: (
            (randn(shape, device, dtype), *vectors(shape[-1], device, dtype), 1e-5), {"residual": randn(shape, device, dtype)}))
    for name, shape in {"residual_alone": (4, 33, 1024), "residual_alone_long": (2, 20000)}.items():
        yield Case(name, lambda device, dtype, shape=shape: (
            (randn(shape, device, dtype), *vectors(shape[-1], device, dtype), 1e-5),
            {"residual": randn(shape, device, dtype), "return_sum": False}))
    yield Case("plain", lambda device, dtype: ((randn((6, 256), device, dtype), None, None, 1e-6), {}))
    yield Case("no_bias", lambda device, dtype: ((randn((6, 256), device, dtype), randn((256,), device, dtype), None, 1e-6), {}))
    yield Case("bias_only", lambda device, dtype: (
        (randn((6, 256), device, dtype), None, randn((256,), device, dtype), 1e-6), {"residual": randn((6, 256), device, dtype)}))
    yield Case("far_from_zero", lambda device, dtype: ((randn((8, 1024), device, dtype) + 100, *vectors(1024, device, dtype), 1e-6), {}))
    yield Case("sliced", lambda device, dtype: ((randn((5, 300), device, dtype)[:, 7:263], *vectors(256, device, dtype), 1e-6), {}))
    yield Case("transposed", lambda device, dtype: (
        (randn((64, 3, 5), device, dtype).permute(2, 1, 0), randn((128,), device, dtype)[::2], randn((64,), device, dtype), 1e-6),
        {"residual": randn((64, 5, 3), device, dtype).permute(1, 2, 0)}))
