"""int8: weights of eight bits, W8A16. W = q * scale with one scale a row (output channel).

Stored: `packed`, int32 [tiles, pieces, 2, 32, 4], and `scales`, of the weight's dtype, [tiles, 1, 8, 4]; the layout is that of
ftops/packing.py. The scale is the largest value of the row over 127.
"""
from __future__ import annotations

import torch

from ftops.op import invalid
from ftops.ops import linear_w8a16
from ftops.packing import PIECE_K, TILE_ROWS, dequantise_8bit, pack_8bit, pack_groups
from ftops.quant.weight import QuantizedWeight, check_format, check_weight, cut

VERSION = 1


def quantize(weight: torch.Tensor, group_size: int | None = None) -> QuantizedWeight:
    """The nearest int8 weight of weight[N, K]; the scale is a row's, so group_size stays None. Raises ValueError."""
    check_weight("int8", weight)
    if group_size is not None:
        raise invalid("int8", "group_size", group_size, "None: int8 has one scale a row")
    scale = (weight.float().abs().amax(-1, keepdim=True) / 127).to(weight.dtype)
    scale = torch.where(scale > 0, scale, 1)
    q = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return QuantizedWeight("int8", tuple(weight.shape), {"packed": pack_8bit(q), "scales": pack_groups(scale)}, {"version": VERSION})


def dequantize(qw: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] that `qw` stands for, in its dtype."""
    check_format("int8", qw)
    return dequantise_8bit(qw.tensors["packed"], qw.tensors["scales"], *qw.shape, qw.dtype)


def linear(x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None,
           residual: torch.Tensor | None = None) -> torch.Tensor:
    """act(x W^T + bias) + residual, as ops.linear."""
    check_format("int8", qw)
    return linear_w8a16(x, qw.tensors["packed"], qw.tensors["scales"], qw.shape, bias, activation=activation, residual=residual)


def shard(qw: QuantizedWeight, dim: int, index: int, count: int) -> QuantizedWeight:
    """Shard `index` of `count`: rows (dim 0) in whole tiles of 32, columns (dim 1) in whole pieces of 32. Raises ValueError."""
    check_format("int8", qw)
    return cut(qw, dim, index, count, TILE_ROWS if dim == 0 else PIECE_K)
