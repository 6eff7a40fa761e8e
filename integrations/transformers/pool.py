"""A patched decoder over pages that many requests share, as `ftops.engine` sees it."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ftops import ops
from ftops.block import Attend, Block, BlockSpec, Slots
from ftops.engine import Prompts
from ftops.integrations.transformers.narrow import widened


@dataclass
class Pass:
    """What the pass at hand does, the same for all layers: parts of prompts, or a step of which places, lengths and page_table are as in
    `block.Slots`."""

    prompts: Prompts | None = None
    places: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    page_table: torch.Tensor | None = None


class PooledLayer(DynamicLayer):
    """Keys and values k, v [P,page_size,Hkv,D] of many requests, and if they are of 8 bits k_scale, v_scale [P,page_size,Hkv]. Only a fused
    layer can use it, by `kept`."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor] | None, spec: BlockSpec,
                 now: Pass) -> None:
        super().__init__()
        self.k, self.v, self._spec, self._now = k, v, spec, now
        self.scales = {} if scales is None else dict(zip(("k_scale", "v_scale"), scales, strict=True))
        # Views, with a slot of the pool for a position.
        self._flat = k.flatten(0, 1)[None], v.flatten(0, 1)[None]
        self._flat_scales = {name: scale.flatten(0, 1)[None] for name, scale in self.scales.items()}
        self.is_initialized = True

    def kept(self) -> Slots | Attend:
        """What a block takes to store and attend."""
        now = self._now
        if now.prompts is not None:
            return self._read
        return Slots(self.k, self.v, now.places, now.lengths, page_table=now.page_table, **self.scales)

    def _read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q[1,T,H,D], k and v[1,T,Hkv,D] of parts of prompts.

        Each attends to all of its request as the cache has it, gathered into one piece: next to the attention of a chunk over it, a copy
        is little, and `attention_varlen` then needs no pages. In 8 bits too, so that nothing hangs on how a prompt is cut into parts.
        """
        prompts, spec = self._now.prompts, self._spec
        ops.append_kv(k, v, *self._flat, prompts.slots[None], **self._flat_scales)
        keys, values = (flat[0].index_select(0, prompts.kept) for flat in self._flat)
        if self.scales:
            k_scale, v_scale = (flat[0].index_select(0, prompts.kept) for flat in self._flat_scales.values())
            keys, values = widened(keys, k_scale, q.dtype), widened(values, v_scale, q.dtype)
        return ops.attention_varlen(q[0], keys, values, prompts.starts_q, prompts.starts_kv, prompts.longest_q, prompts.longest_kv,
                                    causal=True, scale=spec.scale, window=None if spec.window is None else (spec.window, -1))[None]

    def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("Engine: a layer of the model was changed while the engine ran over it, and fell back to its original, which "
                           "cannot read this cache; close the engine first, or see ftops.report(model)")

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class PooledDecoder:
    """`pages` pages of `page_size` tokens for a model whose layers are these blocks. narrow: None, or the dtype of 8 bits in which keys
    and values are kept, each head of a token with its own scale, so that no request has to do with another's."""

    def __init__(self, model: PreTrainedModel, blocks: list[Block], pages: int, page_size: int, capturable: bool,
                 narrow: torch.dtype | None) -> None:
        self._model, self.device, self.capturable = model, model.device, capturable
        self.words = model.config.get_text_config(decoder=True).vocab_size
        self.pages, self.page_size, self._now = pages, page_size, Pass()
        spec = blocks[0].spec
        with torch.inference_mode(False), torch.no_grad():
            # Zeros: what lies behind the end of a row is hidden by a weight of 0, and 0 times what memory may hold could be NaN.
            pool = torch.zeros((len(blocks), 2, pages, page_size, spec.kv_heads, spec.head_dim), device=model.device,
                               dtype=narrow or model.dtype)
            scales = [None] * len(blocks) if narrow is None else torch.ones(pool.shape[:-1], device=model.device)
        self._cache = Cache(layers=[PooledLayer(*pool[index], scales[index], block.spec, self._now) for index, block in enumerate(blocks)])

    def step(self, tokens: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        now = self._now
        now.prompts, now.places, now.lengths, now.page_table = None, (lengths - 1)[:, None], lengths, page_table
        return self._run(tokens, now.places.clamp(min=0).long(), 0)[:, 0]

    def read(self, prompts: Prompts) -> torch.Tensor:
        self._now.prompts = prompts
        return self._run(prompts.ids[None], prompts.positions[None], prompts.last)[0]

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
        return self._model(input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=keep).logits
