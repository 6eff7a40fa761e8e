"""Models that no family describes: norms and attention are swapped, the report says so, and the values stay."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers.models.auto import modeling_auto

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import prompt
from tests.patch.checks import assert_same_values, fallen, makeup, values
from tests.patch.zoo import outputs, small

CAUSAL, BASE, SEQ2SEQ = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING,
                         modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
ATTENTION = "ops.attention, through transformers' registry"
# Norms and attentions that are swapped, of two layers. Falcon, BLOOM, CodeGen and DeBERTa call no registry, and T5 only lately does.
KNOWN = {
    "opt": (CAUSAL, {"ops.layer_norm": 5, ATTENTION: 2}),
    "gpt_neox": (CAUSAL, {"ops.layer_norm": 5, ATTENTION: 2}),
    "phi": (CAUSAL, {"ops.layer_norm": 3, ATTENTION: 2}),
    "phi3": (CAUSAL, {"ops.rms_norm": 5, ATTENTION: 2}),
    "gemma": (CAUSAL, {"ops.rms_norm": 5, ATTENTION: 2}),
    "gemma2": (CAUSAL, {"ops.rms_norm": 9, ATTENTION: 2}),
    "olmo2": (CAUSAL, {"ops.rms_norm": 9, ATTENTION: 2}),
    "mixtral": (CAUSAL, {"ops.rms_norm": 5, ATTENTION: 2}),
    "starcoder2": (CAUSAL, {"ops.layer_norm": 5, ATTENTION: 2}),
    "stablelm": (CAUSAL, {"ops.layer_norm": 5, ATTENTION: 2}),
    "gpt_oss": (CAUSAL, {"ops.rms_norm": 5, ATTENTION: 2}),
    "cohere": (CAUSAL, {ATTENTION: 2}),
    "falcon": (CAUSAL, {"ops.layer_norm": 3}),
    "bloom": (CAUSAL, {"ops.layer_norm": 6}),
    "codegen": (CAUSAL, {"ops.layer_norm": 3}),
    "roberta": (BASE, {"ops.layer_norm": 5, ATTENTION: 2}),
    "distilbert": (BASE, {"ops.layer_norm": 5, ATTENTION: 2}),
    "electra": (BASE, {"ops.layer_norm": 5, ATTENTION: 2}),
    "albert": (BASE, {"ops.layer_norm": 3, ATTENTION: 1}),
    "deberta-v2": (BASE, {"ops.layer_norm": 5}),
    "mamba": (CAUSAL, {"ops.rms_norm": 3}),
    "bart": (SEQ2SEQ, {"ops.layer_norm": 12, ATTENTION: 6}),
    "t5": (SEQ2SEQ, {"ops.rms_norm": 12}),
}


def counts(model: nn.Module) -> dict[str, int]:
    """How many modules were swapped to what."""
    found: dict[str, int] = {}
    for row in ftops.report(model).swapped:
        found[row.swapped_to] = found.get(row.swapped_to, 0) + 1
    return found


def check(model: nn.Module) -> None:
    """Patched it gives the same, unpatched it is the same."""
    before, weights, theirs = makeup(model), values(model), outputs(model)
    ours = outputs(ftops.patch(model))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4 * max(1.0, other.abs().max().item()), equal_nan=True)
    assert_same_values(model, weights)
    ftops.unpatch(model)
    assert makeup(model) == before
    for mine, other in zip(outputs(model), theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", KNOWN)
def test_leaves_are_swapped(kind):
    mapping, expected = KNOWN[kind]
    model = small(kind, mapping)
    if model is None:
        pytest.skip("this transformers makes no small one")
    check(model)
    ftops.patch(model)
    assert {name: count for name, count in counts(model).items() if (kind, name) != ("t5", ATTENTION)} == expected
    report = ftops.report(model)
    assert report.family is None
    assert "no description, leaves swapped" in str(report)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "phi", "gemma2", "gpt_oss", "falcon", "bloom", "mixtral"])
def test_generate(kind):
    model = small(kind, CAUSAL)
    ids, mask = prompt(length=10, padding="left")
    for way in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "disable_compile": True, **way}
        theirs = model.generate(ids, **options)
        assert ftops.patch(model).generate(ids, **options).tolist() == theirs.tolist()
        ftops.unpatch(model)


DECODERS = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
ENCODER_DECODERS = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "kinds", "least"), [
    pytest.param(CAUSAL, DECODERS, 80, id="causal"), pytest.param(SEQ2SEQ, ENCODER_DECODERS, 10, id="seq2seq"),
    pytest.param(BASE, [kind for kind in modeling_auto.MODEL_MAPPING_NAMES if kind not in (*DECODERS, *ENCODER_DECODERS)], 20, id="base")])
def test_no_model_breaks(mapping, kinds, least):
    """Every architecture that transformers can make from the sizes of the zoo and run on token ids; bare where it has no head of these."""
    tried, broken = 0, {}
    for kind in kinds:
        model = small(kind, mapping)
        if model is None or kind in ARCHS:
            continue
        tried += 1
        try:
            check(model)
        except Exception as error:  # all of them are to be named, not the first
            broken[kind] = error
    assert broken == {}
    assert tried >= least


def test_a_model_without_tokens():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = model.eval()(pixels).last_hidden_state
        ours = ftops.patch(model)(pixels).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert counts(model) == {"ops.layer_norm": 5, ATTENTION: 2}


def test_a_model_that_is_not_transformers():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2, norm=nn.LayerNorm(32)).eval()
    x = torch.randn(2, 5, 32)
    before = makeup(model)
    with torch.inference_mode():
        theirs = model(x)
        assert torch.allclose(ftops.patch(model)(x), theirs, atol=1e-5)
    assert counts(model) == {"ops.layer_norm": 5}
    assert makeup(ftops.unpatch(model)) == before


def test_nothing_to_swap():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = makeup(model)
    ftops.patch(model)
    assert makeup(model) == before
    assert not ftops.report(model).swapped
    assert "nothing swapped" in str(ftops.report(model))


class ScaledRMSNorm(nn.Module):
    """Named like one, and not one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)


class CenteredLayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("norm", [
    ScaledRMSNorm(32), CenteredLayerNorm(32), nn.LayerNorm(32, elementwise_affine=False), nn.LayerNorm(32).double()])
def test_norms_that_are_something_else(norm):
    """They are kept, by what they compute and not by what they are called."""
    model = nn.Sequential(norm)
    x = torch.randn(3, 32, dtype=next((p.dtype for p in norm.parameters()), torch.float32))
    theirs = model(x)
    assert torch.equal(ftops.patch(model)(x), theirs)
    assert not ftops.report(model).swapped


def test_fallbacks_of_leaves_are_counted():
    model = ftops.patch(small("opt", CAUSAL))
    ids = prompt()[0]
    model(ids, labels=ids).loss.backward()
    assert fallen(model) == {"gradients": 5 + 2}
    with torch.inference_mode():
        theirs = model(ids, output_attentions=True).attentions
        ftops.unpatch(model)
        model.config._attn_implementation = "eager"
        for ours, expected in zip(theirs, model(ids, output_attentions=True).attentions, strict=True):
            assert torch.allclose(ours, expected, atol=1e-6)
