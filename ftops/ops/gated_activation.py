"""The gated activation of a transformer's MLP: y = act(x[..., :I]) * x[..., I:].

Shazeer, "GLU Variants Improve Transformer", 2020. The input is what one fused gate-and-up linear gives, which may as well do it itself:
its `activation` is then one of GLU.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_tensors, invalid, register, straight
from ftops.ops.bias_activation import ACTIVATIONS
from ftops.samples import randn

GLU = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "quick_geglu": "quick_gelu"}


def reference(x: torch.Tensor, kind: str) -> torch.Tensor:
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (ACTIVATIONS[kind](gate) * up).to(x.dtype)


def _cpu(x: torch.Tensor, kind: str) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[kind](gate).mul_(up).contiguous()


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.gated_activation import launch
    return launch


def _fake(x: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


GATED_ACTIVATION = register("gated_activation(Tensor x, str kind) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake)
_gated_activation = straight(GATED_ACTIVATION)


def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """act(x[..., :I]) * x[..., I:] for x[..., 2 I]; kind is silu, gelu, gelu_tanh, relu or quick_gelu.

    float32, float16 or bfloat16 (arithmetic in float32), any strides; the result [..., I] is contiguous. Raises ValueError.
    """
    check_tensors("gated_activation", x=x)
    if kind not in ACTIVATIONS:
        raise invalid("gated_activation", "kind", repr(kind), ", ".join(ACTIVATIONS))
    shape = x.shape
    if not shape or shape[-1] % 2:
        raise invalid("gated_activation", "x.shape", tuple(shape), "an even last dimension, gate then up")
    return _gated_activation(x, kind)


def cases() -> Iterator[Case]:
    for kind in ACTIVATIONS:
        yield Case(kind, lambda device, dtype, kind=kind: ((randn((3, 5, 1408), device, dtype, 3.0), kind), {}))
    for name, shape in {"odd": (7, 222), "one": (1, 2), "empty": (0, 64), "wide": (2, 28672)}.items():
        yield Case(name, lambda device, dtype, shape=shape: ((randn(shape, device, dtype), "silu"), {}))
    yield Case("sliced", lambda device, dtype: ((randn((9, 300), device, dtype)[:, 3:259], "gelu"), {}))
    yield Case("transposed", lambda device, dtype: ((randn((64, 9), device, dtype).T, "silu"), {}))
