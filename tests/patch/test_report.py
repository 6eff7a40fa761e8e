"""The report and warmup: what a user reads and what warmup refuses and runs."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import ftops
from ftops.integrations.transformers.archs import ARCHS
from ftops.integrations.transformers.patch import plan
from tests.families.tiny import prompt, tiny
from tests.patch.checks import logits, makeup


@pytest.mark.parametrize("family", ARCHS)
def test_report_of_a_patched_model(family):
    """One row a layer and a norm outside, in the model's order, and a table that names the family and the layers in one line."""
    model = ftops.patch(tiny(family))
    report = ftops.report(model)
    assert report.family == family and report.fallbacks == 0
    layers = [row for row in report if row.kind == ARCHS[family].layer]
    assert [row.swapped_to for row in layers] == [f"ftops block ({family})"] * model.config.num_hidden_layers
    order = [path for path, _ in model.named_modules()]
    assert [order.index(row.module) for row in report] == sorted(order.index(row.module) for row in report)
    text = str(report)
    assert text.startswith(f"{type(model).__name__}: {family}")
    assert f"{layers[0].module} .. {layers[-1].module} ({len(layers)})" in text.replace("\n", "")


def test_report_shows_fallbacks_and_reasons():
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = nn.ReLU6()
    ftops.patch(model)
    model(prompt()[0], labels=prompt()[0])
    kept, fused = (row for row in ftops.report(model) if row.module in ("model.layers.1", "model.layers.2"))
    assert (kept.swapped_to, kept.reason, fused.fallbacks) == (None, "activation ReLU6 is not served", (("gradients", 1),))
    text = str(ftops.report(model))
    assert "kept" in text and "gradients: 1" in text


def test_a_layer_that_is_kept_beside_fused_ones():
    """Its attention is transformers' own again, with the whole mask: padding and window must hold in it too."""
    for family in ("llama", "mistral", "bert"):
        models = [tiny(family, attention="sdpa") for _ in range(2)]
        for model in models:
            layers = [module for module in model.modules() if type(module).__name__ == ARCHS[family].layer]
            owner, _, name = ARCHS[family].activation.rpartition(".")
            setattr(layers[1].get_submodule(owner), name, nn.ReLU6())
        ids, mask = prompt(length=20, padding="left")
        theirs = logits(models[0], ids, attention_mask=mask)[mask.bool()]
        ours = logits(ftops.patch(models[1]), ids, attention_mask=mask)[mask.bool()]
        assert torch.allclose(ours, theirs, atol=1e-3)
        report = ftops.report(models[1])
        assert [row.swapped_to is None for row in report if row.kind == ARCHS[family].layer] == [False, True, False]


@pytest.mark.parametrize("family", ARCHS)
def test_plan_is_printed_before_anything_is_done(family):
    model = tiny(family)
    before = makeup(model)
    assert f"ftops block ({family})" in str(plan(model))
    assert makeup(model) == before


def test_report_of_an_unpatched_model():
    assert "nothing swapped" in str(ftops.report(tiny("llama")))


@pytest.mark.parametrize("family", ARCHS)
def test_warmup_runs_and_leaves_no_trace(family, capsys):
    model = ftops.patch(tiny(family))
    model.train()
    before, text = makeup(model), str(ftops.report(model))
    ftops.warmup(model, batch_sizes=(1, 2), max_length=20)
    assert makeup(model) == before and model.training
    assert str(ftops.report(model)) == text
    assert capsys.readouterr() == ("", "")  # its bar is for terminals


@pytest.mark.parametrize(("make", "options", "error", "message"), [
    (lambda: nn.Linear(2, 2), {}, TypeError, "model is a Linear; allowed: a transformers model"),
    (lambda: tiny("llama"), {}, ValueError, r"no swapped module; call ftops.patch\(model\) first"),
    (lambda: ftops.patch(tiny("llama")), {"batch_sizes": (0,)}, ValueError, r"batch_sizes is \(0,\); allowed: one or more positive"),
    (lambda: ftops.patch(tiny("llama")), {"batch_sizes": ()}, ValueError, r"batch_sizes is \(\); allowed"),
    (lambda: ftops.patch(tiny("llama")), {"max_length": 129}, ValueError, "max_length is 129; allowed: 2 to 128"),
    (lambda: ftops.patch(T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))), {},
     ValueError, "does not take token ids alone; run it once on inputs of your own"),
])
def test_warmup_refuses(make, options, error, message):
    with pytest.raises(error, match=f"warmup: .*{message}"):
        ftops.warmup(make(), **options)
