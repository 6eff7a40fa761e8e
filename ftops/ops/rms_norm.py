"""Root-mean-square normalisation with an optional fused residual.

    s = x + residual (rounded to x's dtype);   y = s / sqrt(mean(s^2) + eps) * (offset + weight)

Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019. offset = 1 is Gemma's form.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_tensors, invalid, register, straight
from ftops.samples import randn


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (offset + weight.to(wide.dtype))).to(x.dtype)


def reference_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                       offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return reference(total, weight, eps, offset), total


def _cpu(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    if offset:
        return reference(x, weight, eps, offset).contiguous()
    return torch.rms_norm(x, weight.shape, weight, eps).contiguous()


def _cpu_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                  offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).contiguous()
    return _cpu(total, weight, eps, offset), total


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.rms_norm import launch
    return lambda x, weight, eps, offset: launch(x, None, weight, eps, offset)[0]


def _cuda_residual() -> Callable[..., Any]:
    from ftops.numba_kernels.rms_norm import launch
    return launch


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


RMS_NORM = register("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
                    cpu=_cpu, cuda=_cuda, fake=lambda x, *_: _empty(x))
_rms_norm = straight(RMS_NORM)
ADD_RMS_NORM = register("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
                        cpu=_cpu_residual, cuda=_cuda_residual, fake=lambda x, *_: (_empty(x), _empty(x)))
_add_rms_norm = straight(ADD_RMS_NORM)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None,
             offset: float = 0.0) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalises the last dimension of x[..., N] by its root mean square and multiplies by (offset + weight[N]).

    With residual[..., N], normalises x + residual and returns (y, x + residual). All of one dtype (float32, float16, bfloat16;
    sums in float32), any strides; the results are contiguous. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_tensors("rms_norm", x=x, weight=weight, residual=residual)
    shape = x.shape
    if not shape:
        raise invalid("rms_norm", "x.dim()", 0, "1 or more")
    if weight.shape != shape[-1:]:
        raise invalid("rms_norm", "weight.shape", tuple(weight.shape), f"({shape[-1]},), x's last dimension")
    if residual is None:
        return _rms_norm(x, weight, eps, offset)
    if residual.shape != shape:
        raise invalid("rms_norm", "residual.shape", tuple(residual.shape), f"{tuple(shape)}, x's shape")
    return _add_rms_norm(x, residual, weight, eps, offset)


def cases() -> Iterator[Case]:
    for name, shape in {"row": (1, 4096), "llama": (3, 5, 4096), "odd": (3, 7, 111), "one": (5, 1), "head": (2, 9, 4, 128),
                        "long": (2, 20000), "empty": (0, 64), "vector": (768,)}.items():
        yield Case(name, lambda device, dtype, shape=shape: ((randn(shape, device, dtype), randn(shape[-1:], device, dtype), 1e-6), {}))
    for name, shape in {"residual": (4, 33, 1024), "residual_odd": (7, 111), "residual_empty": (0, 64)}.items():
        yield Case(name, lambda device, dtype, shape=shape: (
            (randn(shape, device, dtype), randn(shape[-1:], device, dtype), 1e-5), {"residual": randn(shape, device, dtype)}))
    yield Case("offset", lambda device, dtype: ((randn((6, 256), device, dtype), randn((256,), device, dtype), 1e-6), {"offset": 1.0}))
    yield Case("tiny", lambda device, dtype: ((randn((6, 256), device, dtype, 1e-3), randn((256,), device, dtype), 1e-5), {}))
    yield Case("sliced", lambda device, dtype: ((randn((5, 300), device, dtype)[:, 7:263], randn((256,), device, dtype), 1e-6), {}))
    yield Case("head_sliced", lambda device, dtype: (
        (randn((2, 9, 6, 128), device, dtype)[:, :, 1:5], randn((128,), device, dtype), 1e-6), {}))
    yield Case("transposed", lambda device, dtype: (
        (randn((64, 3, 5), device, dtype).permute(2, 1, 0), randn((128,), device, dtype)[::2], 1e-6),
        {"residual": randn((64, 5, 3), device, dtype).permute(1, 2, 0)}))
