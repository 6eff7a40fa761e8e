"""Without padding: the tokens that the mask shows are gathered, blocks run on them alone, and the results are put back.

Which tokens these are is found once a forward, where the mask is made, and travels on the mask. A layer by itself gathers and puts back
at the cost of two passes over its input; padding would cost it everything else, and attention a bias. At padding the output is 0, and so
are keys and values there in a cache. Encoders, and prompts of decoders that are padded on the left.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import Cache

from ftops import ops
from ftops.block import Block, BlockSpec, Freqs
from ftops.engine.table import upload


@dataclass(frozen=True)
class Packing:
    """tokens: int64 [T], of [B,S] flattened. cu_seqlens: int32 [B + 1]. longest: tokens of the longest sequence.

    left: they are a prompt's, all padding before them.
    """

    shape: torch.Size
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int
    left: bool
    rotations: dict[int, tuple[object, torch.Tensor | None, Freqs]] = field(default_factory=dict)

    def rotation(self, positions: torch.Tensor | None, freqs: Freqs | None) -> tuple[torch.Tensor | None, Freqs | None]:
        """positions[B,S] and freqs of the tokens. All layers ask for the same, which is made once."""
        if freqs is None:
            return None, None
        if id(freqs[0]) not in self.rotations:
            picked = None if positions is None else self.picked(positions)
            table = freqs if freqs[0].dim() < 3 else tuple(self.picked(t.expand(*self.shape, -1)) for t in freqs)
            self.rotations[id(freqs[0])] = freqs, picked, table
        return self.rotations[id(freqs[0])][1:]

    def picked(self, x: torch.Tensor) -> torch.Tensor:
        """x[B,S,...] of the tokens, [1,T,...]."""
        return x.flatten(0, 1).index_select(0, self.tokens).unsqueeze(0)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """x[1,T,...] where it belongs, [B,S,...], zeros elsewhere."""
        whole = x.new_zeros((self.shape.numel(), *x.shape[2:])).index_copy_(0, self.tokens, x.squeeze(0))
        return whole.view(*self.shape, *x.shape[2:])


def attach(mask: torch.Tensor, padding: torch.Tensor, prompt: bool = False) -> None:
    """Finds the tokens that `padding`[B,S] shows and keeps them on `mask`. Waits for the device once, and then looks on the host: a dozen
    launches for little work, and three waits, took it 0.26 ms.

    prompt: of a decoder, and then only where all padding is on the left.
    """
    shown = padding.bool().cpu().numpy()
    left = bool(shown[:, -1].all() and (shown[:, 1:] >= shown[:, :-1]).all()) if prompt else False
    if prompt and not left:
        return
    tokens, lengths = shown.reshape(-1).nonzero()[0], shown.sum(1)
    if len(tokens):
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.from_numpy(lengths.cumsum())
        mask._ftops_packing = Packing(padding.shape, upload(torch.from_numpy(tokens), padding.device), upload(starts, padding.device),
                                      int(lengths.max()), left)


def packing(spec: BlockSpec, mask: torch.Tensor | None, x: torch.Tensor, cache: Cache | None, index: int | None) -> Packing | None:
    """What `attach` kept on the mask, if a block of `spec` may run on these tokens of x[B,S,N] alone."""
    found: Packing | None = getattr(mask, "_ftops_packing", None)
    if found is None or found.shape != x.shape[:2] or found.tokens.device != x.device or found.left != spec.causal:
        return None
    if not spec.causal:
        return found if cache is None and spec.window is None else None
    fresh = cache is None or index >= len(cache.layers) or not cache.layers[index].is_initialized
    return found if fresh and not (cache is not None and cache.offloading) else None


def run_packed(block: Block, x: torch.Tensor, packed: Packing, positions: torch.Tensor | None, freqs: Freqs | None, cache: Cache | None,
               index: int | None) -> torch.Tensor:
    """block(x[B,S,N]) of the packed tokens, 0 elsewhere; `cache` is given their keys and values as layer `index`."""
    spec = block.spec

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if cache is not None:
            cache.update(*(packed.spread(t).transpose(1, 2) for t in (k, v)), index)
        return attend_packed(packed.cu_seqlens, packed.longest, spec, q, k, v)

    return packed.spread(block(packed.picked(x), attend, *packed.rotation(positions, freqs)))


def attend_packed(starts: torch.Tensor, longest: int, spec: BlockSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention within each sequence of q[1,T,H,D], k and v[1,T,Hkv,D]; they begin at starts[B + 1] and have `longest` tokens at most."""
    window = None if spec.window is None or longest <= spec.window + 1 else (spec.window, -1)
    return ops.attention_varlen(q[0], k[0], v[0], starts, starts, longest, longest, causal=spec.causal, scale=spec.scale,
                                window=window).unsqueeze(0)
