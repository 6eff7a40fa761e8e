"""How keys and values are kept in 8 bits: the scales of a layer's heads, from a prompt or from the layer's weights."""
from __future__ import annotations

import torch

from ftops.block import Block
from ftops.quant import FORMATS, QuantizedWeight

ROOM = {torch.int8: (1.5, 127), torch.float8_e4m3fn: (8.0, 448)}  # and the dtype's largest number
FEW, ROOM_OF_FEW = 4, 4.0  # tokens of a prompt


class Narrow:
    """In `dtype`, times k_scale and v_scale[Hkv] float32.

    Of one prompt the scales are measured: what the dtype can hold is ROOM times the largest value of a head there, and later ones beyond
    that are clipped. Steps of int8 are as much longer, so that it has little room; numbers of e4m3 are as exact everywhere. A prompt of
    a few words says little about what follows it, and leaves more.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.k_scale, self.v_scale = dtype, None, None

    def measure(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes scales from k, v [B,Hkv,S,D], to where the last ones were."""
        room, largest = ROOM[self.dtype]
        room = max(room, ROOM_OF_FEW) if k.shape[2] < FEW else room
        found = [t.float().abs().amax((0, 2, 3)).clamp(min=1e-6) * (room / largest) for t in (k, v)]
        if self.k_scale is None:
            self.k_scale, self.v_scale = found
        else:
            self.k_scale.copy_(found[0])
            self.v_scale.copy_(found[1])

    def widened(self, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [...,Hkv,D] of the cache in `dtype`."""
        return tuple((t.float() * scale[:, None]).to(dtype) for t, scale in ((k, self.k_scale), (v, self.v_scale)))


def of_any_prompt(block: Block) -> Narrow:
    """e4m3 with scales with which no key or value of the block can be clipped, whatever it reads.

    What a norm makes of N values is sqrt(N) long at most, before its weight g and bias b, so that |w x + c| <= sqrt(N) |w g| + |w b + c|
    for a row w, c of the linear (Cauchy and Schwarz). Rotary makes of two values at most sqrt(2) times the larger, and a norm of heads
    sqrt(D) times its largest weight. Typical values lie 50 to 500 times below such a bound, and e4m3 is as exact down to 1 / 28,672 of it.
    The scales are powers of two, so that what is read is what was stored, in 16 bits too.
    """
    spec, weights = block.spec, block.weights
    qkv = weights.qkv.weight
    rows = (FORMATS[qkv.format].dequantize(qkv) if isinstance(qkv, QuantizedWeight) else qkv)[spec.heads * spec.head_dim :].float()
    reach = (rows * weights.norm1.weight.float()).norm(dim=1) * rows.shape[1] ** 0.5
    constant = torch.zeros_like(reach) if weights.norm1.bias is None else rows @ weights.norm1.bias.float()
    if weights.qkv.bias is not None:
        constant = constant + weights.qkv.bias[spec.heads * spec.head_dim :].float()
    k, v = (reach + constant.abs()).view(2, spec.kv_heads, spec.head_dim).amax(2)
    if weights.k_norm is not None:
        k = weights.k_norm.weight.float().abs().max().expand_as(k) * spec.head_dim ** 0.5
    elif spec.rotary is not None:
        k = k * 2 ** 0.5
    found = Narrow(torch.float8_e4m3fn)
    found.k_scale, found.v_scale = (torch.exp2((bound.clamp(min=1e-6) / ROOM[found.dtype][1]).log2().ceil()) for bound in (k, v))
    return found


def scales(narrow: Narrow | None) -> dict[str, torch.Tensor]:
    """As the ops take them."""
    return {} if narrow is None else {"k_scale": narrow.k_scale, "v_scale": narrow.v_scale}
