"""Runs a patched model once in every way that picks another kernel, so that no user waits for a compiler later."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from ftops.integrations.transformers.decoder import unfit
from ftops.integrations.transformers.generate import generate
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.transformers.leaves import FusedNorm
from ftops.integrations.transformers.stack import PLAIN
from ftops.progress import track

NEW = 4  # tokens: one from the prompt, a step as it is, and two of its graph


def warmup(model: nn.Module, *, batch_sizes: Sequence[int] = (1,), max_length: int | None = None) -> None:
    """Compiles ahead of use the kernels of a patched text model, with a progress bar.

    For each batch size it runs a prompt of max_length tokens (default: 512 or what the model allows), with and without padding, and,
    for a decoder, single steps after it with both kinds of cache, and the generation loop, whose graphs for the last batch size stay, as
    do those of an encoder.
    Raises TypeError or ValueError for what it cannot run.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"warmup: model is a {type(model).__name__}; allowed: a transformers model")
    if not any(isinstance(module, (FusedLayer, FusedNorm)) for module in model.modules()):
        raise ValueError("warmup: model has no swapped module; call ftops.patch(model) first")
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise ValueError(f"warmup: {type(model).__name__} does not take token ids alone; run it once on inputs of your own instead")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"warmup: batch_sizes is {batch_sizes!r}; allowed: one or more positive numbers")
    limit = getattr(model.config, "max_position_embeddings", 512)
    length = min(512, limit) if max_length is None else max_length
    if not 2 <= length <= limit:
        raise ValueError(f"warmup: max_length is {max_length}; allowed: 2 to {limit}, the model's max_position_embeddings")

    runs = [run for batch in batch_sizes for run in _runs(model, batch, length)]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for run in track(runs, "ftops: compiling kernels", len(runs)):
                run()
    finally:
        model.train(training)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _runs(model: PreTrainedModel, batch: int, length: int) -> Iterator[Callable[[], object]]:
    ids = torch.zeros((batch, length), dtype=torch.long, device=model.device)
    padded = torch.ones_like(ids)
    padded[:, 0] = 0
    blocks = [module._ftops.block for module in model.modules() if isinstance(module, FusedLayer)]
    decoder = any(block is not None and block.spec.causal for block in blocks)
    for mask in (None, padded):
        if not decoder:
            for _ in range(PLAIN):
                yield lambda mask=mask: model(ids, attention_mask=mask)
            continue
        for kind in (DynamicCache, StaticCache):
            yield lambda mask=mask, kind=kind: _in_pieces(model, ids, mask, kind)
        if unfit(model) is None and length > NEW:
            for options in ({}, {"temperature": 1.0, "repetition_penalty": 1.1}):  # penalties make the logits float32
                yield lambda mask=mask, options=options: generate(
                    model, ids[:, NEW:], None if mask is None else mask[:, NEW - 1 : -1], max_new_tokens=NEW, **options)


def _in_pieces(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, kind: type[Cache]) -> None:
    """A prompt, then 16, 8, 4, 2 tokens and one: kernels for few tokens know a row of the batch from a token of a row as little as that."""
    length = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length) if kind is StaticCache else DynamicCache(config=model.config)
    ends = sorted({max(length - left, 1) for left in (31, 15, 7, 3, 1, 0)})
    for start, end in pairwise((0, *ends)):
        model(ids[:, start:end], attention_mask=None if mask is None else mask[:, :end], past_key_values=cache, use_cache=True)
