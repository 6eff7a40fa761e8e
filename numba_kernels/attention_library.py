"""float32 attention by PyTorch's memory-efficient kernel, where it can say what is asked: faster there than attention_plain, see
docs/tuning/attention.md."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ftops.numba_kernels.attention_common import UNBOUNDED

GRID, OFFSETS = 65535, 2 ** 31  # its blocks are counted by batch and head in 16 bits, its offsets in 32
FEWEST = 32  # queries and keys: with one of them its error is over twice that of the formula


def serves(q: torch.Tensor, k: torch.Tensor, left: int, right: int, softcap: float, bias: torch.Tensor | None, *others: object) -> bool:
    """Whether it computes float32 `attention` of q[B,Sq,H,D] and k[B,Skv,Hkv,D], all `others` (slopes, lengths, starts) being None."""
    causal = right == 0 and q.shape[1] == k.shape[1]  # its triangle begins at the first query, ours ends at the last
    small = max(t.numel() for t in (q, k, bias) if t is not None) * (q.shape[2] // k.shape[2]) < OFFSETS
    return (left == UNBOUNDED and (causal or right == UNBOUNDED) and softcap == 0 and small and min(q.shape[1], k.shape[1]) >= FEWEST
            and q.numel() > 0 and max(q.shape[0], q.shape[2]) <= GRID and all(other is None for other in others))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """[B,Sq,H,D] of q[B,Sq,H,D], k and v[B,Skv,Hkv,D]; bias: broadcast to [B,H,Sq,Skv]."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    if bias is not None:
        if causal:
            bias = bias.masked_fill(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
        bias = bias.expand(*q.shape[:3], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal and bias is None, scale=scale).transpose(1, 2).contiguous()
