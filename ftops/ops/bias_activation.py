"""Bias and activation in one pass: y = act(x + bias).

gelu is the exact one (erf), gelu_tanh its tanh approximation (Hendrycks & Gimpel, 2016), quick_gelu is x * sigmoid(1.702 x).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ftops.op import Case, check_tensors, invalid, register, straight
from ftops.samples import randn

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def reference(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return ACTIVATIONS[kind](wide if bias is None else wide + bias).to(x.dtype)


def _cpu(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    out = ACTIVATIONS[kind](x if bias is None else x + bias)
    return out.contiguous()


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.bias_activation import launch
    return launch


def _fake(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


BIAS_ACTIVATION = register("bias_activation(Tensor x, Tensor? bias, str kind) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake)
_bias_activation = straight(BIAS_ACTIVATION)


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    """act(x + bias) for x[..., N] and bias[N] (or None); kind is silu, gelu, gelu_tanh, relu or quick_gelu.

    float32, float16 or bfloat16 (arithmetic in float32), any strides; the result is contiguous. Raises ValueError.
    """
    check_tensors("bias_activation", x=x, bias=bias)
    if kind not in ACTIVATIONS:
        raise invalid("bias_activation", "kind", repr(kind), ", ".join(ACTIVATIONS))
    shape = x.shape
    if not shape:
        raise invalid("bias_activation", "x.dim()", 0, "1 or more")
    if bias is not None and bias.shape != shape[-1:]:
        raise invalid("bias_activation", "bias.shape", tuple(bias.shape), f"({shape[-1]},), x's last dimension")
    return _bias_activation(x, bias, kind)


def cases() -> Iterator[Case]:
    for kind in ACTIVATIONS:
        yield Case(kind, lambda device, dtype, kind=kind: (
            (randn((3, 5, 3072), device, dtype, 3.0), randn((3072,), device, dtype), kind), {}))
    for name, shape in {"odd": (7, 111), "one": (1, 1), "empty": (0, 64), "wide": (2, 28672)}.items():
        yield Case(name, lambda device, dtype, shape=shape: (
            (randn(shape, device, dtype), randn(shape[-1:], device, dtype), "gelu"), {}))
    yield Case("no_bias", lambda device, dtype: ((randn((4, 512), device, dtype), None, "gelu_tanh"), {}))
    yield Case("sliced", lambda device, dtype: ((randn((9, 300), device, dtype)[:, 3:259], randn((256,), device, dtype), "gelu"), {}))
    yield Case("transposed", lambda device, dtype: ((randn((64, 9), device, dtype).T, randn((128,), device, dtype)[::2], "silu"), {}))
