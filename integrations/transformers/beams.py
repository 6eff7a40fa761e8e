"""The decoder of a beam search: beams share the pages of what they have in common, and going on from another beam copies no cache.

Row r owns pages r N to r N + N - 1 and writes into these alone. When it goes on from row p, its table takes over p's pages that are full,
and the one that is being filled, at most PAGE tokens, is copied.
"""
from __future__ import annotations

import torch
from transformers import Cache, PreTrainedModel

from ftops.integrations.transformers.cache import PagedLayer
from ftops.integrations.transformers.decoder import CausalDecoder, cache_dtype, narrow
from ftops.integrations.transformers.layer import FusedLayer

PAGE = 16  # tokens


class BeamCausalDecoder(CausalDecoder):
    """batch: all beams of all requests, `beams` neighbouring rows being one request's. capacity: a multiple of PAGE."""

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int, beams: int) -> None:
        super().__init__(model, batch, capacity)
        specs = [module._ftops.block.spec for module in model.modules() if isinstance(module, FusedLayer)]
        self._beams, shape = beams, (len(specs), 2, batch, capacity // PAGE, PAGE, specs[0].kv_heads, specs[0].head_dim)
        with torch.inference_mode(False):
            # Zeros: what lies behind the end of a row is hidden by a weight of 0, and 0 times what memory may hold could be NaN.
            self._pages = torch.zeros(shape, dtype=cache_dtype(model) or model.dtype, device=model.device)
            self._own = torch.arange(batch * shape[3], dtype=torch.int32, device=model.device).view(batch, -1)
            self._table, self._columns = self._own.clone(), torch.arange(shape[3], device=model.device)
            self._first = torch.arange(batch, device=model.device) // beams * beams
        self._cache = Cache(layers=[PagedLayer(*(self._pages[layer, part].flatten(0, 1) for part in (0, 1)), self._table, self._places,
                                               self._lengths, beams, narrow(model)) for layer in range(len(specs))])

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """Reads each request's prompt once: ids[B K,S] has K equal rows."""
        self._table.copy_(self._own)
        positions = self._begin(ids, mask, positions)
        for layer in self._cache.layers:
            layer.stepping = False
        once = slice(None, None, self._beams)
        logits = self._run(ids[once], mask[once] if self._padded else None, positions[once], logits_to_keep=1)
        self._lengths.fill_(ids.shape[1])
        for layer in self._cache.layers:
            layer.stepping = True
        self.reorder(self._first)
        return logits.repeat_interleave(self._beams, 0)

    def reorder(self, parents: torch.Tensor) -> None:
        filling = (self._lengths[:1] // PAGE).clamp(max=len(self._columns) - 1).long()
        self._table.copy_(torch.where(self._columns < filling, self._table[parents], self._own))
        self._pages.index_copy_(3, filling, self._pages.index_select(3, filling).index_select(2, parents))

    def shape(self) -> tuple[object, ...]:
        return (*super().shape(), self._beams)
