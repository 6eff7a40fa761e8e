"""w8a8: weights and activations of eight bits. W * smooth = values * scale, one scale a row; x / smooth is rounded a row at a time.

Stored: `values`, int8 [N, K up to a multiple of 16], zeros there, `scales`, float32 [N], and where activations have outliers `smooth`,
float32 [K] (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023).
"""
from __future__ import annotations

from dataclasses import replace

import torch

from ftops.op import invalid
from ftops.ops import linear_w8a8
from ftops.quant import int8
from ftops.quant.weight import Layout, QuantizedWeight, check_format, check_weight, cut

VERSION = int8.VERSION
LAYOUT = Layout(whole=("smooth",))


def smoothing(largest: torch.Tensor, weight: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """SmoothQuant's smooth[K] from the largest activation of each column, on calibration text, and weight[N, K].

    share: of the difficulty that moves from activations to weights, 0 to 1.
    """
    check_weight("w8a8", weight)
    if largest.shape != weight.shape[1:]:
        raise invalid("w8a8", "largest.shape", tuple(largest.shape), f"({weight.shape[1]},), the weight's last dimension")
    columns = weight.float().abs().amax(0)
    smooth = largest.float().clamp(min=1e-5) ** share / columns.clamp(min=1e-5) ** (1 - share)
    return torch.where(columns > 0, smooth, 1).contiguous()


def quantize(weight: torch.Tensor, group_size: int | None = None, smooth: torch.Tensor | None = None) -> QuantizedWeight:
    """The nearest int8 weight of weight[N, K] * smooth[K]; the scale is a row's, so group_size stays None. Raises ValueError."""
    check_weight("w8a8", weight)
    if group_size is not None:
        raise invalid("w8a8", "group_size", group_size, "None: w8a8 has one scale a row")
    if smooth is None:
        return replace(int8.quantize(weight), format="w8a8")
    if smooth.shape != weight.shape[1:] or not (smooth > 0).all():
        raise invalid("w8a8", "smooth", f"{tuple(smooth.shape)}, positive: {bool((smooth > 0).all())}", f"positive ({weight.shape[1]},)")
    smooth = smooth.float().contiguous()
    qw = int8.quantize(weight.float() * smooth)
    return QuantizedWeight("w8a8", qw.shape, qw.tensors | {"smooth": smooth}, qw.metadata | {"dtype": str(weight.dtype)[6:]})


def dequantize(qw: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] that `qw` stands for, in its dtype."""
    check_format("w8a8", qw)
    smooth = qw.tensors.get("smooth")
    wide = int8.dequantize(replace(qw, format="int8", metadata=qw.metadata | {"dtype": "float32"}))
    return (wide if smooth is None else wide / smooth).to(qw.dtype)


def linear(x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None,
           residual: torch.Tensor | None = None, norm: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual, as ops.linear; also of x's RMS norm."""
    check_format("w8a8", qw)
    return linear_w8a8(x, qw.tensors["values"], qw.tensors["scales"], qw.tensors.get("smooth"), bias, activation=activation,
                       residual=residual, norm=norm, eps=eps)


def shard(qw: QuantizedWeight, dim: int, index: int, count: int) -> QuantizedWeight:
    """Shard `index` of `count`: any rows (dim 0), columns (dim 1) in whole accesses of 16. Raises ValueError."""
    check_format("w8a8", qw)
    without = replace(qw, tensors={name: qw.tensors[name] for name in ("values", "scales")})
    part = cut(without, dim, index, count, 1 if dim == 0 else int8.WIDTH)
    smooth = qw.tensors.get("smooth")
    if smooth is not None:
        part.tensors["smooth"] = smooth.chunk(count)[index].contiguous() if dim == 1 else smooth
    return part
