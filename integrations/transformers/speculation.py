"""ftops.generate with drafts: several tokens a step are checked, from the text itself or from a smaller model that runs ahead."""
from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from ftops.generation import DraftSession, LookupLoop, LookupSession, Options, rules
from ftops.generation.lookup import MOST, SERVED
from ftops.integrations.transformers.checks import check_length, checked, most
from ftops.integrations.transformers.decoder import CausalDecoder, SeveralDecoder, fingerprint, session, unfit
from ftops.progress import track

DRAFTS = 5  # tokens that a draft model writes ahead, unless the caller says how many


class DraftCausalDecoder(CausalDecoder):
    """Reads one or two tokens a row, to wherever the row is by now."""

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int) -> None:
        super().__init__(model, batch, capacity, True)
        with torch.inference_mode(False):
            self._pairs, self._behind = self._places.repeat(1, 2), torch.zeros_like(self._positions)
            self._ahead = torch.arange(2, dtype=torch.int32, device=self.device)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        logits = super().prefill(ids, mask, positions)
        self._behind.copy_(ids.shape[1] - self._positions)
        return logits

    def read(self, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        places = self._places if tokens.shape[1] == 1 else self._pairs
        for layer in self._cache.layers:
            layer.places = places
        self._lengths.copy_(ends)
        places.copy_(ends[:, None] - tokens.shape[1] + self._ahead[: tokens.shape[1]])
        return self._run(tokens, self._rows if self._padded else None, places - self._behind)


def speculate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any],
              draft_model: PreTrainedModel | None, num_draft_tokens: int | None, more: bool, progress: bool) -> torch.Tensor:
    """See `ftops.generate`."""
    parsed = checked(model, ids, mask, options, streamed=False)
    name, drafts = ("prompt_lookup_num_tokens", parsed.prompt_lookup_num_tokens) if draft_model is None else (
        "num_draft_tokens", DRAFTS if num_draft_tokens is None else num_draft_tokens)
    words = model.config.get_text_config(decoder=True).vocab_size
    asked = rules.build(parsed, ids, torch.ones_like(ids, dtype=torch.bool), words).keys() - SERVED
    whole = isinstance(drafts, int) and 1 <= drafts <= MOST
    if not whole or asked or more or parsed.processors or parsed.criteria or parsed.stop:
        raise ValueError(f"generate: {name} is {drafts}; allowed: 1 to {MOST}, without penalties, bias, words to avoid or to stop at, "
                         "min_new_tokens, top_p that changes, callables, and what return_... asks for")
    reason = unfit(model, stays=True)
    if reason is not None:
        raise ValueError(f"generate: {name} is {drafts} and {type(model).__name__} cannot be served: {reason}")
    kind: tuple[object, ...] = ("lookup", drafts)
    if draft_model is not None:
        _check_draft(model, ids, parsed, draft_model)
        kind = ("draft", drafts, weakref.ref(draft_model), fingerprint(draft_model))

    def make(model: PreTrainedModel, batch: int, capacity: int) -> LookupSession:
        decoder = SeveralDecoder(model, batch, capacity, 1 + drafts)
        if draft_model is None:
            return LookupSession(decoder, batch, capacity, drafts)
        return DraftSession(decoder, DraftCausalDecoder(draft_model, batch, capacity), batch, capacity, drafts)

    with session(model, len(ids), ids.shape[1] + most(parsed) + 1 + drafts, make, kind) as one:
        loop = LookupLoop(one, parsed, ids, mask)
        for _ in track(loop, "generating", most(parsed), lambda: int(loop.lengths.max())) if progress else loop:
            pass
        return loop.result().sequences


def _check_draft(model: PreTrainedModel, ids: torch.Tensor, options: Options, draft_model: PreTrainedModel) -> None:
    reason = unfit(draft_model, stays=True)
    if reason is not None:
        raise ValueError(f"generate: draft_model, {type(draft_model).__name__}, cannot be served: {reason}")
    if options.prompt_lookup_num_tokens:
        raise ValueError("generate: draft_model and prompt_lookup_num_tokens are given, and drafts come from one of them; leave one out")
    words = [one.config.get_text_config(decoder=True).vocab_size for one in (model, draft_model)]
    if words[0] != words[1]:
        raise ValueError(f"generate: draft_model has a vocabulary of {words[1]} tokens and the model one of {words[0]}; allowed: a "
                         "model with the same tokenizer")
    if draft_model.device != model.device:
        raise ValueError(f"generate: draft_model is on {draft_model.device} and the model on {model.device}; move it, "
                         f"draft_model.to({str(model.device)!r})")
    check_length(draft_model, ids, options)
