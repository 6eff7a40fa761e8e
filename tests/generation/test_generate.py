"""`model.generate` of a patched model: transformers' tokens for every option, by the loop or, where that cannot, by transformers' own."""
from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessorList,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import ftops
from ftops.integrations.transformers import generate as module
from ftops.integrations.transformers.archs import ARCHS
from tests.families.places import IN_FLOAT32, in_turn
from tests.families.tiny import causal, prompt, tiny
from tests.generation.calls import run, same

DECODERS = [family for family in ARCHS if causal(family)]


@in_turn(2, padding=[None, "left", "right", "holes"], family=DECODERS)
def test_greedy(family, padding, device, dtype, loops):
    model = same(family, device, dtype, padding=padding)
    assert len(loops) == 1
    assert ftops.report(model).fallbacks == 0


def eos(family: str) -> list[int]:
    """Tokens that the rows of the batch say at different times."""
    rows = run(tiny(family))
    return [rows[0][12 + 4], rows[1][12 + 7]]


@IN_FLOAT32
@pytest.mark.parametrize("family", DECODERS)
def test_rows_end_at_different_times(family, device, dtype, loops):
    same(family, device, dtype, eos_token_id=eos(family), pad_token_id=1)
    assert len(loops) == 1


OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.4}, "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[5], [94, 78], [78, 99, 5]]}, "suppress": {"suppress_tokens": [5, 94, 78]},
    "sequence_bias": {"sequence_bias": [[[94], -3.0], [[78, 99], 5.0], [[3, 4, 5], -9.0]]},
    "min_length": {"eos_token_id": [94, 5, 78], "min_length": 18, "pad_token_id": 1},
    "min_new_tokens": {"eos_token_id": [94, 5, 78], "min_new_tokens": 9, "pad_token_id": 1},
    "max_length": {"max_length": 19, "max_new_tokens": None},
    "everything": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "bad_words_ids": [[5], [94, 78]], "eos_token_id": [5, 14],
                   "min_new_tokens": 6, "suppress_tokens": [7], "pad_token_id": 2, "sequence_bias": [[[3], 1.0]]},
    "forced_eos": {"forced_eos_token_id": 9}, "decay": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 5, "pad_token_id": 1},
    "static": {"cache_implementation": "static"}, "one_token": {"max_new_tokens": 1}, "two_tokens": {"max_new_tokens": 2},
}


@IN_FLOAT32
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, device, dtype, loops):
    same("llama", device, dtype, disable_compile=True, **OPTIONS[name])
    assert len(loops) == 1


def test_what_becomes_of_options_on_the_device(loops):
    """Processors of the loop's own are no calls at every step; those that it has no word for are, and in transformers' order."""
    same("llama", "cpu", torch.float32, **OPTIONS["everything"])
    same("llama", "cpu", torch.float32, **OPTIONS["forced_eos"])
    assert [len(loop._options.processors) for loop in loops] == [0, 1]
    assert loops[0]._options.min_new_tokens == 6


@pytest.mark.parametrize("processors", [
    [lambda ids, scores: scores.index_fill(1, ids[0, -1:], float("-inf"))],
    [TemperatureLogitsWarper(0.5), RepetitionPenaltyLogitsProcessor(1.3)],  # out of order
    [SuppressTokensLogitsProcessor([4, 5]), SuppressTokensLogitsProcessor([94])],  # twice
], ids=["callable", "order", "twice"])
def test_processors_of_the_callers_own(processors, loops):
    same("llama", "cpu", torch.float32, logits_processor=LogitsProcessorList(processors))
    assert len(loops) == 1


def test_criteria_of_the_callers_own(loops):
    """One that ends a single row, which is padded from then on, and one that never fires."""
    criteria = StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == 94, MaxTimeCriteria(1000)])
    same("llama", "cpu", torch.float32, stopping_criteria=criteria, eos_token_id=5, pad_token_id=1)
    same("llama", "cpu", torch.float32, stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: ids.shape[1] >= 17]))
    assert len(loops) == 2


FALLBACKS = {
    **{name: {name: True, "return_dict_in_generate": True} for name in ("output_attentions", "output_hidden_states")},
    "use_cache": {"use_cache": False},
    "compile_config": {"compile_config": CompileConfig(backend="eager")}, "prefill_chunk_size": {"prefill_chunk_size": 5},
    "past_key_values": {"past_key_values": DynamicCache()},
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_transformers_does_itself_is_said_once(name, loops, caplog):
    model = ftops.patch(tiny("llama"))
    ids, _ = prompt()
    with caplog.at_level(logging.WARNING, "ftops"):
        for _ in range(2):
            made = model.generate(ids, max_new_tokens=5, do_sample=False, **copy.deepcopy(FALLBACKS[name]))
    said = [record.message for record in caplog.records if "transformers' own loop" in record.message]
    assert len(said) == 1
    assert name in said[0]
    assert loops == []
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(made if isinstance(made, torch.Tensor) else made.sequences, expected)


def test_a_cache_of_the_callers_is_filled(loops):
    """It is kept for the next turn of a conversation."""
    model, cache = ftops.patch(tiny("llama")), DynamicCache()
    model.generate(prompt()[0], max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 16


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended = True


@IN_FLOAT32
def test_streamer(device, dtype, loops):
    """The prompt, then every token in its turn."""
    pieces = []
    for model in (tiny("llama", device, dtype), ftops.patch(tiny("llama", device, dtype))):
        streamer = Collector()
        tokens = run(model, padding=None, batch=1, streamer=streamer)
        assert streamer.ended
        assert [token for piece in streamer.pieces for token in (piece[0] if isinstance(piece[0], list) else piece)] == tokens[0]
        pieces.append(streamer.pieces)
    assert pieces[0] == pieces[1]
    assert len(loops) == 1


@IN_FLOAT32
def test_sampling(device, dtype, loops, monkeypatch):
    """torch.manual_seed gives the same tokens again, each among those that transformers would draw from, and rows are not alike."""
    monkeypatch.setattr(module, "fixed", lambda model: True)  # as on a GPU
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2}
    model = ftops.patch(tiny("llama", device, dtype))
    torch.manual_seed(5)
    first = run(model, **options)
    torch.manual_seed(5)
    assert run(model, **options) == first
    assert run(model, **options) != first
    assert len(loops) == 3
    assert first[4] != first[5]
    tokens = torch.tensor(first, device=device)
    mask = prompt(batch=3, padding="left")[1].to(device).repeat_interleave(2, 0)
    mask = torch.cat((mask, torch.ones(6, 20, dtype=torch.long, device=device)), 1)
    with torch.no_grad():
        logits = tiny("llama", device, dtype)(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 11:-1]
    kept = logits >= logits.topk(20).values[..., -1:] - 1e-3
    assert kept.gather(2, tokens[:, 12:, None]).all()
