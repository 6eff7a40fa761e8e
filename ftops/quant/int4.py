"""int4: weights of four bits, W4A16. W = (q - zero) * scale with one scale a row and group of 32, 64 or 128 values of k.

Stored: `packed`, int32 [tiles, pieces, 32, 4], and `scales`, of the weight's dtype, [tiles, groups, 8, 4] or with zero points
[tiles, groups, 8, 4, 2] as (scale, zero); the layout is that of ftops/packing.py. Without zero points zero is 8 and the scale the largest
value of the group over 7.5, so that both ends of q's range are used; with them the range from the smallest to the largest value, and 0,
is cut into 15 steps. 4.125 bits a weight at groups of 128, 4.25 with zero points.
"""
from __future__ import annotations

import torch

from ftops.op import invalid
from ftops.ops import linear_w4a16
from ftops.packing import PIECE_K, TILE_ROWS, dequantise_4bit, pack_4bit, pack_groups
from ftops.quant.weight import Layout, QuantizedWeight, check_format, check_weight, cut

GROUP_SIZES = (32, 64, 128)
VERSION = 1
LAYOUT = Layout(rows=TILE_ROWS, of_dtype=("scales",))


def quantize(weight: torch.Tensor, group_size: int | None = None, zero_points: bool = False) -> QuantizedWeight:
    """The nearest int4 weight of weight[N, K]; group_size is 32, 64 or 128 (the default). Raises ValueError."""
    check_weight("int4", weight)
    size = 128 if group_size is None else group_size
    if size not in GROUP_SIZES:
        raise invalid("int4", "group_size", size, "32, 64 or 128")
    N, K = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -K % size)).view(N, -1, size)
    low, high = groups.amin(-1), groups.amax(-1)
    if zero_points:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _rounded((high - low) / 15, weight.dtype)
        zero = (-low / scale).round().clamp(0, 15)
    else:
        scale = _rounded(torch.maximum(high, -low) / 7.5, weight.dtype)
        zero = torch.full_like(scale, 8)
    q = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8).view(N, -1)[:, :K]
    return from_values(q, scale.to(weight.dtype), zero.to(weight.dtype) if zero_points else None, size)


def from_values(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> QuantizedWeight:
    """Of values that are quantised already, bit for bit: q[N, K] in 0 .. 15, scales and zeros [N, groups] (None: 8 everywhere)."""
    scales = pack_groups(scales if zeros is None else torch.stack((scales, zeros.to(scales.dtype)), -1))
    return QuantizedWeight("int4", tuple(q.shape), {"packed": pack_4bit(q, group_size), "scales": scales},
                           {"version": VERSION, "group_size": group_size, "dtype": str(scales.dtype)[6:]})


def _rounded(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As it will be stored, in float32; 1 where a group is all zeros, or too small for a scale of that dtype."""
    scale = scale.to(dtype).float()
    return torch.where(scale > 0, scale, 1)


def dequantize(qw: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] that `qw` stands for, in its dtype."""
    check_format("int4", qw)
    return dequantise_4bit(qw.tensors["packed"], qw.tensors["scales"], *qw.shape, qw.dtype)


def linear(x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None,
           residual: torch.Tensor | None = None, norm: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual, as ops.linear; also of x's RMS norm."""
    check_format("int4", qw)
    return linear_w4a16(x, qw.tensors["packed"], qw.tensors["scales"], qw.shape, bias, activation=activation, residual=residual,
                        norm=norm, eps=eps)


def shard(qw: QuantizedWeight, dim: int, index: int, count: int) -> QuantizedWeight:
    """Shard `index` of `count`: rows (dim 0) in whole tiles of 32, columns (dim 1) in whole groups. Raises ValueError."""
    check_format("int4", qw)
    return cut(qw, dim, index, count, TILE_ROWS if dim == 0 else max(PIECE_K, int(qw.metadata["group_size"])))
