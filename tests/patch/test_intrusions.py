"""What people put inside of layers still has its effect when the layers are fused: hooks, adapters, other forwards, other parts."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import tiny
from tests.patch.checks import assert_close, fallen, logits


def inner(model: PreTrainedModel) -> nn.Module:
    """The linear at the end of the first layer's MLP."""
    return next(module for path, module in model.named_modules() if path.endswith(("0.mlp.down_proj", "0.mlp.c_proj", "0.mlp.fc_out",
                                                                                   "0.output.dense")))


def forward_hook(model: PreTrainedModel) -> None:
    inner(model).register_forward_hook(lambda module, args, output: output * 1.5)


def forward_pre_hook(model: PreTrainedModel) -> None:
    inner(model).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def own_forward(model: PreTrainedModel) -> None:
    module = inner(model)
    original = module.forward
    module.forward = lambda x: original(x) * 1.5


class LoRA(nn.Module):
    """As peft wraps a linear: base layer, and two small matrices beside it."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        inputs, outputs = base.weight.shape if hasattr(base, "nf") else base.weight.shape[::-1]
        drawn = torch.Generator().manual_seed(0)
        self.a, self.b = (nn.Parameter(0.2 * torch.randn(shape, generator=drawn)) for shape in ((inputs, rank), (rank, outputs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.a @ self.b


def lora(model: PreTrainedModel) -> None:
    module = inner(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is module:
                setattr(parent, name, LoRA(module))


def new_parameter(model: PreTrainedModel) -> None:
    inner(model).weight = nn.Parameter(inner(model).weight * 1.5)


def parametrization(model: PreTrainedModel) -> None:
    nn.utils.parametrizations.weight_norm(inner(model))
    with torch.no_grad():
        inner(model).parametrizations.weight.original0.mul_(1.5)


INTRUSIONS = {f.__name__: f for f in (forward_hook, forward_pre_hook, own_forward, lora, new_parameter, parametrization)}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("intrusion", INTRUSIONS)
@pytest.mark.parametrize("family", ARCHS)
def test_intrusions(family, intrusion, order):
    """Whatever is put inside a layer, before or after it is patched, still has its effect, and the report names the layer."""
    intrude: Callable[[PreTrainedModel], None] = INTRUSIONS[intrusion]
    model, patched = tiny(family), tiny(family)
    for m in (model, patched):
        if m is patched and order == "after":
            ftops.patch(m)
        intrude(m)
        if m is patched and order == "before":
            ftops.patch(m)
    theirs = logits(model)
    assert not torch.allclose(theirs, logits(tiny(family)), atol=1e-2), "the intrusion has no effect"
    assert_close(logits(patched), theirs)
    rows = [row for row in ftops.report(patched) if row.kind == ARCHS[family].layer]
    expected_plain = intrusion == "new_parameter" and order == "before"
    assert (rows[0].swapped_to is None or bool(rows[0].fallbacks)) is not expected_plain
    assert all(row.swapped_to and not row.fallbacks for row in rows[1:])


@pytest.mark.parametrize("family", ARCHS)
def test_patch_again_takes_the_new_parts(family):
    patched = ftops.patch(tiny(family))
    new_parameter(patched)
    theirs = logits(patched)
    assert sum(fallen(patched).values()) == 1
    ftops.patch(patched)
    assert_close(logits(patched), theirs)
    assert sum(fallen(patched).values()) == 1


def test_lora_put_in_and_taken_out():
    """An adapter is loaded, patched over, unloaded, patched over: the layer is a block again."""
    model = ftops.patch(tiny("llama"))
    plain, base = logits(model), inner(model)
    lora(model)
    ftops.patch(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    assert fallen(model) == {f"mlp.down_proj is a LoRA of {__name__}": 1}
    model.model.layers[0].mlp.down_proj = base
    ftops.patch(model)
    assert torch.equal(logits(model), plain)
    assert sum(fallen(model).values()) == 1


@pytest.mark.parametrize("family", ARCHS)
def test_hooks_see_what_they_would_have_seen(family):
    """On the layer itself hooks cost nothing; inside, the layer falls back while one is there, and no longer."""
    model, patched = tiny(family), ftops.patch(tiny(family))
    seen: list[list[torch.Tensor]] = []
    for m in (model, patched):
        layers = [module for module in m.modules() if type(module).__name__ == ARCHS[family].layer]
        calls: list[torch.Tensor] = []
        def keep(module, args, output, calls=calls):
            calls.append(output[0] if isinstance(output, tuple) else output)
        handles = [layers[1].register_forward_hook(keep), inner(m).register_forward_hook(keep)]
        logits(m)
        handles[1].remove()
        logits(m)
        seen.append(calls)
    assert len(seen[0]) == len(seen[1]) == 3
    for theirs, ours in zip(*seen, strict=True):
        assert_close(ours, theirs)
    assert fallen(patched) == {"hooks inside": 1}


def test_hooks_of_every_module():
    """Global hooks, as profilers and FLOP counters set them, are called for the modules inside."""
    names: list[list[str]] = []
    for model in (tiny("llama"), ftops.patch(tiny("llama"))):
        called: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, called=called: called.append(type(module).__name__))
        logits(model)
        handle.remove()
        names.append(called)
    assert names[0] == names[1]
    logits(model)
    assert fallen(model) == {"hooks inside": model.config.num_hidden_layers}


def test_a_class_that_was_patched_by_others(monkeypatch):
    """As other kernel libraries do it: the class's forward is another function, or the norm another class."""
    from transformers.models.llama import modeling_llama
    plain = logits(tiny("llama"))
    with monkeypatch.context() as patching:
        original = modeling_llama.LlamaMLP.forward
        patching.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * original(self, x))
        model = tiny("llama")
        theirs = logits(model)
        assert not torch.allclose(theirs, plain, atol=1e-2)
        ours = logits(ftops.patch(model))
        assert_close(ours, theirs)
        assert {row.reason for row in ftops.report(model) if row.kind == "LlamaDecoderLayer"} == {"the forward of LlamaMLP was replaced"}


@pytest.mark.parametrize(("path", "part", "reason"), [
    ("mlp.act_fn", nn.ReLU6(), "activation ReLU6 is not served"),
    ("mlp", nn.Identity(), "it has no mlp.gate_proj"),
    ("input_layernorm", nn.RMSNorm(256), "input_layernorm is a RMSNorm, not the family's own norm"),
    ("self_attn.q_proj", nn.Identity(), "self_attn.q_proj is a Identity, not a plain linear"),
])
def test_parts_of_another_kind(path, part, reason):
    models = [tiny("llama"), tiny("llama")]
    for model in models:
        owner, _, name = f"model.layers.0.{path}".rpartition(".")
        setattr(model.get_submodule(owner), name, part)
    patched = ftops.patch(models[1])
    if path != "self_attn.q_proj":
        assert_close(logits(patched), logits(models[0]))
    assert next(row for row in ftops.report(patched) if row.kind == "LlamaDecoderLayer").reason == reason
