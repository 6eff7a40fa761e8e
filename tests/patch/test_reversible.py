"""`unpatch` undoes `patch`, patching twice is harmless, and a call that cannot be served changes nothing."""
from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ftops
from ftops.integrations.transformers import layer
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import LLAMA, causal, prompt, tiny
from tests.patch.checks import assert_same_values, logits, makeup, values


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ARCHS)
def test_unpatch_gives_back_the_same_model(family, attention):
    model = tiny(family, attention=attention)
    before, weights, theirs = makeup(model), values(model), logits(model)
    ours = logits(ftops.patch(model))
    assert ftops.report(model).swapped and not torch.equal(torch.zeros_like(ours), ours)
    assert ftops.unpatch(model) is model
    assert makeup(model) == before
    assert_same_values(model, weights)
    assert torch.equal(logits(model), theirs)
    assert not ftops.report(model).swapped


@pytest.mark.parametrize("family", [family for family in ARCHS if causal(family)])
def test_generate_after_unpatch(family):
    ids, mask = prompt(padding="left")
    model = tiny(family)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    theirs = model.generate(ids, **options)
    ftops.patch(model).generate(ids, **options)
    back = ftops.unpatch(model).generate(ids, **options)
    assert torch.equal(torch.stack(theirs.scores), torch.stack(back.scores))


@pytest.mark.parametrize("family", ARCHS)
def test_twice_is_once(family):
    model = ftops.patch(tiny(family))
    once, ours, report = makeup(model), logits(model), str(ftops.report(model))
    assert ftops.patch(model) is model
    assert makeup(model) == once
    assert torch.equal(logits(model), ours)
    assert str(ftops.report(model)) == report


def test_again_after_unpatch():
    model = tiny("llama")
    before, ours = makeup(model), logits(ftops.patch(model))
    for _ in range(3):
        assert torch.equal(logits(ftops.patch(ftops.unpatch(model))), ours)
    assert makeup(ftops.unpatch(model)) == before


def test_unpatch_of_an_unpatched_model():
    model = tiny("llama")
    before = makeup(model)
    ftops.unpatch(model)
    assert makeup(model) == before


def test_another_model_of_the_same_config_stays_as_it_is():
    config = LlamaConfig(**LLAMA, head_dim=128)
    patched, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    before, theirs = makeup(other), logits(other)
    logits(ftops.patch(patched))
    assert makeup(other) == before
    assert torch.equal(logits(other), theirs)


def test_part_of_a_model():
    """The layers of the inner model are fused, and the whole still works, patched and unpatched."""
    model = tiny("llama")
    before, theirs = makeup(model), logits(model)
    ftops.patch(model.model)
    assert torch.allclose(logits(model), theirs, atol=1e-4)
    assert len(ftops.report(model.model).swapped) == model.config.num_hidden_layers + 1
    assert makeup(ftops.unpatch(model)) == before
    assert torch.equal(logits(model), theirs)


def on_meta() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA))


def partly_on_meta() -> LlamaForCausalLM:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    return model


WRONG = {
    "quant": (lambda: tiny("llama"), {"quant": "int3"}, ValueError, "format is 'int3'; allowed: int4"),
    "kv_cache": (lambda: tiny("llama"), {"kv_cache": "int3"}, ValueError, "kv_cache is 'int3'; allowed: "),
    "tp": (lambda: tiny("llama"), {"tp": -1}, ValueError, "tp is -1; allowed: "),
    "pp": (lambda: tiny("llama"), {"pp": "x"}, ValueError, "pp is 'x'; allowed: "),
    "meta": (on_meta, {}, ValueError, "model.embed_tokens.weight is on the meta device and has no values; load the weights first"),
    "partly_meta": (partly_on_meta, {}, ValueError, "model.layers.1.mlp.up_proj.weight is on the meta device"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_changes_nothing(wrong):
    make, options, error, message = WRONG[wrong]
    model = make()
    before = makeup(model)
    with pytest.raises(error, match=f"(patch|quantize): .*{message}"):
        ftops.patch(model, **options)
    assert makeup(model) == before


@pytest.mark.parametrize("model", [None, "gpt2", torch.ones(2), LlamaForCausalLM])
def test_a_model_that_is_none(model):
    for call in (ftops.patch, ftops.unpatch, ftops.report):
        with pytest.raises(TypeError, match=rf"{call.__name__}: model is a \w+; pass a torch.nn.Module"):
            call(model)


def test_no_memory_half_way(monkeypatch):
    """The third layer cannot be fused: the first two are put back, and the error is the user's to see."""
    model = tiny("gpt2")
    before, weights, theirs = makeup(model), values(model), logits(model)
    calls = []

    def fail_on_the_third(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return assemble(*args)

    assemble = layer.assemble
    monkeypatch.setattr(layer, "assemble", fail_on_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        ftops.patch(model)
    assert makeup(model) == before
    assert_same_values(model, weights)
    assert torch.equal(logits(model), theirs)
