"""A patched decoder as the generation loop sees it: prompt and steps over a cache of its own, kept from call to call."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ftops.generation import Session
from ftops.integrations.transformers.cache import FixedLayer
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.transformers.narrow import Narrow

_SESSIONS: weakref.WeakKeyDictionary[PreTrainedModel, list[tuple[tuple, Session]]] = weakref.WeakKeyDictionary()
Make = Callable[[PreTrainedModel, int, int], Session]  # from the batch size and the most tokens a row
STEP = 256  # tokens by which a cache is longer or shorter than another
KEPT = 0.1  # of a device's memory that a cache may take while nothing is generated


class CausalDecoder:
    """A patched decoder with a cache of its own: static where a step is captured, or where it `stays`, otherwise one that grows.

    kept: how many of the next prompt's tokens it has read already, if its cache stays; set by whoever knows.
    """

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int, stays: bool = False) -> None:
        self._model, config = weakref.ref(model), model.config.get_text_config(decoder=True)
        self.device, self.words, self.config = model.device, config.vocab_size, config
        self._fixed = stays or fixed(model) or cache_dtype(model) is not None
        self.capturable = fixed(model) and model.device.type == "cuda"
        with torch.inference_mode(False):
            self._positions = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
            self._mask = torch.ones((batch, capacity), dtype=torch.int64, device=model.device)
            self._rows = torch.zeros((batch, 1, 1, capacity), dtype=model.dtype, device=model.device)
            self._places = torch.zeros((batch, 1), dtype=torch.int32, device=model.device)
            self._lengths = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self._padded, self._length, self._cache, self.kept = False, 0, None, 0
        if self._fixed:
            self._cache = self._fixed_cache(capacity)

    def _fixed_cache(self, capacity: int) -> Cache:
        return Cache(layers=[FixedLayer(capacity, self._places, self._lengths, narrow(self._model()))
                             for _ in range(self.config.num_hidden_layers)])

    def _begin(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """Takes down where the padding is and which positions come next; the positions [B,S] of the prompt."""
        self._padded, self._length = mask is not None and not bool(mask.all()), ids.shape[1]
        if positions is None:
            positions = torch.arange(self._length, device=ids.device).expand_as(ids)
            if self._padded:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        self._positions.copy_(positions[:, -1:] + 1)
        if self._padded:
            self._mask[:, : self._length] = mask
            self._mask[:, self._length :] = 1
            self._rows.zero_().masked_fill_(self._mask[:, None, None] == 0, float("-inf"))
        return positions

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        positions = self._begin(ids, mask, positions)
        if self._fixed:
            for layer in self._cache.layers:
                layer.rewind(self.kept)
        else:
            self._cache = DynamicCache(config=self.config)
        logits = self._run(ids[:, self.kept :], mask if self._padded else None, positions[:, self.kept :], logits_to_keep=1)
        if self._fixed:
            self._lengths.fill_(self._length)
            for layer in self._cache.layers:
                layer.stepping = True
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._length += 1
        self._places.copy_(self._lengths[:, None])
        self._lengths.add_(1)
        mask = self._rows if self._fixed else self._mask[:, : self._length]
        logits = self._run(tokens, mask if self._padded else None, self._positions)
        self._positions.add_(1)
        return logits

    @contextmanager
    def hidden_states(self) -> Iterator[list[torch.Tensor]]:
        heard: list[torch.Tensor] = []
        handle = self._model().base_model.register_forward_hook(lambda _, args, output: heard.append(output[0].to(self.device)))
        try:
            yield heard
        finally:
            handle.remove()

    def copied(self, length: int) -> DynamicCache:
        """Keys and values of the first `length` tokens as a cache for the caller. One that grows is his own from now on."""
        cache = DynamicCache(config=self.config) if self._fixed else self._cache
        for index, layer in enumerate(self._cache.layers):
            if self._fixed:
                cache.update(*layer.first(length, self._model().dtype), index)
            else:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # no inference tensors, which bar gradients
        return cache

    def shape(self) -> tuple[object, ...]:
        return (self._padded,)

    def release(self) -> bool:
        """After a generation: whether its memory may wait for the next one. A cache that grows is let go here."""
        if not self._fixed:
            self._cache = None
            return True
        held = sum(tensor.nbytes for layer in self._cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)
        return not self.capturable or held <= KEPT * torch.cuda.get_device_properties(self.device).total_memory

    def _run(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        return self._model()(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True,
                             **options).logits[:, -1].to(self.device)  # the last layers may be on another


class SeveralDecoder(CausalDecoder):
    """Reads `several` tokens a row in a step, of which each row keeps its own number; the next step writes over the others."""

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int, several: int) -> None:
        super().__init__(model, batch, capacity, True)
        with torch.inference_mode(False):
            self._places = torch.zeros((batch, several), dtype=torch.int32, device=self.device)
            self._ahead = torch.arange(several, dtype=torch.int32, device=self.device)
        self._cache = self._fixed_cache(capacity)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._places.copy_(self._lengths[:, None] + self._ahead)
        self._lengths.add_(len(self._ahead))
        return self._model()(input_ids=tokens, attention_mask=self._rows if self._padded else None, past_key_values=self._cache,
                             position_ids=self._positions + self._ahead, use_cache=True).logits

    def keep(self, counts: torch.Tensor) -> None:
        self._lengths.add_(counts - len(self._ahead))
        self._positions.add_(counts[:, None])


def cache_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """That of patch(kv_cache=), or None for the model's own."""
    return model.__dict__.get("_ftops_kv_cache")


def narrow(model: PreTrainedModel) -> Narrow | None:
    dtype = cache_dtype(model)
    return None if dtype is None else Narrow(dtype)


def fixed(model: PreTrainedModel) -> bool:
    """Whether its cache stays where it is, as a graph needs it. On a CPU one that grows is attended to as a whole, which is faster."""
    return model.device.type == "cuda" and not any(map(watched, model.modules()))


def watched(module: torch.nn.Module) -> bool:
    """Whether somebody's code runs with the module's forward: accelerate's, or hooks that a replay would pass by."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "_hf_hook" in module.__dict__ or any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens of one sequence, prompt and answer, that a decoder has positions for, or None if there is no such number."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def unfit(model: object, stays: bool = False) -> str | None:
    """Why the loop cannot run this model, or not over a cache that `stays` whatever the device, or None."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        return "it is no decoder with a language modelling head"
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    if len(layers) != model.config.get_text_config(decoder=True).num_hidden_layers:
        return "not all of its layers are ftops blocks" if layers else "it has no ftops block; call ftops.patch(model) first"
    unserved = next((layer._ftops.reason for layer in layers if layer._ftops.block is None), None)
    if unserved is not None:
        return f"a layer is not served: {unserved}"
    if (stays or cache_dtype(model) is not None) and len({layer._ftops.device for layer in layers}) > 1:
        return "it is spread over devices, and a cache that is kept or has 8 bits cannot be"
    return None if all(layer._ftops.block.spec.causal for layer in layers) else "its attention is not causal"


def _plain(model: PreTrainedModel, batch: int, capacity: int) -> Session:
    return Session(CausalDecoder(model, batch, capacity), batch, capacity)


def fingerprint(model: PreTrainedModel) -> tuple[object, ...]:
    """What a graph takes for granted: addresses of weights, layers as they are, and nobody's hooks, which a replay would not call."""
    return (*(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())), fixed(model), model.training, model.dtype,
            cache_dtype(model), *(module._ftops.disturbed() for module in model.modules() if isinstance(module, FusedLayer)))


@contextmanager
def session(model: PreTrainedModel, batch: int, length: int, make: Make = _plain, kind: object = None) -> Iterator[Session]:
    """A session for `batch` rows of `length` tokens: the last one, with its graphs, if it fits and nothing about the model has changed.

    make: how a new one is made, by which those of one `kind` are. One whose cache takes more than KEPT of the memory is not kept.
    """
    now = fingerprint(model), kind
    kept = _SESSIONS.pop(model, [])
    found = next((one for seen, one in kept
                  if seen == now and one.batch == batch and length <= one.capacity <= max(2 * length, STEP)), None)
    if found is None:
        kept.clear()  # before memory is asked for
        step = max(STEP, 1 << (length - 1).bit_length() >> 3)  # a conversation that grows is captured anew every eighth or so
        found = make(model, batch, -(-length // step) * step if fixed(model) else length)
    try:
        yield found
    finally:
        if found.decoder.release():
            _SESSIONS[model] = [(now, found)]


def forget(model: PreTrainedModel) -> None:
    """Lets go of what is kept for the model's next call."""
    _SESSIONS.pop(model, None)
