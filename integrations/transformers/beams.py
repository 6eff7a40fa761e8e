"""Beam search, and its decoder: beams share the pages of what they have in common, and going on from another beam copies no cache.

Row r owns pages r N to r N + N - 1 and writes into these alone. When it goes on from row p, its table takes over p's pages that are full,
and the one that is being filled, at most PAGE tokens, is copied.
"""
from __future__ import annotations

from dataclasses import fields, replace
from math import isfinite
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from ftops.generation import BeamOptions, Beams, BeamSession, Generated, Loop, Options
from ftops.integrations.transformers.cache import PagedLayer
from ftops.integrations.transformers.checks import checked, is_whole, most
from ftops.integrations.transformers.decoder import CausalDecoder, cache_dtype, narrow, session, unfit
from ftops.integrations.transformers.layer import FusedLayer
from ftops.progress import track

PAGE = 16  # tokens


class BeamCausalDecoder(CausalDecoder):
    """batch: all beams of all requests, `beams` neighbouring rows being one request's. capacity: a multiple of PAGE."""

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int, beams: int) -> None:
        super().__init__(model, batch, capacity, True)
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


def search(model: PreTrainedModel, options: Options, beams: BeamOptions, count: int, fill: int, ids: torch.Tensor,
           mask: torch.Tensor | None, positions: torch.Tensor | None = None, counted: torch.Tensor | None = None, progress: bool = False,
           **kept: bool) -> tuple[Beams, Generated]:
    """The `count` best continuations of each prompt and what the loop kept of the steps. Of ids[B K,S] and all that goes with it, K =
    beams.beams rows are one request's; `fill` follows the end of a sequence."""
    def make(model: PreTrainedModel, batch: int, capacity: int) -> BeamSession:
        return BeamSession(BeamCausalDecoder(model, batch, capacity, beams.beams), batch, capacity, beams)

    length = ids.shape[1] + most(options)
    with session(model, len(ids), -(-length // PAGE) * PAGE, make, beams) as one:
        one.fill_with(fill)
        loop = Loop(one, options, ids, mask, positions, counted, **kept)
        for _ in track(loop, "generating", most(options)) if progress else loop:
            pass
        return one.best(ids.shape[1], count), loop.result()


def generate_beams(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any], num_beams: int,
                   more: bool, progress: bool, *, num_return_sequences: int = 1, length_penalty: float = 1.0,
                   early_stopping: bool | str = False, beam_diversity_rate: float = 0.0) -> torch.Tensor:
    """`ftops.generate` with num_beams; `options` are the others, of a request."""
    for name, value, allowed, right in (
            ("num_beams", num_beams, "an integer of 2 or more", is_whole(num_beams, 2)),
            ("num_return_sequences", num_return_sequences, f"1 to {num_beams}, num_beams",
             is_whole(num_return_sequences, 1, num_beams)),
            ("length_penalty", length_penalty, "a finite number", _finite(length_penalty)),
            ("beam_diversity_rate", beam_diversity_rate, "a finite number", _finite(beam_diversity_rate)),
            ("early_stopping", early_stopping, "True, False, 'never'", isinstance(early_stopping, bool) or early_stopping == "never")):
        if not right:
            raise ValueError(f"generate: {name} is {value!r}; allowed: {allowed}")
    parsed = checked(model, ids, mask, options)
    if not parsed.greedy or more or parsed.processors or parsed.criteria or parsed.stop_strings:
        raise ValueError(f"generate: num_beams is {num_beams}, which does not go with temperature, text to stop at, callables, and what "
                         "return_... asks for; leave one of them out, stop at token ids (model.generate returns the scores of beams)")
    reason = unfit(model, stays=True)
    if reason is not None:
        raise ValueError(f"generate: num_beams is {num_beams} and {type(model).__name__} cannot be served: {reason}")
    rows = {field.name: value.repeat_interleave(num_beams, 0) for field in fields(Options)
            if isinstance(value := getattr(parsed, field.name), torch.Tensor) and (field.name != "logit_bias" or value.dim() == 2)}
    found, _ = search(model, replace(parsed, **rows), BeamOptions(num_beams, length_penalty, early_stopping, beam_diversity_rate),
                      num_return_sequences, parsed.pad_token_id or 0, ids.repeat_interleave(num_beams, 0),
                      None if mask is None else mask.repeat_interleave(num_beams, 0), progress=progress)
    return found.sequences


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and isfinite(value)
