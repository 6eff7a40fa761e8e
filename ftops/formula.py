"""The attention formula that the references of all attention ops share, and the oracle of their tests.

    s[i, j] = softcap(scale * q_i . k_j) + bias[i, j] - slope * |position_i - j|        softcap(x) = c tanh(x / c)
    out_i = sum_j softmax_j(s[i, j] where j is visible) v_j                             0 where nothing is visible
"""
from __future__ import annotations

import torch


def attention_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, *, causal: bool, scale: float,
                      window: tuple[int, int], softcap: float = 0.0, bias: torch.Tensor | None = None,
                      alibi_slopes: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of q[B,Sq,H,D] over k, v[B,Skv,Hkv,D], in float32 (float64 for float64), returned in q's dtype.

    positions[B or 1, Sq] is the place of each query among the keys: it sees key j if j <= position (causal), j >= position - left,
    j <= position + right, and j < kv_lengths[b]. A negative end of `window` is unbounded.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = torch.arange(k.shape[1], device=q.device)
    distance = keys - positions.unsqueeze(-1)
    visible = visible_keys(positions, k.shape[1], causal, window, kv_lengths)
    group = q.shape[2] // max(k.shape[2], 1)
    # Keys nobody may see are set to 0, so that NaN in unused cache slots cannot leak through 0 * NaN.
    live = (keys < kv_lengths.unsqueeze(-1)).unsqueeze(-1).unsqueeze(-1) if kv_lengths is not None else None
    if live is not None:
        k, v = k.masked_fill(~live, 0), v.masked_fill(~live, 0)
    key, value = (t.to(wide).transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    scores = q.to(wide).transpose(1, 2) @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide).view(-1, 1, 1) * distance.abs().unsqueeze(1)
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(~(scores > float("-inf")).any(-1, keepdim=True), 0)
    return (weights @ value).transpose(1, 2).to(q.dtype).contiguous()


def visible_keys(positions: torch.Tensor, keys: int, causal: bool, window: tuple[int, int],
                 kv_lengths: torch.Tensor | None) -> torch.Tensor:
    """bool [B or 1, Sq, keys]: which key each query may see."""
    index = torch.arange(keys, device=positions.device)
    distance = index - positions.unsqueeze(-1)
    left, right = window
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance <= 0
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    if kv_lengths is not None:
        visible = visible & (index < kv_lengths.view(-1, 1, 1))
    return visible
