"""int8: weights of eight bits, W8A16. W = values * scale with one scale a row (output channel).

Stored: `values`, int8 [N, K up to a multiple of 16, which the kernels' accesses want], zeros there, and `scales`, float32 [N]. The scale is
the largest value of the row over 127.
"""
from __future__ import annotations

import torch

from ftops.op import invalid
from ftops.ops import linear_w8a16
from ftops.ops.linear_w8a16 import dequantise
from ftops.quant.weight import Layout, QuantizedWeight, check_format, check_weight, cut

VERSION = 1
LAYOUT = Layout()
WIDTH = 16  # values of an access


def quantize(weight: torch.Tensor, group_size: int | None = None) -> QuantizedWeight:
    """The nearest int8 weight of weight[N, K]; the scale is a row's, so group_size stays None. Raises ValueError."""
    check_weight("int8", weight)
    if group_size is not None:
        raise invalid("int8", "group_size", group_size, "None: int8 has one scale a row")
    scales = weight.float().abs().amax(-1) / 127
    scales = torch.where(scales > 0, scales, 1)
    values = (weight.float() / scales.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight("int8", tuple(weight.shape), {"values": torch.nn.functional.pad(values, (0, -weight.shape[1] % WIDTH)),
                                                         "scales": scales}, {"version": VERSION, "dtype": str(weight.dtype)[6:]})


def dequantize(qw: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] that `qw` stands for, in its dtype."""
    check_format("int8", qw)
    return dequantise(qw.tensors["values"], qw.tensors["scales"], qw.shape[1], qw.dtype)


def linear(x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None,
           residual: torch.Tensor | None = None, norm: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual, as ops.linear; also of x's RMS norm."""
    check_format("int8", qw)
    return linear_w8a16(x, qw.tensors["values"], qw.tensors["scales"], bias, activation=activation, residual=residual, norm=norm, eps=eps)


def shard(qw: QuantizedWeight, dim: int, index: int, count: int) -> QuantizedWeight:
    """Shard `index` of `count`: any rows (dim 0), columns (dim 1) in whole accesses of 16. Raises ValueError."""
    check_format("int8", qw)
    return cut(qw, dim, index, count, 1 if dim == 0 else WIDTH)
