"""ftops.Engine: a patched transformers model behind an engine."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ftops import engine
from ftops.engine import Handle
from ftops.generation.options import Options, parse
from ftops.integrations.transformers.checks import is_whole
from ftops.integrations.transformers.decoder import cache_dtype, fixed, positions_of, unfit
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.transformers.pool import PooledDecoder

SHARE = 0.8  # of the GPU's free memory, or of HOST bytes, that the cache takes at most
HOST = 4 << 30
LONGEST = 8192  # tokens of a request, unless max_length says more


class Engine(engine.Engine):
    """Serves many requests at once with a patched decoder. See docs/engine.md.

    max_requests: how many are at work at a time; max_waiting: how many more may wait. max_length: tokens of one request, prompt and answer
    (None: what the model allows, 8192 at most). cache_tokens: tokens that the cache holds, for all requests together (None: as many as they
    can need, within 0.8 of the GPU's free memory or of 4 GB). page_size: tokens a page. chunk: tokens of prompts that are read in one step,
    beside the running answers. The model must not be changed, nor generate by itself on another stream, while the engine is open. Raises
    TypeError or ValueError.
    """

    def __init__(self, model: PreTrainedModel, *, max_requests: int = 64, max_waiting: int = 1024, max_length: int | None = None,
                 cache_tokens: int | None = None, page_size: int = 16, chunk: int = 512) -> None:
        reason = unfit(model) or _unfit(model)
        if reason is not None:
            raise ValueError(f"Engine: {type(model).__name__} cannot be served: {reason}")
        for name, value in (("max_requests", max_requests), ("page_size", page_size), ("chunk", chunk), ("max_length", max_length),
                            ("cache_tokens", cache_tokens), ("max_waiting", max_waiting)):
            if value is not None and not is_whole(value, 1):
                raise ValueError(f"Engine: {name} is {value!r}; allowed: 1 or more")
        longest = positions_of(model)
        if max_length is None:
            max_length = min(longest or LONGEST, LONGEST)
        elif longest and max_length > longest:
            raise ValueError(f"Engine: max_length is {max_length}; allowed: 1 to {longest}, the positions of this model")
        blocks, narrow = [module._ftops.block for module in model.modules() if isinstance(module, FusedLayer)], cache_dtype(model)
        if cache_tokens is None:
            spec = blocks[0].spec
            a_head = spec.head_dim * (narrow or model.dtype).itemsize + (0 if narrow is None else torch.float32.itemsize)  # and its scale
            a_token = 2 * len(blocks) * spec.kv_heads * a_head
            memory = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else HOST
            cache_tokens = min(max_requests * -(-max_length // page_size) * page_size, int(SHARE * memory) // a_token)
        if cache_tokens < page_size:
            raise ValueError(f"Engine: cache_tokens is {cache_tokens}; allowed: {page_size}, which is one page, or more")
        self._model = model
        decoder = PooledDecoder(model, blocks, cache_tokens // page_size, page_size, fixed(model), narrow)
        super().__init__(decoder, max_requests, max_waiting, max_length, chunk)

    def submit(self, prompt_ids: Sequence[int] | torch.Tensor, *, return_logprobs: bool = False, **options: Any) -> Handle:
        """Queues a prompt, token ids [S], and returns its handle: an iterator of tokens, with `text`, `result` and `cancel`.

        The options are those of `ftops.generation.Options` for one request, without callables and prompt lookup. Raises TypeError or
        ValueError for what can never be served, `ftops.engine.QueueFull` while max_waiting requests wait, RuntimeError once it is closed.
        """
        words = self._model.config.get_text_config(decoder=True).vocab_size
        tokens = prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else prompt_ids
        if not isinstance(tokens, Sequence) or not tokens or not all(isinstance(token, int) and 0 <= token < words for token in tokens):
            raise ValueError(f"submit: prompt_ids is {_short(prompt_ids)}; allowed: one or more token ids, 0 to {words - 1}, [S]")
        parsed = parse({"eos_token_id": self._model.generation_config.eos_token_id} | options, 1, words, "submit")
        _check(parsed)
        return super().submit(list(tokens), parsed, return_logprobs)


def _unfit(model: PreTrainedModel) -> str | None:
    """Why no engine can run a model that the generation loop could, or None."""
    blocks = [module._ftops.block for module in model.modules() if isinstance(module, FusedLayer)]
    if model.training:
        return "it is in training mode; call model.eval()"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it is spread over devices"
    if len({(block.spec.kv_heads, block.spec.head_dim) for block in blocks}) > 1:
        return "its layers have different numbers of heads"
    return None


def _check(options: Options) -> None:
    for name in ("processors", "criteria", "prompt_lookup_num_tokens"):
        if getattr(options, name):
            raise ValueError(f"submit: {name} is given, but an engine serves many requests in one step and cannot; leave it out, or use "
                             "ftops.generate")


def _short(value: object) -> str:
    text = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
