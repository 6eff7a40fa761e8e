"""accelerate's hooks around and under patched layers: weights that come and go, devices, hooks of one's own."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import causal, prompt, tiny
from tests.patch.checks import assert_close, fallen, logits

DECODERS = [family for family in ARCHS if causal(family)]


def layer_paths(model: PreTrainedModel, family: str) -> list[str]:
    return [path for path, module in model.named_modules() if type(module).__name__ == ARCHS[family].layer]


def classes(model: PreTrainedModel) -> dict[str, tuple[type, type | None]]:
    return {path: (type(module), type(module.__dict__.get("_hf_hook"))) for path, module in model.named_modules()}


def partly_on_disk(model: PreTrainedModel, family: str, folder: Path) -> tuple[PreTrainedModel, str]:
    """The model with its second layer's weights on disk, read whenever it runs, and that layer's path."""
    layers = layer_paths(model, family)
    places = {path: "cpu" for path in layers}
    for path, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if not path.startswith(tuple(f"{layer}." for layer in layers)):
            places[path.rpartition(".")[0]] = "cpu"
    places[layers[1]] = "disk"
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True), layers[1]


@pytest.mark.parametrize("family", ARCHS)
def test_a_layer_on_disk(family, tmp_path):
    """It is kept, the others are fused, and the values stay."""
    model = tiny(family)
    theirs = logits(model)
    model, path = partly_on_disk(model, family, tmp_path)
    before = classes(model)
    ours = logits(ftops.patch(model))
    assert_close(ours, theirs)
    rows = {row.module: row for row in ftops.report(model)}
    assert (rows[path].swapped_to, rows[path].reason) == (None, "accelerate offloads it")
    others = [row for row in rows.values() if row.kind == ARCHS[family].layer and row.module != path]
    assert others and all(row.swapped_to for row in others)
    assert fallen(model) == {}
    ftops.unpatch(model)
    assert classes(model) == before
    assert torch.equal(logits(model), theirs)


@pytest.mark.parametrize("family", DECODERS)
def test_generate_with_a_layer_on_disk(family, tmp_path):
    ids, mask = prompt(padding="left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    theirs = tiny(family).generate(ids, **options)
    model, _ = partly_on_disk(tiny(family), family, tmp_path)
    assert ftops.patch(model).generate(ids, **options).tolist() == theirs.tolist()


@pytest.mark.parametrize("family", ARCHS)
def test_everything_offloaded(family):
    model = tiny(family)
    theirs = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(logits(ftops.patch(model)), theirs)
    assert not [row for row in ftops.report(model).swapped if row.kind == ARCHS[family].layer]


@pytest.mark.parametrize("family", ARCHS)
def test_offloaded_after_patch(family):
    """The weights go away under the blocks: the originals serve, until patch is called on the model as it is again."""
    model = ftops.patch(tiny(family))
    theirs = logits(tiny(family))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(logits(model), theirs)
    assert sum(fallen(model).values()) >= model.config.num_hidden_layers
    remove_hook_from_submodules(model)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            assert parameter is None or not parameter.is_meta, name
    ftops.patch(model)
    count = sum(fallen(model).values())
    assert_close(logits(model), theirs)
    assert sum(fallen(model).values()) == count


class Counting(ModelHook):
    """A hook of one's own that sees and changes what goes by."""

    def __init__(self) -> None:
        self.calls = 0

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.calls += 1
        return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1

    offload = False


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ARCHS)
def test_a_hook_on_a_layer(family, order):
    """It runs around the block, and around the original again after unpatch."""
    model, patched = tiny(family), tiny(family)
    hook = Counting()
    path = layer_paths(model, family)[0]
    add_hook_to_module(model.get_submodule(path), Counting())
    theirs = logits(model)
    for step in ((add_hook_to_module, None) if order == "before" else (None, add_hook_to_module)):
        if step is None:
            ftops.patch(patched)
        else:
            step(patched.get_submodule(path), hook)
    assert_close(logits(patched), theirs)
    assert hook.calls == 1 and fallen(patched) == {}
    ftops.unpatch(patched)
    assert torch.equal(logits(patched), theirs)
    assert hook.calls == 2
    remove_hook_from_module(patched.get_submodule(path))
    assert torch.equal(logits(patched), logits(tiny(family)))


@pytest.mark.parametrize("family", ARCHS)
def test_a_hook_inside_of_a_layer(family):
    """The block would pass it by, so the layer is kept."""
    model, patched = tiny(family), tiny(family)
    for m in (model, patched):
        inner = m.get_submodule(f"{layer_paths(m, family)[0]}.{ARCHS[family].down}")
        add_hook_to_module(inner, Counting())
    assert_close(logits(ftops.patch(patched)), logits(model))
    row = next(row for row in ftops.report(patched) if row.kind == ARCHS[family].layer)
    assert (row.swapped_to, row.reason) == (None, f"accelerate hooks {ARCHS[family].down}")


@pytest.mark.parametrize("family", ARCHS)
def test_hooks_that_were_taken_off(family):
    """accelerate leaves a bound forward on every module that it hooked: that is no replacement."""
    model = tiny(family)
    for module in model.modules():
        add_hook_to_module(module, Counting())
    remove_hook_from_submodules(model)
    theirs = logits(model)
    assert_close(logits(ftops.patch(model)), theirs)
    layers = [row for row in ftops.report(model) if row.kind == ARCHS[family].layer]
    assert len(layers) == model.config.num_hidden_layers and all(row.swapped_to for row in layers)
    assert fallen(model) == {}
    assert torch.equal(logits(ftops.unpatch(model)), theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loaded_with_a_device_map(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    theirs = logits(tiny(family))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", attn_implementation="eager")
    assert_close(logits(ftops.patch(model)).cpu(), theirs)
    assert ftops.report(model).family == family and fallen(model) == {}


def test_a_copy_of_a_hooked_model():
    model = tiny("llama")
    add_hook_to_module(model.model.layers[0], Counting())
    ours = logits(ftops.patch(model))
    assert torch.equal(logits(copy.deepcopy(model)), ours)
