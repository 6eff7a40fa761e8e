"""Padding that an encoder pays for, or that changes what it finds."""
from __future__ import annotations

import copy

import pytest
import torch

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


def test_little_padding_stays_where_it_is(counted):
    ids, mask = padded([20, 19], 20)
    with torch.inference_mode():
        ftops.patch(tiny("bert").bert)(ids, attention_mask=mask)
    assert counted == []


def test_nothing_but_padding(counted):
    ids, mask = padded([0, 0], 5)
    with torch.inference_mode():
        assert ftops.patch(tiny("bert").bert)(ids, attention_mask=mask).last_hidden_state.isfinite().all()
    assert counted == []


def test_a_mask_of_other_tokens():
    """Of another shape than the layer's input, as when a caller cuts a batch in two."""
    mask = padded([9, 3], 9)[1]
    rows = torch.zeros(2, 1, 1, 9)
    packing.attach(rows, mask)
    assert packing.packing(rows, torch.empty(2, 9, 64)).tokens.numel() == 12
    assert packing.packing(rows, torch.empty(1, 9, 64)) is None
    assert packing.packing(rows[:1], torch.empty(1, 9, 64)) is None
    assert packing.packing(None, torch.empty(2, 9, 64)) is None
