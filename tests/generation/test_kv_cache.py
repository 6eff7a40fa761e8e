"""patch(kv_cache=): half the memory of keys and values while generating, and what a user reads stays nearly the same."""
from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel

import ftops
from ftops.integrations.demo.load import load_causal_lm
from ftops.integrations.transformers import decoder
from ftops.integrations.transformers.cache import FixedLayer, PagedLayer
from ftops.integrations.transformers.decoder import CausalDecoder
from ftops.integrations.transformers.narrow import Narrow
from tests.families.places import IN_FLOAT32
from tests.families.tiny import prompt, tiny

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
STEPS = 24
# The most that a step's distribution differs on average, by the tokens that the scales were measured on; half of it was found.
DIVERGENCE = {("int8", 1): 0.01, ("fp8", 1): 0.005, ("int8", 64): 0.0025, ("fp8", 64): 0.004}


@torch.inference_mode()
def logits(model, ids, prompted, mask=None):
    """[B, 1 + steps, V] after the first `prompted` tokens and after each one behind them."""
    one = CausalDecoder(model, len(ids), ids.shape[1])
    out = [one.prefill(ids[:, :prompted], None if mask is None else mask[:, :prompted], None)]
    out += [one.step(ids[:, place : place + 1]) for place in range(prompted, ids.shape[1])]
    return torch.stack(out, 1), one


@IN_FLOAT32
@pytest.mark.parametrize("kv_cache", DTYPES)
@pytest.mark.parametrize("prompted", [1, 64])
def test_distribution_after_an_8_bit_cache(kv_cache, prompted, device, dtype):
    """The real model on real text; what a long prompt has in the cache, and what follows a single word."""
    model, tokenizer = load_causal_lm()[:2]
    with open(copy.__file__) as file:
        ids = tokenizer(file.read(2000), return_tensors="pt").input_ids[:, : prompted + STEPS].to(device)
    model = ftops.patch(model.to(device, dtype))
    exact = logits(model, ids, prompted)[0].log_softmax(-1)
    made, one = logits(ftops.patch(model, kv_cache=kv_cache), ids, prompted)
    kept = one._cache.layers[0]
    assert kept.keys.dtype is kept.values.dtype is DTYPES[kv_cache]
    divergence = (exact.exp() * (exact - made.log_softmax(-1))).sum(-1)
    assert 0 < divergence.mean() < DIVERGENCE[kv_cache, prompted]
    assert divergence[:, 0].abs().max() < 1e-5  # a prompt attends to itself before anything is rounded


@IN_FLOAT32
@pytest.mark.parametrize("family", ["mistral", "qwen3", "gptj", "gpt2"])
def test_family(family, device, dtype):
    """With padding, rotary of both forms, norms of heads and windows. Of random weights, without sinks and outliers: 0.017 to 0.055."""
    model = ftops.patch(tiny(family, device, dtype))
    ids, mask = (t.to(device) for t in prompt(batch=3, length=40, padding="left"))
    exact, made = logits(model, ids, 20, mask)[0], logits(ftops.patch(model, kv_cache="int8"), ids, 20, mask)[0]
    assert 0 < (made - exact).norm() < 0.08 * exact.norm()


@IN_FLOAT32
def test_every_way_to_generate(device, dtype, monkeypatch):
    """ftops.generate, model.generate, drafts and beams run on it, and a second prompt measures scales of its own."""
    made: list[torch.dtype] = []
    original = decoder.CausalDecoder.__init__

    def watching(self, *args):
        original(self, *args)
        made.append(decoder.cache_dtype(args[0]))

    monkeypatch.setattr(decoder.CausalDecoder, "__init__", watching)
    model = ftops.patch(tiny("llama", device, dtype), kv_cache="int8")
    ids = prompt(batch=2, length=12)[0].to(device)
    tokens = ftops.generate(model, ids, max_new_tokens=8)
    assert torch.equal(ftops.generate(model, ids, max_new_tokens=8, prompt_lookup_num_tokens=3), tokens)
    with torch.no_grad():
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)
        beams = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2)
    assert beams.shape == tokens.shape
    assert made == [torch.int8] * 4
    ftops.generate(model, ids.flip(1), max_new_tokens=8)
    assert torch.equal(ftops.generate(model, ids, max_new_tokens=8), tokens)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_a_step_of_the_original_layer_reads_what_was_kept(dtype, paged):
    """Where a layer falls back, transformers' attention is given the cache, in the model's own dtype."""
    k, v = torch.randn(2, 1, 3, 5, 8)
    k, v = k.expand(2, 3, 5, 8).contiguous(), v.expand(2, 3, 5, 8).contiguous()
    places, lengths = torch.full((2, 1), 4, dtype=torch.int32), torch.full((2,), 5, dtype=torch.int32)
    if paged:
        table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
        layer = PagedLayer(*(torch.zeros(4, 4, 3, 8).to(dtype) for _ in range(2)), table, places, lengths, 1, Narrow(dtype))
    else:
        layer = FixedLayer(8, places, lengths, Narrow(dtype))
    layer.update(k[:, :, :4], v[:, :, :4])
    layer.stepping = True
    for made, given in zip(layer.update(k[:, :, 4:], v[:, :, 4:]), (k, v), strict=True):
        assert made.dtype is torch.float32 and made.shape == (2, 3, 8, 8)
        assert 0 < (made[:, :, :5] - given).abs().max() < 0.05 * given.abs().max()


def test_copies_keep_it_and_unpatch_ends_it():
    model = ftops.patch(tiny("llama"), kv_cache="fp8")
    assert decoder.cache_dtype(copy.deepcopy(model)) is torch.float8_e4m3fn
    assert "keys and values in float8_e4m3fn while generating" in str(ftops.report(model))
    assert decoder.cache_dtype(ftops.patch(model)) is None and "keys and values" not in str(ftops.report(model))
    ftops.unpatch(ftops.patch(model, kv_cache="fp8"))
    assert "_ftops_kv_cache" not in model.__dict__


@pytest.mark.parametrize(("make", "kv_cache", "words"), [
    (lambda: tiny("llama"), "int4", ["kv_cache is 'int4'", "None, 'int8', 'fp8'"]),
    (lambda: AutoModel.from_config(tiny("bert").config), "int8", ["kv_cache is 'int8'", "does not generate"]),
    (lambda: torch.nn.Linear(2, 2), "int8", ["Linear does not generate"]),
])
def test_what_cannot_have_one_is_refused(make, kv_cache, words):
    model = make()
    with pytest.raises(ValueError) as refusal:
        ftops.patch(model, kv_cache=kv_cache)
    assert all(word in str(refusal.value) for word in words)
    assert not ftops.report(model).swapped
