"""Attention over a transformers `Cache`: keys and values are stored by the cache's own `update`, and read where it keeps them.

What `update` returns is one of two things. Either exactly the keys that may be seen, the newest last (dynamic caches, and static
sliding ones when they overflow): queries are then aligned to the end. Or a whole preallocated buffer of which only a beginning is
filled (static caches): how much is a tensor on the device, and is used as a tensor, so that no step waits for the host.
"""
from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from ftops import ops
from ftops.block import Attend, BlockSpec, Slots
from ftops.integrations.transformers.narrow import Narrow, scales
from ftops.integrations.transformers.pool import PooledLayer
from ftops.ops.decode_attention import MAX_NEW_TOKENS


def unfit_cache(cache: object, index: int) -> str | None:
    """Why this cache cannot be served, or None."""
    if cache is None:
        return None
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return f"cache {type(cache).__name__}"
    if index < len(cache.layers) and not isinstance(cache.layers[index], (DynamicLayer, StaticLayer)):
        return f"cache layer {type(cache.layers[index]).__name__}"
    return None


class FixedLayer(StaticLayer):
    """A static layer for a captured step: its memory outlives a prompt, and one step counts for all layers.

    A prompt is stored as by a StaticLayer. Then `stepping` begins: the T new tokens of a step go to places[B,T], lengths[B] being filled
    with them, both int32 and set by whoever runs the step; a fused layer writes and reads there by itself. narrow: None, or how it is
    kept in 8 bits.
    """

    def __init__(self, max_cache_len: int, places: torch.Tensor, lengths: torch.Tensor, narrow: Narrow | None = None) -> None:
        super().__init__(max_cache_len)
        self.places, self.lengths, self.stepping, self.narrow, self.read = places, lengths, False, narrow, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.narrow is not None:
            self.narrow.measure(key_states, value_states)
            key_states, value_states = (t[:, :, :0].to(self.narrow.dtype) for t in (key_states, value_states))
        if self.keys is None:
            super().lazy_initialization(key_states, value_states)
        self.is_initialized = True

    def rewind(self, kept: int = 0) -> None:
        """Forgets all but the first `kept` tokens. A layer that counts as new lets a prompt attend to itself alone."""
        self.stepping, self.is_initialized, self.read = False, kept > 0, kept
        self.cumulative_length.fill_(kept)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object,
               **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        if self.stepping:
            self._store(key_states, value_states, self.places)
            return self.first(self.max_cache_len, key_states.dtype)
        count = key_states.shape[2]
        if self.narrow is None:
            super().update(key_states, value_states, *args, **kwargs)
        else:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            places = (torch.arange(count, device=key_states.device) + self.cumulative_length).expand(len(key_states), -1)
            self._store(key_states, value_states, places)
            self.cumulative_length.add_(count)
        self.read += count
        return (key_states, value_states) if self.read == count else self.first(self.read, key_states.dtype)

    def _store(self, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor) -> None:
        ops.append_kv(*(t.transpose(1, 2) for t in (k, v, self.keys, self.values)), places, **scales(self.narrow))

    def first(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,Hkv,length,D] of the first tokens."""
        return _wide(self.narrow, *(t[:, :, :length].transpose(1, 2) for t in (self.keys, self.values)), dtype)

    def get_seq_length(self) -> torch.Tensor | int:
        return self.places[0, 0] if self.stepping else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length) if self.stepping else (self.read + query_length, 0)


class PagedLayer(DynamicLayer):
    """Keys and values in pages, k, v [P,page_size,Hkv,D], that rows share by page_table[B,n]; otherwise like a FixedLayer.

    A prompt has one row for each `shared` rows of the table, the first of which says where it is stored.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, page_table: torch.Tensor, places: torch.Tensor, lengths: torch.Tensor,
                 shared: int, narrow: Narrow | None = None) -> None:
        super().__init__()
        self.k, self.v, self.page_table, self.places, self.lengths, self.shared = k, v, page_table, places, lengths, shared
        self.narrow = narrow
        self.keys, self.values, self.stepping, self.is_initialized = k, v, False, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object,
               **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        new = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if self.stepping:
            ops.append_kv(*new, self.k, self.v, self.places, page_table=self.page_table, **scales(self.narrow))
            return _wide(self.narrow, *(pages[self.page_table.long()].flatten(1, 2) for pages in (self.k, self.v)), key_states.dtype)
        if self.narrow is not None:
            self.narrow.measure(key_states, value_states)
        places = torch.arange(key_states.shape[2], dtype=torch.int32, device=key_states.device).expand(len(key_states), -1)
        ops.append_kv(*new, self.k, self.v, places, page_table=self.page_table[:: self.shared], **scales(self.narrow))
        return key_states, value_states

    def get_seq_length(self) -> torch.Tensor | int:
        return self.places[0, 0] if self.stepping else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.k.shape[1] * self.page_table.shape[1] if self.stepping else query_length), 0


def slots(cache: Cache | None, index: int, x: torch.Tensor, mask: torch.Tensor | None) -> Slots | Attend | None:
    """Where a step of x[B,T,N] over `cache` keeps layer `index`, if that is a layer for steps; None for every other call."""
    if cache is None or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if isinstance(layer, PooledLayer):
        return layer.kept()
    if not isinstance(layer, (FixedLayer, PagedLayer)) or not layer.stepping or not is_rows(mask):
        return None
    bias = None if mask is None else additive(mask, x.dtype)
    kept = scales(layer.narrow)
    if isinstance(layer, PagedLayer):
        return Slots(layer.k, layer.v, layer.places, layer.lengths, bias, layer.page_table, **kept)
    return Slots(layer.keys.transpose(1, 2), layer.values.transpose(1, 2), layer.places, layer.lengths, bias, **kept)


def _wide(narrow: Narrow | None, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [B,S,Hkv,D] of a cache as transformers has them, [B,Hkv,S,D] in the model's dtype."""
    return tuple(t.transpose(1, 2) for t in ((k, v) if narrow is None else narrow.widened(k, v, dtype)))


def attend(spec: BlockSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache | None, index: int,
           mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of q[B,S,H,D] over k, v[B,S,Hkv,D] and what `cache` holds of layer `index`, storing k and v there.

    mask: None; rows, float [B,1,1,KV], added to the scores while causality and window come from `spec`; or any other 4-D mask,
    bool or float, which then is the whole truth.
    """
    new = q.shape[1]
    fresh = cache is not None and (index >= len(cache.layers) or not cache.layers[index].is_initialized)
    keys, values, filled = k, v, None
    if cache is not None:
        if cache.offloading:  # transformers before 5.23 may fetch a layer that is still on its way to the host: measured, wrong tokens
            cache.prefetch_stream.wait_stream(torch.cuda.current_stream(k.device))
        keys, values = (t.transpose(1, 2) for t in cache.update(k.transpose(1, 2), v.transpose(1, 2), index))
        filled = _filled(cache.layers[index], keys.shape[1])
    if not is_rows(mask):
        return ops.attention(q, keys, values, scale=spec.scale, bias=additive(mask, q.dtype))
    bias = None if mask is None else additive(mask, q.dtype)
    # Splitting the keys over a device is what decode_attention is for; on a CPU only buffers need it, for their lengths. A first prompt,
    # however short, has nothing to attend to but itself.
    several = filled is not None or (q.is_cuda and keys.shape[1] > new)
    if spec.causal and cache is not None and not fresh and new <= MAX_NEW_TOKENS and several:
        lengths = _all_of(cache, keys) if filled is None else filled.to(torch.int32).expand(q.shape[0])
        return ops.decode_attention(q, keys, values, lengths, scale=spec.scale, window=spec.window, bias=bias)
    if filled is not None:
        if not fresh:
            return ops.attention(q, keys, values, scale=spec.scale, bias=causal_bias(spec, new, keys.shape[1], filled - new, q, bias))
        keys, values, bias = k, v, None if bias is None else bias[..., :new]
    window = None if spec.window is None or keys.shape[1] <= spec.window + 1 else (spec.window, -1)
    return ops.attention(q, keys, values, causal=spec.causal, scale=spec.scale, window=window, bias=bias)


def is_rows(mask: torch.Tensor | None) -> bool:
    """Whether `mask` says only which keys are padding: None, or what `attention.rows_mask` makes."""
    return mask is None or (mask.dim() == 4 and mask.shape[2] == 1 and mask.is_floating_point())


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (True: visible) as 0 and -inf; a float one in `dtype`."""
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.to(dtype)


def causal_bias(spec: BlockSpec, queries: int, keys: int, offset: int | torch.Tensor, like: torch.Tensor,
                rows: torch.Tensor | None) -> torch.Tensor:
    """[B or 1, 1, queries, keys] in the dtype of `like`: rows (or 0) where query offset + i may see key j, -inf elsewhere."""
    distance = (torch.arange(queries, device=like.device) + offset).unsqueeze(-1) - torch.arange(keys, device=like.device)
    visible = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if spec.window is not None:
        visible = visible & (distance <= spec.window)
    bias = torch.zeros((1, 1, 1, keys), dtype=like.dtype, device=like.device) if rows is None else rows.to(like.dtype)
    return bias.masked_fill(~visible, float("-inf"))


def _all_of(cache: Cache, keys: torch.Tensor) -> torch.Tensor:
    """Lengths [B] int32 that count every one of keys[B,S,Hkv,D]. They are kept on the cache, since one forward asks once a layer."""
    def make() -> torch.Tensor:
        return torch.full(keys.shape[:1], keys.shape[1], dtype=torch.int32, device=keys.device)

    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return make()  # what a graph computes holds its value only while that runs
    wanted = (keys.shape[:2], keys.device)
    known, lengths = cache.__dict__.get("_ftops_lengths", (None, None))
    if known != wanted:
        lengths = make()
        cache._ftops_lengths = wanted, lengths
    return lengths


def _filled(layer: DynamicLayer | StaticLayer, returned: int) -> torch.Tensor | None:
    """How much of the `returned` keys is filled, for a buffer that is not full; None if all are to be seen."""
    if not isinstance(layer, StaticLayer) or isinstance(layer, FixedLayer):
        return None
    if not layer.is_sliding:
        return layer.cumulative_length
    # Past its size a sliding layer returns the last keys only, and no longer counts in its tensor.
    overflown = returned > layer.max_cache_len or layer.cumulative_length_int > layer.max_cache_len
    return None if overflown else layer.cumulative_length
