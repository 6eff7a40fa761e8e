"""A patched model computes what Hugging Face's does: same prompt, same weights, within what the dtype itself costs."""
from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import ftops
from ftops import block
from ftops.integrations.transformers.archs import ARCHS
from tests.accuracy import assert_accurate
from tests.families.places import ANYWHERE, EVERYWHERE, in_turn
from tests.families.tiny import TINY, causal, prompt, tiny

DECODERS = [family for family in ARCHS if causal(family)]
Run = Callable[[PreTrainedModel], torch.Tensor]


def check(family: str, device: str, dtype: torch.dtype, run: Run) -> PreTrainedModel:
    """run(model) patched is as near to float64 as it is unpatched, and no layer fell back to get there. Returns the patched model."""
    model = tiny(family, device, dtype)
    wide = copy.deepcopy(model).double()
    if ARCHS[family].uses_registry:
        # Its eager softmax is in float32, where the smallest float64 is -inf and a row that sees nothing NaN.
        wide.config._attn_implementation = "sdpa"
    with torch.inference_mode():
        theirs, exact = run(model), run(wide)
        ours = run(ftops.patch(model))
    assert ftops.report(model).fallbacks == 0
    assert_accurate(ours, exact.double(), theirs)
    return model


def test_every_family_is_tested():
    assert set(TINY) == set(ARCHS)


@EVERYWHERE
@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize("family", ARCHS)
def test_prompt(family, padding, device, dtype):
    ids, mask = (t.to(device) for t in prompt(padding=padding))
    check(family, device, dtype, lambda model: model(ids, attention_mask=mask).logits[mask.bool()])


@EVERYWHERE
@pytest.mark.parametrize("family", ARCHS)
def test_prompt_without_mask_or_cache(family, device, dtype):
    ids = prompt(length=20)[0].to(device)
    check(family, device, dtype, lambda model: model(ids, use_cache=False).logits)


@EVERYWHERE
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_within_linears(family, device, dtype, monkeypatch):
    """Of few rows, in the pass of the linear behind."""
    monkeypatch.setattr(block, "NORMED_ROWS", dict.fromkeys((None, "int8", "int4"), (0, 16)))
    ids = prompt(length=8)[0].to(device)
    check(family, device, dtype, lambda model: model(ids, use_cache=False).logits)


@EVERYWHERE
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("family", ARCHS)
def test_mask_of_the_callers_own(family, kind, device, dtype):
    """A 4-D mask is the whole truth: here two documents in one row, each seeing itself only, in both directions."""
    ids = prompt(length=12)[0].to(device)
    document = torch.arange(12, device=device) // 6
    visible = (document == document.unsqueeze(-1)).expand(2, 1, 12, 12)

    def run(model: PreTrainedModel) -> torch.Tensor:
        mask = visible if kind == "bool" else torch.zeros(visible.shape, dtype=model.dtype, device=device).masked_fill(
            ~visible, torch.finfo(model.dtype).min)
        if kind == "bool" and model.config._attn_implementation == "eager":
            model.config._attn_implementation = "sdpa"  # the eager function would add True as 1
        return model(ids, attention_mask=mask, use_cache=False).logits

    if kind == "bool" and not ARCHS[family].uses_registry:
        pytest.skip("Hugging Face itself cannot take a bool mask here")
    check(family, device, dtype, run)


def by_steps(ids: torch.Tensor, mask: torch.Tensor, static: bool) -> Run:
    """Logits of one sequence fed in pieces: a prompt, single tokens, a few at once, many at once, and one more."""
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
        logits, start = [], 0
        for length in (12, 1, 1, 5, 18, 1):
            end = start + length
            logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits)
            start = end
        return torch.cat(logits, 1)[mask.bool()]
    return run


@in_turn(2, ANYWHERE, cache=["dynamic", "static"], padding=[None, "left", "holes"], family=DECODERS)
def test_cache(family, padding, cache, device, dtype):
    ids, mask = (t.to(device) for t in prompt(length=38, padding=padding))
    check(family, device, dtype, by_steps(ids, mask, cache == "static"))


@EVERYWHERE
@pytest.mark.parametrize("family", DECODERS)
def test_cache_that_is_used_again(family, device, dtype):
    """reset() leaves a static cache allocated but empty; old keys must not shine through."""
    ids = prompt(length=40)[0].to(device)

    def run(model: PreTrainedModel) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(ids, past_key_values=cache)
        cache.reset()
        return model(ids[:, 5:30], past_key_values=cache).logits

    check(family, device, dtype, run)


@EVERYWHERE
@pytest.mark.parametrize("family", ARCHS)
def test_embeddings_in_and_hidden_states_out(family, device, dtype):
    ids, mask = (t.to(device) for t in prompt(padding="left"))

    def run(model: PreTrainedModel) -> torch.Tensor:
        out = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        return torch.stack(out.hidden_states)[:, mask.bool()]

    check(family, device, dtype, run)
