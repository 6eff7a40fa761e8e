"""The engine over pages of 8 bits: half the memory, nothing clipped whatever a request says, and nearly the same distribution."""
from __future__ import annotations

import copy

import pytest
import torch

import ftops
from ftops.engine import Prompts
from ftops.integrations.demo.load import load_causal_lm
from ftops.integrations.transformers.archs import ARCHS
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.transformers.narrow import widened
from tests.engine.requests import held, mixed, small
from tests.families.places import IN_FLOAT32
from tests.families.tiny import causal, tiny

PROMPTED, STEPS = 64, 24
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])


@torch.inference_mode()
def after(model, ids, kv_cache, prompted=None):
    """The decoder of an engine, and logits [1 + steps,V] after a prompt and each of the other tokens of ids[S]."""
    prompted = len(ids) if prompted is None else prompted
    with ftops.Engine(ftops.patch(model, kv_cache=kv_cache), cache_tokens=256) as engine:
        decoder, places = engine._decoder, torch.arange(prompted, device=ids.device)
        starts, table = torch.tensor([0, prompted], dtype=torch.int32, device=ids.device), torch.arange(16, dtype=torch.int32)[None]
        out = [decoder.read(Prompts(ids[:prompted], places, places, places, starts, starts, prompted, prompted, places[-1:]))]
        for place in range(prompted, len(ids)):
            lengths = torch.tensor([place + 1], dtype=torch.int32, device=ids.device)
            out.append(decoder.step(ids[None, place : place + 1], lengths, table.to(ids.device)))
        return decoder, torch.cat(out)


@IN_FLOAT32
@KINDS
@pytest.mark.parametrize("family", [family for family in ARCHS if causal(family)])
def test_every_head_of_a_token_has_all_digits(family, kind, device, dtype):
    """Also beside words that lie as a row of the weights does, of whose value no other can be larger."""
    model = ftops.patch(tiny(family, device, dtype))
    block = next(module for module in model.modules() if isinstance(module, FusedLayer))._ftops.block
    spec, weights = block.spec, block.weights
    k, v = ((rows * weights.norm1.weight) for rows in weights.qkv.weight[spec.heads * spec.head_dim :].chunk(2))
    with torch.no_grad():
        for word, rows in ((5, k), (6, v)):
            model.get_input_embeddings().weight[word] = 1000 * rows[rows.norm(dim=1).argmax()]
    ids = torch.tensor([9, 5, 10, 6, 11, 12], device=device)
    wide, narrow = (after(copy.deepcopy(model), ids, cache)[0]._cache.layers[0] for cache in (None, kind))
    assert narrow.k.dtype is narrow.v.dtype is {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    for kept, exact, scale in zip((narrow.k, narrow.v), (wide.k, wide.v), narrow.scales.values(), strict=True):
        largest, off = exact.abs().amax(-1, keepdim=True), (widened(kept, scale, torch.float32) - exact).abs()
        assert (off <= 1.001 * (largest / 254 if kind == "int8" else exact.abs() / 16 + largest / 448 * 2 ** -10) + 1e-12).all()
        assert kept[0, : len(ids)].float().abs().amax(-1).eq(127 if kind == "int8" else 448).all()


@IN_FLOAT32
@pytest.mark.parametrize(("kind", "allowed"), [("int8", 0.001), ("fp8", 0.004)])
def test_distribution(kind, allowed, device, dtype):
    """The real model on real text, whose prompt reads its own keys and values as they are kept."""
    model, tokenizer = load_causal_lm()[:2]
    with open(copy.__file__) as file:
        ids = tokenizer(file.read(2000), return_tensors="pt").input_ids[0, : PROMPTED + STEPS].to(device)
    exact, made = (after(model.to(device, dtype), ids, cache, PROMPTED)[1].log_softmax(-1) for cache in (None, kind))
    assert 0 < (exact.exp() * (exact - made)).sum(-1).mean() < allowed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@KINDS
def test_answers_are_those_of_a_request_alone(kind, device):
    """Whatever is beside it, shares its pages, and however its prompt is cut. A batch may change the last bit of a sum, and rounding to
    8 bits make up to a sixteenth of a value of that: an answer among many may part."""
    model, requests = ftops.patch(small(device), kv_cache=kind), mixed(40, seed=8)
    with ftops.Engine(model, max_requests=1, page_size=16) as engine:
        alone = [engine.submit(prompt, **options).result(120).tokens for prompt, options in requests]
    with ftops.Engine(model, max_requests=12, cache_tokens=100, page_size=2, chunk=16) as engine:
        with held(engine):
            handles = [engine.submit(prompt, **options) for prompt, options in requests]
        beside = [handle.result(120).tokens for handle in handles]
        stats = engine.stats()
    assert stats.prefix_tokens and stats.preemptions, stats
    assert sum(one == other for one, other in zip(alone, beside, strict=True)) >= 0.9 * len(requests)
