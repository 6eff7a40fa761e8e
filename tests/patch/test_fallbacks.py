"""What the fused path cannot give, the original layer gives, exactly, and the report counts it."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import causal, prompt, tiny
from tests.patch.checks import assert_close, fallen, logits

REGISTRY = [family for family in ARCHS if ARCHS[family].uses_registry]


def pair(family: str, attention: str = "eager") -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny(family, attention=attention), ftops.patch(tiny(family, attention=attention))


def per_layer(model: PreTrainedModel) -> int:
    return model.config.num_hidden_layers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", ARCHS)
def test_gradients(family, padding, attention):
    """Loss and gradients are bit for bit those of the unpatched model."""
    model, patched = pair(family, attention if ARCHS[family].uses_registry else "eager")
    ids, mask = prompt(padding=padding)
    losses = [m(ids, attention_mask=mask, labels=ids).loss for m in (model, patched)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, theirs), ours in zip(model.named_parameters(), patched.parameters(), strict=True):
        assert torch.equal(theirs.grad, ours.grad), name
    assert fallen(patched)["gradients"] >= per_layer(model)


@pytest.mark.parametrize("family", ARCHS)
def test_gradients_of_the_input_alone(family):
    """Weights frozen, as for saliency maps: the block must not cut the graph."""
    gradients = []
    for model in pair(family):
        embedded = model.get_input_embeddings()(prompt()[0]).detach().requires_grad_()
        model.requires_grad_(False)
        model(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("family", ARCHS)
def test_frozen_weights_need_no_gradient(family):
    """Grad mode alone is no reason to fall back."""
    patched = ftops.patch(tiny(family)).requires_grad_(False)
    patched(prompt()[0])
    assert fallen(patched) == {}


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", ARCHS)
def test_attention_weights(family, padding):
    model, patched = pair(family)
    ids, mask = prompt(padding=padding)
    with torch.inference_mode():
        theirs, ours = (m(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True) for m in (model, patched))
    assert len(ours.attentions) == per_layer(model)
    for one, other in zip((*theirs.attentions, *theirs.hidden_states[:-1]), (*ours.attentions, *ours.hidden_states[:-1]), strict=True):
        assert torch.equal(one, other)
    assert fallen(patched) == {"attention weights": per_layer(model)}
    logits(patched)
    assert fallen(patched) == {"attention weights": per_layer(model)}


@pytest.mark.parametrize("family", [family for family in ARCHS if causal(family)])
def test_attention_weights_of_generated_tokens(family):
    model, patched = pair(family)
    ids, mask = prompt(padding="left")
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    theirs, ours = (m.generate(ids, **options) for m in (model, patched))
    for one, other in zip(theirs.attentions, ours.attentions, strict=True):
        for weights, expected in zip(other, one, strict=True):
            assert torch.equal(weights, expected)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_dropout_in_training_mode(family):
    """The same random numbers drop the same elements, without gradients too (as for Monte Carlo dropout)."""
    outputs = []
    for model in pair(family):
        model.train()
        torch.manual_seed(7)
        with torch.no_grad():
            outputs.append(model(prompt()[0]).logits)
    assert torch.equal(*outputs)
    assert fallen(model) == {"training with dropout": per_layer(model)}


@pytest.mark.parametrize("family", ARCHS)
def test_training_mode_without_dropout(family):
    model, patched = pair(family)
    for m in (model, patched):
        m.train()
        for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if hasattr(m.config, name):
                setattr(m.config, name, 0.0)
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    ftops.patch(patched)
    with torch.no_grad():
        assert_close(patched(prompt()[0]).logits, model(prompt()[0]).logits)


@pytest.mark.parametrize("family", ARCHS)
def test_autocast(family):
    model, patched = pair(family)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (m(prompt()[0]).logits for m in (model, patched))
    assert torch.equal(theirs, ours)
    assert fallen(patched)["autocast"] >= per_layer(model)


@pytest.mark.parametrize("family", REGISTRY)
def test_arguments_that_the_block_has_no_word_for(family):
    """What else is passed down to the attention function may mean something to the original."""
    model, patched = pair(family)
    with torch.inference_mode():
        theirs, ours = (m(prompt()[0], block_table=torch.ones(1)).logits for m in (model, patched))
    assert_close(ours, theirs)
    assert fallen(patched) == {"argument block_table": per_layer(model)}


class Recording(DynamicCache):
    """Somebody's own cache: not a transformers layer class inside."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.updates += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("family", [family for family in ARCHS if causal(family)])
def test_a_cache_of_ones_own(family):
    """Keys and values go through the cache's update, so a subclass that counts or changes them does so."""
    ids = prompt(length=9)[0]
    outputs, caches = [], []
    for model in pair(family):
        cache = Recording()
        with torch.inference_mode():
            model(ids[:, :8], past_key_values=cache)
            outputs.append(model(ids[:, 8:], past_key_values=cache).logits)
        caches.append(cache)
    assert_close(outputs[1], outputs[0])
    assert caches[0].updates == caches[1].updates == 2 * per_layer(model)
