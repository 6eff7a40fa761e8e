"""Guessing tokens from the text changes nothing but the number of steps."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops.generation import lookup
from ftops.integrations.demo.load import load_causal_lm
from ftops.integrations.transformers.archs import ARCHS
from tests.families.places import IN_FLOAT32
from tests.families.tiny import causal, prompt, tiny

DECODERS = [family for family in ARCHS if causal(family)]


@pytest.fixture
def steps(monkeypatch):
    """The decode steps of each call."""
    counts: list[int] = []
    take = lookup.LookupLoop._take

    def counting(self, reader):
        if not self.lengths.any():
            counts.append(0)
        counts[-1] += 1
        return take(self, reader)

    monkeypatch.setattr(lookup.LookupLoop, "_take", counting)
    return counts


def run(model, padding="left", **options):
    ids, mask = (t.to(model.device) for t in prompt(batch=3, padding=padding))
    return ftops.generate(model, ids, mask, **{"max_new_tokens": 24, "pad_token_id": 1, **options}).tolist()


@IN_FLOAT32
@pytest.mark.parametrize("family", DECODERS)
def test_family(family, device, dtype, steps):
    model = ftops.patch(tiny(family, device, dtype))
    plain = run(model)
    assert run(model, prompt_lookup_num_tokens=4) == plain
    assert len(steps) == 1 and steps[0] <= 24
    assert ftops.report(model).fallbacks == 0


OPTIONS = {
    "sampled": {"temperature": 0.8, "seed": 3, "top_k": 20},
    "everything": {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "rows": {"temperature": torch.tensor([0.0, 0.3, 1.0]), "seed": torch.tensor([5, 6, 7]), "max_new_tokens": torch.tensor([3, 24, 11])},
    "ends": {"eos_token_id": [94, 5, 78]}, "many": {"prompt_lookup_num_tokens": 15}, "one": {"prompt_lookup_num_tokens": 1},
    "one_token": {"max_new_tokens": 1}, "two_tokens": {"max_new_tokens": 2}, "unpadded": {"padding": None},
}


@IN_FLOAT32
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, device, dtype, steps):
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in OPTIONS[name].items()}
    model, drafts = ftops.patch(tiny("llama", device, dtype)), options.pop("prompt_lookup_num_tokens", 4)
    assert run(model, **options, prompt_lookup_num_tokens=drafts) == run(model, **options)
    assert len(steps) == 1


@IN_FLOAT32
def test_an_answer_that_repeats_takes_fewer_steps(device, dtype, steps):
    """At next to no temperature a penalty-free small model soon says the same again, and a third of the steps are enough."""
    model, tokenizer = load_causal_lm(device=device, dtype="float32")
    ids = tokenizer("a = 1\na = 1\na = 1\na = 1\na = 1\na =", return_tensors="pt").input_ids.to(device)
    ftops.patch(model)
    plain = ftops.generate(model, ids, max_new_tokens=60)
    assert torch.equal(ftops.generate(model, ids, max_new_tokens=60, prompt_lookup_num_tokens=8), plain)
    assert steps[0] <= 20


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.2}, {"stop": [[3]]}, {"bad_words": [[3]]}, {"return_logprobs": True},
    {"processors": [lambda ids, logits: logits]}, {"prompt_lookup_num_tokens": 16}], ids=lambda options: next(iter(options)))
def test_what_does_not_go_together_is_refused(options):
    model = ftops.patch(tiny("llama"))
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens is (4|16); allowed: 1 to 15, without penalties"):
        run(model, **{"prompt_lookup_num_tokens": 4, **options})
    with pytest.raises(ValueError, match="leave it out where tokens are streamed"):
        ftops.stream(model, prompt()[0], prompt_lookup_num_tokens=4, max_new_tokens=3)
