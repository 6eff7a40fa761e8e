"""Padding that an encoder pays for, or that changes what it finds."""
from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import ftops
from ftops import ops
from ftops.integrations.transformers import packing
from tests.accuracy import assert_accurate
from tests.families.tiny import VOCABULARY, tiny


@pytest.fixture
def counted(monkeypatch):
    """How many tokens each layer's attention saw."""
    seen = []

    def attention_varlen(q, *args, **kwargs):
        seen.append(q.shape[0])
        return original(q, *args, **kwargs)

    original = ops.attention_varlen
    monkeypatch.setattr(packing.ops, "attention_varlen", attention_varlen)
    return seen


def padded(lengths: list[int], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (len(lengths), longest))
    return ids, (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).long()


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
@pytest.mark.parametrize("lengths", [[9, 3, 1], [9, 0, 4]], ids=str)
def test_only_real_tokens_are_computed(lengths, dtype, counted):
    ids, mask = padded(lengths, 9)
    model = tiny("bert").bert
    wide = copy.deepcopy(model).double()
    with torch.inference_mode():
        theirs, exact = (m(ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (model, wide))
        out = ftops.patch(model)(ids, attention_mask=mask.to(dtype)).last_hidden_state
    assert counted == [sum(lengths)] * model.config.num_hidden_layers
    assert_accurate(out[mask.bool()], exact, theirs)
    assert (out[~mask.bool()] == 0).all()
    assert ftops.report(model).fallbacks == 0


def test_holes_in_the_middle(counted):
    ids, mask = padded([9, 6], 9)
    mask[0, 2:5] = 0
    model = tiny("bert").bert
    wide = copy.deepcopy(model).double()
    with torch.inference_mode():
        theirs, exact = (m(ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (model, wide))
        ours = ftops.patch(model)(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert counted[0] == 12
    assert_accurate(ours, exact, theirs)


def test_nothing_but_padding(counted):
    ids, mask = padded([0, 0], 5)
    with torch.inference_mode():
        assert ftops.patch(tiny("bert").bert)(ids, attention_mask=mask).last_hidden_state.isfinite().all()
    assert counted == []


LEFT = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 12, [0] * 11 + [1]])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gptj", "gpt2"])
@pytest.mark.parametrize("cached", [None, "dynamic", "static"])
def test_a_prompt_padded_on_the_left(family, cached, counted):
    """Rotary of both forms, learned positions and windows; what a cache then holds serves the next token."""
    model, length = tiny(family), LEFT.shape[1]
    ids, wide = torch.randint(0, VOCABULARY, (3, length + 1)), copy.deepcopy(model).double()
    if model._supports_sdpa:  # eager softmax is in float32, where the smallest float64 is -inf and a row that sees nothing NaN
        wide.set_attn_implementation("sdpa")
    mask, positions = torch.cat((LEFT, LEFT[:, -1:]), 1), (torch.cat((LEFT, LEFT[:, -1:]), 1).cumsum(1) - 1).clamp(min=0)

    def logits(model):
        cache = {None: lambda: None, "dynamic": lambda: DynamicCache(config=model.config),
                 "static": lambda: StaticCache(config=model.config, max_cache_len=20)}[cached]()
        with torch.inference_mode():
            first = model(ids[:, :length], attention_mask=LEFT, position_ids=positions[:, :length], past_key_values=cache).logits
            if cache is None:
                return first[LEFT.bool()]
            then = model(ids[:, length:], attention_mask=mask, position_ids=positions[:, length:], past_key_values=cache).logits
            return torch.cat((first[LEFT.bool()], then[:, 0]))

    theirs, exact = logits(model), logits(wide)
    assert_accurate(logits(ftops.patch(model)), exact, theirs)
    assert counted == [int(LEFT.sum())] * model.config.num_hidden_layers
    assert ftops.report(model).fallbacks == 0


@pytest.mark.parametrize("mask", [LEFT.flip(1), LEFT.roll(1, 1)], ids=["right", "holes"])
def test_other_prompts_stay_where_they_are(mask, counted):
    """What Hugging Face computes at padding behind a prompt, `generate` goes on from."""
    with torch.inference_mode():
        ftops.patch(tiny("llama"))(torch.zeros_like(mask), attention_mask=mask)
    assert counted == []


def test_a_mask_of_other_tokens():
    """Of another shape than the layer's input, as when a caller cuts a batch in two."""
    mask = padded([9, 3], 9)[1]
    rows = torch.zeros(2, 1, 1, 9)
    packing.attach(rows, mask)
    spec = ftops.patch(tiny("bert")).bert.encoder.layer[0]._ftops.block.spec

    def found(rows, *shape):
        return packing.packing(spec, rows, torch.empty(shape), None, None)

    assert found(rows, 2, 9, 64).tokens.numel() == 12
    assert found(rows, 1, 9, 64) is found(rows[:1], 1, 9, 64) is found(None, 2, 9, 64) is None
