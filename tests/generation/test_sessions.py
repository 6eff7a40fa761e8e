"""What is kept from one call to the next: caches, graphs, and nothing of what was said."""
from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

import ftops
from ftops.integrations.transformers import decoder
from ftops.integrations.transformers.archs import ARCHS
from tests.families.places import IN_FLOAT32, in_turn
from tests.families.tiny import causal, prompt, tiny
from tests.generation.calls import run, same

DECODERS = [family for family in ARCHS if causal(family)]


@in_turn(2, padding=[None, "left", "holes"], family=DECODERS)
def test_a_cache_that_stays_where_it_is(family, padding, device, dtype, monkeypatch):
    """What a graph is captured over, here step by step: a prompt, steps past every window, and another prompt after it."""
    monkeypatch.setattr(decoder, "fixed", lambda model: True)
    monkeypatch.setattr(decoder.CausalDecoder, "capturable", property(lambda self: False, lambda self, value: None), raising=False)
    model = same(family, device, dtype, padding=padding)
    assert run(model, padding=padding, batch=3, max_new_tokens=5) == run(tiny(family, device, dtype), padding=padding, max_new_tokens=5)
    assert ftops.report(model).fallbacks == 0


@IN_FLOAT32
def test_a_layer_that_falls_back_in_a_step(device, dtype, monkeypatch):
    """The original layer stores and finds its keys where the fused ones do."""
    monkeypatch.setattr(decoder, "fixed", lambda model: True)
    model, theirs = ftops.patch(tiny("llama", device, dtype)), run(tiny("llama", device, dtype))
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert run(model) == theirs
    assert ftops.report(model).fallbacks >= (20 if device == "cpu" else 3)  # what a graph replays is not counted


def test_a_graph_is_looked_up_for_the_prompt_at_hand(monkeypatch):
    """Not for the one before, whose padding a graph would go on hiding."""
    looked = []
    monkeypatch.setattr(decoder.Session, "adopt", lambda self, given, *_: (looked.append(self.decoder.shape()), (given, None))[1])
    model = ftops.patch(tiny("llama"))
    for padding in ("left", None, None, "left"):
        run(model, padding=padding)
    assert looked == [(True,), (False,), (False,), (True,)]


@IN_FLOAT32
def test_the_next_call_starts_afresh(device, dtype, loops):
    """Nothing of a call is left in what the next one uses again: not tokens, padding, penalties, nor the model's old weights."""
    model, fresh = ftops.patch(tiny("llama", device, dtype)), tiny("llama", device, dtype)
    calls = ({"repetition_penalty": 1.4}, {"padding": None}, {"max_new_tokens": 7}, {"repetition_penalty": 1.2}, {"max_new_tokens": 40},
             {"batch": 2}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {})
    for options in calls:
        assert run(model, **options) == run(fresh, **options)
    for one in (model, fresh):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter += 0.02 * torch.randn(parameter.shape).to(parameter)
    assert run(model) == run(fresh)
    model.load_state_dict({name: value.clone() for name, value in tiny("llama", device, dtype).state_dict().items()}, assign=True)
    assert run(model) == run(tiny("llama", device, dtype))
    assert len(loops) == len(calls) + 2


def test_within_inference_mode_and_after(loops):
    """Buffers that were made inside of it serve outside, and the tokens are no inference tensors there."""
    model, (ids, mask) = ftops.patch(tiny("llama")), prompt()
    with torch.inference_mode():
        first = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False).tolist()
    again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert again.tolist() == first
    assert not again.is_inference()


def test_copies_and_unpatched_models(loops):
    model = ftops.patch(tiny("llama"))
    expected = run(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert run(copied) == expected
    assert len(loops) == 3
    ftops.unpatch(model)
    assert type(model) is type(tiny("llama"))
    assert run(model) == expected
    assert len(loops) == 3
    assert model not in decoder._SESSIONS


def test_a_model_that_is_let_go_takes_its_cache_along():
    model = ftops.patch(tiny("llama"))
    run(model)
    kept = weakref.ref(decoder._SESSIONS[model][0][1])
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", DECODERS)
def test_a_step_is_one_graph(family):
    """Captured once for each kind of call, replayed by the next calls, with no layer falling back."""
    model = ftops.patch(tiny(family, "cuda"))
    for options in ({}, {"padding": None}, {"repetition_penalty": 1.3}):
        run(model, **options)
        (_, session), = decoder._SESSIONS[model]
        captured = len(session._captured)
        for _ in range(2):
            run(model, **options)
        (_, session), = decoder._SESSIONS[model]
        assert len(session._captured) == captured
    assert captured == 3
    assert ftops.report(model).fallbacks == 0


@pytest.mark.gpu
def test_a_large_cache_is_not_kept(monkeypatch):
    model = ftops.patch(tiny("llama", "cuda"))
    monkeypatch.setattr(decoder, "KEPT", 0.0)
    theirs = run(tiny("llama", "cuda"))
    assert run(model) == run(model) == theirs
    assert model not in decoder._SESSIONS


@pytest.mark.gpu
def test_a_layer_that_is_changed_later_is_seen():
    """A forward that somebody puts inside a fused layer would be passed by in a replay."""
    model, fresh = ftops.patch(tiny("llama", "cuda")), tiny("llama", "cuda")
    run(model)
    for one in (model, fresh):
        one.model.layers[1].mlp.forward = torch.zeros_like
    assert run(model) == run(fresh)


@pytest.mark.gpu
def test_a_hook_that_comes_later_is_called():
    """A replay would pass it by."""
    model, calls = ftops.patch(tiny("llama", "cuda")), []
    run(model)
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    run(model)
    assert len(calls) == 20
    handle.remove()
    run(model)
    (_, session), = decoder._SESSIONS[model]
    assert len(session._captured) == 1
