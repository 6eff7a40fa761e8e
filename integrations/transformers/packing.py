"""Encoders without padding: a layer gathers the tokens that the mask shows, runs its block on them alone, and puts the results back.

Which tokens these are is found once a forward, where the mask is made, and travels on the mask. Gathering and putting back cost a layer
two passes over its input; padding would cost it everything else. At padding the layer's output is 0.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ftops import ops
from ftops.block import Block

WORTHWHILE = 0.9  # of all tokens: if more are real, they are computed where they are


@dataclass(frozen=True)
class Packing:
    """tokens: int64 [T], of [B,S] flattened. cu_seqlens: int32 [B + 1]. longest: tokens of the longest sequence."""

    shape: torch.Size
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int


def attach(mask: torch.Tensor, padding: torch.Tensor) -> None:
    """Finds the tokens that `padding`[B,S] shows and keeps them on `mask`, unless they are too many, or none. Waits for the device."""
    shown = padding.bool()
    tokens = shown.flatten().nonzero().squeeze(1)
    if 0 < tokens.numel() <= WORTHWHILE * shown.numel():
        lengths = shown.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        mask._ftops_packing = Packing(shown.shape, tokens, cu_seqlens, int(lengths.max()))


def packing(mask: torch.Tensor | None, x: torch.Tensor) -> Packing | None:
    """What `attach` kept on the mask, if it is of the tokens of x[B,S,N]."""
    found = getattr(mask, "_ftops_packing", None)
    return found if found is not None and found.shape == x.shape[:2] and found.tokens.device == x.device else None


def run_packed(block: Block, x: torch.Tensor, packed: Packing) -> torch.Tensor:
    """block(x[B,S,N]) of the packed tokens, 0 elsewhere. The block knows neither positions nor order."""
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        starts, longest = packed.cu_seqlens, packed.longest
        return ops.attention_varlen(q[0], k[0], v[0], starts, starts, longest, longest, scale=block.spec.scale).unsqueeze(0)

    flat = x.reshape(-1, x.shape[-1])
    out = block(flat.index_select(0, packed.tokens).unsqueeze(0), attend)
    return torch.zeros_like(flat).index_copy_(0, packed.tokens, out.squeeze(0)).view(x.shape)
