"""What a call returns beside its tokens is what transformers returns, from the loop."""
from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

import ftops
from ftops.integrations.transformers import decoder
from ftops.integrations.transformers import generate as module
from tests.families.places import IN_FLOAT32
from tests.families.tiny import prompt, tiny

ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": 1}
OPTIONS = {
    "plain": {}, "ends": {"eos_token_id": [94, 5, 78]}, "rules": {"repetition_penalty": 1.4, "bad_words_ids": [[5], [94, 78]]},
    "callable": {"logits_processor": LogitsProcessorList([lambda ids, scores: scores.index_fill(1, ids[0, -1:], float("-inf"))])},
    "logits_alone": {"output_scores": False}, "nothing": {"output_scores": False, "output_logits": False},
}


@pytest.fixture
def stays(monkeypatch):
    """As on a GPU: caches stay where they are, tokens are drawn by the loop, and beams share pages."""
    for place in (decoder, module):
        monkeypatch.setattr(place, "fixed", lambda model: True)


def run(model, batch=3, **options):
    ids, mask = (t.to(model.device) for t in prompt(batch=batch, padding="left"))
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 12, "do_sample": False, **ALL, **options})


def close(ours, theirs):
    if theirs is None:
        assert ours is None
    else:
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4)


@IN_FLOAT32
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_and_logits(name, device, dtype, loops):
    model = tiny("llama", device, dtype)
    theirs = run(model, **OPTIONS[name])
    ours = run(ftops.patch(model), **OPTIONS[name])
    assert len(loops) == 1
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    close(ours.scores, theirs.scores)
    close(ours.logits, theirs.logits)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("place", [
    pytest.param("grows", id="cpu"), pytest.param("stays", id="cpu-stays"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)])
def test_the_cache_is_the_callers(family, place, request, loops):
    """It is as long as transformers' own, a next turn goes on from it, with gradients too, and another call does not change it."""
    model = tiny(family, "cuda" if place == "cuda" else "cpu")
    theirs = run(model, batch=1)
    if place == "stays":
        request.getfixturevalue("stays")
    made = run(ftops.patch(model), batch=1)
    run(model, batch=1, repetition_penalty=2.0)
    assert len(loops) == 2
    ours = made.past_key_values
    assert ours.get_seq_length() == theirs.past_key_values.get_seq_length() == 23
    for one, other in zip(ours.layers, theirs.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys[:, :, -7:], other.keys[:, :, -7:], rtol=1e-4, atol=1e-4)
    logits = [model(made.sequences[:, -1:], past_key_values=cache).logits for cache in (ours, theirs.past_key_values)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    logits[0].sum().backward()


@IN_FLOAT32
def test_scores_of_drawn_tokens(device, dtype, loops, stays):
    """After temperature and filters, as transformers has them."""
    made = run(ftops.patch(tiny("llama", device, dtype)), do_sample=True, top_k=20, temperature=0.8)
    scores, logits = torch.stack(made.scores, 1), torch.stack(made.logits, 1) / 0.8
    torch.testing.assert_close(scores, logits.masked_fill(logits < logits.topk(20).values[..., -1:], float("-inf")))
    assert scores.gather(2, made.sequences[:, 12:, None]).isfinite().all()
    assert len(loops) == 1


BEAMS = {"plain": {"num_return_sequences": 3}, "ends": {"eos_token_id": [94, 5, 78], "num_return_sequences": 2, "length_penalty": 2.0},
         "rules": {"repetition_penalty": 1.3}, "no_scores": {"output_scores": False}}


@IN_FLOAT32
@pytest.mark.parametrize("name", BEAMS)
def test_beams(name, device, dtype, loops, stays):
    model = tiny("llama", device, dtype)
    theirs = run(model, num_beams=3, **BEAMS[name])
    ours = run(ftops.patch(model), num_beams=3, **BEAMS[name])
    assert len(loops) == 1
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    close(ours.logits, theirs.logits)
    if theirs.scores is None:
        assert ours.scores is ours.sequences_scores is theirs.sequences_scores is None
        return
    close(ours.scores, theirs.scores)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)


@IN_FLOAT32
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_hidden_states_of_the_context(family, device, dtype):
    """What the head reads, after the final norm, and nothing of it at padding; the hook that hears it is gone afterwards."""
    ids, mask = (t.to(device) for t in prompt(batch=3, padding="left"))
    model = tiny(family, device, dtype)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        theirs = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states[-1]
    plain = ftops.generate(ftops.patch(model), ids, mask, max_new_tokens=4)
    made = ftops.generate(model, ids, mask, max_new_tokens=4, return_hidden_states=True)
    torch.testing.assert_close(made.context_hidden_states, theirs * mask[..., None], rtol=1e-4, atol=1e-4)
    assert torch.equal(made.sequences, plain)
    assert not model.base_model._forward_hooks
