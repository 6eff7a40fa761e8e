"""`model.generate` of a patched model gives the tokens that Hugging Face's own gives."""
from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.places import IN_FLOAT32, in_turn
from tests.families.tiny import causal, prompt, tiny

DECODERS = [family for family in ARCHS if causal(family)]
WAYS = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "without_cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams_static": {"num_beams": 2, "cache_implementation": "static"},
    "chunked_prefill": {"prefill_chunk_size": 5},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
}


def generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **way: object) -> torch.Tensor:
    torch.manual_seed(5)
    options = {"max_new_tokens": 24, "do_sample": False, "disable_compile": True, **way}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=mask, **options)


@in_turn(2, way=WAYS, family=DECODERS)
def test_same_tokens(family, way, device, dtype):
    """24 tokens behind a prompt of 12, past the window of the families that have one; the first row is padded on the left."""
    if way == "sampling" and device != "cpu":
        pytest.skip("on a GPU ops.sample draws, by another generator: tests/generation")
    single = way == "prompt_lookup"
    ids, mask = (t.to(device) for t in prompt(batch=1 if single else 3, padding=None if single else "left"))
    model = tiny(family, device, dtype)
    theirs = generate(model, ids, mask, **WAYS[way])
    ours = generate(ftops.patch(model), ids, mask, **WAYS[way])
    assert theirs.tolist() == ours.tolist()
    assert ftops.report(model).fallbacks == 0


@IN_FLOAT32
@pytest.mark.parametrize("family", DECODERS)
def test_from_embeddings(family, device, dtype):
    ids, mask = (t.to(device) for t in prompt(padding="left"))
    model = tiny(family, device, dtype)
    with torch.inference_mode():
        embeddings = model.get_input_embeddings()(ids)
        theirs = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=10, do_sample=False)
        ours = ftops.patch(model).generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert theirs.tolist() == ours.tolist()


@IN_FLOAT32
def test_assisted_by_a_patched_model(device, dtype):
    """The assistant proposes several tokens, which are checked at once and taken back from both caches when they are wrong."""
    ids, mask = (t.to(device) for t in prompt(batch=1))
    model, assistant = tiny("llama", device, dtype), ftops.patch(tiny("qwen3", device, dtype))
    theirs = generate(model, ids, mask)
    ours = generate(ftops.patch(model), ids, mask, assistant_model=assistant)
    assert theirs.tolist() == ours.tolist()
