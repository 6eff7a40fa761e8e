"""Beam search on shared pages gives transformers' sequences, for every way to end and to compare."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops.integrations.demo.load import load_causal_lm
from ftops.integrations.transformers import beams, decoder
from ftops.integrations.transformers import generate as module
from ftops.integrations.transformers.archs import ARCHS
from tests.families.places import IN_FLOAT32
from tests.families.tiny import causal, prompt, tiny

DECODERS = [family for family in ARCHS if causal(family)]


@pytest.fixture(autouse=True)
def stays(monkeypatch):
    """On a CPU as well, beams share pages, step by step; how often that ran."""
    ran: list[object] = []
    original = beams.BeamSession.best
    monkeypatch.setattr(module, "fixed", lambda model: True)
    monkeypatch.setattr(decoder, "fixed", lambda model: True)
    monkeypatch.setattr(beams.BeamSession, "best", lambda self, *args: (ran.append(self), original(self, *args))[1])
    return ran


def run(model, padding="left", batch=2, **options):
    ids, mask = (t.to(model.device) for t in prompt(batch=batch, length=options.pop("length", 12), padding=padding))
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 16, "do_sample": False, "num_beams": 3, **options}).tolist()


@IN_FLOAT32
@pytest.mark.parametrize("family", DECODERS)
def test_family(family, device, dtype, stays):
    """Long enough to fill pages, and past the window of the families that have one."""
    model = tiny(family, device, dtype)
    theirs = run(model)
    assert run(ftops.patch(model)) == theirs
    assert len(stays) == 1
    assert ftops.report(model).fallbacks == 0


ENDS = [94, 5, 78]
OPTIONS = {
    "returned": {"num_return_sequences": 3}, "two": {"num_beams": 2}, "many": {"num_beams": 6, "num_return_sequences": 4},
    "ends": {"eos_token_id": ENDS, "pad_token_id": 1},
    "ends_zero_pad": {"eos_token_id": ENDS, "pad_token_id": 0, "num_return_sequences": 3},
    "first_k": {"eos_token_id": ENDS, "early_stopping": True, "pad_token_id": 1, "num_return_sequences": 3},
    "never": {"eos_token_id": ENDS, "early_stopping": "never", "pad_token_id": 1, "num_return_sequences": 3},
    "long": {"eos_token_id": ENDS, "length_penalty": 2.0, "early_stopping": "never", "pad_token_id": 1, "num_return_sequences": 3},
    "short": {"eos_token_id": ENDS, "length_penalty": -1.0, "pad_token_id": 1, "num_return_sequences": 3},
    "no_penalty": {"eos_token_id": ENDS, "length_penalty": 0.0, "early_stopping": "never", "pad_token_id": 1},
    "repetition": {"repetition_penalty": 1.3}, "ngrams": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [94, 78]]}, "at_least": {"eos_token_id": ENDS, "min_new_tokens": 10, "pad_token_id": 1},
    "one_token": {"max_new_tokens": 1}, "a_page": {"length": 16, "max_new_tokens": 20}, "a_page_less": {"length": 15}, "lone": {"batch": 1},
    "unpadded": {"padding": None},
}


@IN_FLOAT32
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, device, dtype, stays):
    model = tiny("llama", device, dtype)
    theirs = run(model, **OPTIONS[name])
    assert run(ftops.patch(model), **OPTIONS[name]) == theirs
    assert len(stays) == 1


@IN_FLOAT32
def test_the_next_search_starts_afresh(device, dtype, stays):
    model, fresh = ftops.patch(tiny("llama", device, dtype)), tiny("llama", device, dtype)
    for options in ({}, {"eos_token_id": ENDS, "pad_token_id": 1}, {"padding": None}, {"num_beams": 2}, {"num_beams": 1}, {}):
        assert run(model, **options, max_new_tokens=8) == run(fresh, **options, max_new_tokens=8)
    assert len(stays) == 5


@pytest.mark.parametrize("options", [
    {"do_sample": True, "top_k": 20}, {"logits_processor": [lambda ids, scores: scores]}], ids=["sampled", "own"])
def test_what_transformers_does_itself(options, stays):
    outputs = []
    for model in (tiny("llama"), ftops.patch(tiny("llama"))):
        torch.manual_seed(3)
        outputs.append(run(model, **options))
    assert outputs[0] == outputs[1]
    assert stays == []


def test_a_layer_that_falls_back(stays):
    """The original layer finds its keys where the beams' pages are."""
    model, theirs = ftops.patch(tiny("llama")), run(tiny("llama"))
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert run(model) == theirs
    assert len(stays) == 1
    assert ftops.report(model).fallbacks >= 16


def test_a_real_model(stays):
    """Text that a trained model writes, with ends that compete."""
    model, tokenizer = load_causal_lm()
    inputs = tokenizer(["def is_prime(n):"], return_tensors="pt")
    options = {"max_new_tokens": 40, "num_beams": 4, "num_return_sequences": 4, "do_sample": False, "pad_token_id": 0,
               "eos_token_id": tokenizer("\n").input_ids[-1:]}
    theirs = model.generate(**inputs, **options).tolist()
    assert ftops.patch(model).generate(**inputs, **options).tolist() == theirs
    assert len(stays) == 1
