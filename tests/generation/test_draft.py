"""A draft model changes nothing but the number of steps, and that number is as small as its drafts are good."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops.generation import lookup
from ftops.integrations.transformers import decoder
from tests.families.places import IN_FLOAT32
from tests.families.tiny import TINY, prompt, tiny


@pytest.fixture
def steps(monkeypatch):
    """What each row kept in each step of the last call, the token after the prompt apart."""
    counts: list[list[int]] = []
    take = lookup.LookupLoop._take

    def counting(self, reader):
        if not self.lengths.any():
            counts.clear()
        first, before = not self.lengths.any(), self.lengths.clone()
        news = take(self, reader)
        if not first:
            counts.append((self.lengths - before).tolist())
        return news

    monkeypatch.setattr(lookup.LookupLoop, "_take", counting)
    return counts


def perturbed(family, device, dtype, by=0.002):
    """A model that sometimes agrees with tiny(family)."""
    model = tiny(family, device, dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter)
    return ftops.patch(model)


def run(model, padding="left", **options):
    ids, mask = (t.to(model.device) for t in prompt(batch=3, padding=padding))
    return ftops.generate(model, ids, mask, **{"max_new_tokens": 24, "pad_token_id": 1, **options}).tolist()


@IN_FLOAT32
@pytest.mark.parametrize("draft", ["llama", "mistral", "gpt2"])
def test_tokens_are_the_models_own(draft, device, dtype, steps):
    """Whatever the draft model is, another family with other positions included."""
    model, small = ftops.patch(tiny("llama", device, dtype)), perturbed(draft, device, dtype)
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        assert run(model, draft_model=small, **options) == run(model, **options)
    assert ftops.report(model).fallbacks == ftops.report(small).fallbacks == 0


OPTIONS = {
    "filters": {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "rows": {"temperature": torch.tensor([0.0, 0.3, 1.0]), "seed": torch.tensor([5, 6, 7]), "max_new_tokens": torch.tensor([3, 24, 11])},
    "ends": {"eos_token_id": [94, 5, 78]}, "many": {"num_draft_tokens": 15}, "one": {"num_draft_tokens": 1},
    "one_token": {"max_new_tokens": 1}, "two_tokens": {"max_new_tokens": 2}, "unpadded": {"padding": None}, "holes": {"padding": "holes"},
}


@IN_FLOAT32
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, device, dtype, steps):
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in OPTIONS[name].items()}
    model, small = ftops.patch(tiny("llama", device, dtype)), perturbed("llama", device, dtype)
    drafts = options.pop("num_draft_tokens", 4)
    assert run(model, draft_model=small, num_draft_tokens=drafts, **options) == run(model, **options)


@IN_FLOAT32
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 50}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gptj"])
def test_one_that_is_always_right(family, options, device, dtype, steps):
    """The same weights foresee every token, drawn ones too: 23 tokens behind the first in five steps of five."""
    model, small = ftops.patch(tiny(family, device, dtype)), ftops.patch(tiny(family, device, dtype))
    assert run(model, draft_model=small, num_draft_tokens=4, **options) == run(model, **options)
    assert steps == [[5, 5, 5]] * 4 + [[3, 3, 3]]


@IN_FLOAT32
def test_one_that_errs_forgets_its_errors(device, dtype, steps):
    """Each step keeps just what the draft model, asked anew with the whole text, foresees: nothing of a wrong draft stays in its cache."""
    model, small, (ids, _) = ftops.patch(tiny("llama", device, dtype)), perturbed("llama", device, dtype), prompt(batch=1)
    made = ftops.generate(model, ids.to(device), max_new_tokens=24, draft_model=small, num_draft_tokens=4)
    text, expected = made[0].tolist(), []
    while 13 + sum(expected) < len(text):
        said = text[: 13 + sum(expected)]
        rest = text[len(said):]
        drafts = ftops.generate(small, torch.tensor([said], device=device), max_new_tokens=4)[0, len(said):].tolist()
        right = next((i for i, pair in enumerate(zip(drafts, rest, strict=False)) if pair[0] != pair[1]), min(4, len(rest)))
        expected.append(min(right + 1, len(rest)))
    assert [one for one, in steps] == expected
    assert len(set(expected)) > 2


@pytest.mark.gpu
def test_drafts_and_check_are_one_graph():
    model, small = ftops.patch(tiny("llama", "cuda")), ftops.patch(tiny("mistral", "cuda"))
    for _ in range(2):
        run(model, draft_model=small)
    (_, session), = decoder._SESSIONS[model]
    assert len(session._captured) == 1


def test_one_that_was_changed_is_not_taken_from_memory(steps):
    """Nor is another one of the same kind."""
    model, small = ftops.patch(tiny("llama")), ftops.patch(tiny("llama"))
    expected = run(model)
    assert run(model, draft_model=small) == expected
    assert run(model, draft_model=perturbed("llama", "cpu", torch.float32, 0.3)) == expected
    assert len(steps) > 10
    small.load_state_dict({name: value.clone() for name, value in small.state_dict().items()}, assign=True)
    assert run(model, draft_model=small) == expected
    assert len(steps) == 4


def test_wrong_use_is_refused(monkeypatch):
    model, small = ftops.patch(tiny("llama")), ftops.patch(tiny("mistral"))
    with pytest.raises(ValueError, match="draft_model, LlamaForCausalLM, cannot be served: it has no ftops block"):
        run(model, draft_model=tiny("llama"))
    with pytest.raises(ValueError, match=r"num_draft_tokens is 16; allowed: 1 to 15, without penalties"):
        run(model, draft_model=small, num_draft_tokens=16)
    with pytest.raises(ValueError, match=r"num_draft_tokens is 5; allowed: 1 to 15, without penalties"):
        run(model, draft_model=small, repetition_penalty=1.2)
    with pytest.raises(ValueError, match="num_draft_tokens is given and draft_model is None"):
        run(model, num_draft_tokens=4)
    with pytest.raises(ValueError, match="leave one out"):
        run(model, draft_model=small, prompt_lookup_num_tokens=4)
    with pytest.raises(TypeError, match="draft_model is no option"):
        ftops.stream(model, prompt()[0], draft_model=small)
    short = tiny("mistral")
    short.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="exceed the 20 positions of this MistralForCausalLM"):
        run(model, draft_model=ftops.patch(short))
    other = TINY["llama"]()
    other.resize_token_embeddings(200)
    with pytest.raises(ValueError, match="draft_model has a vocabulary of 200 tokens and the model one of 120"):
        run(model, draft_model=ftops.patch(other.eval()))
    monkeypatch.setattr(type(small), "device", torch.device("meta"))
    with pytest.raises(ValueError, match="draft_model is on meta and the model on cpu; move it"):
        run(model, draft_model=small)
