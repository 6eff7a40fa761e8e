"""fp8: weights in float8 e4m3, and activations too where rows are many. W = values * scale, one scale a row or one for all.

Stored: `values`, float8_e4m3fn [N, K up to a multiple of 16, which the kernels' accesses want], zeros there, and `scales`, float32 [N].
The scale is the largest value over 448, the largest that e4m3 has (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
"""
from __future__ import annotations

import torch

from ftops.op import invalid
from ftops.ops import linear_fp8
from ftops.ops.linear_fp8 import FP8, dequantise
from ftops.quant.weight import Layout, QuantizedWeight, check_format, check_weight, cut

VERSION = 1
LAYOUT = Layout()
WIDTH = 16  # values of an access
LARGEST = 448.0


def quantize(weight: torch.Tensor, group_size: int | None = None, per_tensor: bool = False) -> QuantizedWeight:
    """The nearest e4m3 weight of weight[N, K], scaled by row or as a whole; group_size stays None. Raises ValueError."""
    check_weight("fp8", weight)
    if group_size is not None:
        raise invalid("fp8", "group_size", group_size, "None: fp8 has one scale a row, or with per_tensor=True one")
    scales = weight.float().abs().amax(-1) / LARGEST
    if per_tensor:
        scales = scales.amax().expand(len(scales)).contiguous()
    scales = torch.where(scales > 0, scales, 1)
    values = (weight.float() / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    values = torch.nn.functional.pad(values, (0, -weight.shape[1] % WIDTH)).to(FP8)
    return QuantizedWeight("fp8", tuple(weight.shape), {"values": values, "scales": scales},
                           {"version": VERSION, "dtype": str(weight.dtype)[6:]})


def dequantize(qw: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] that `qw` stands for, in its dtype."""
    check_format("fp8", qw)
    return dequantise(qw.tensors["values"], qw.tensors["scales"], qw.shape[1], qw.dtype)


def linear(x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None,
           residual: torch.Tensor | None = None, norm: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual, as ops.linear; also of x's RMS norm."""
    check_format("fp8", qw)
    return linear_fp8(x, qw.tensors["values"], qw.tensors["scales"], bias, activation=activation, residual=residual, norm=norm, eps=eps)


def shard(qw: QuantizedWeight, dim: int, index: int, count: int) -> QuantizedWeight:
    """Shard `index` of `count`: any rows (dim 0), columns (dim 1) in whole accesses of 16. Raises ValueError."""
    check_format("fp8", qw)
    return cut(qw, dim, index, count, 1 if dim == 0 else WIDTH)
