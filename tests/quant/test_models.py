"""Quantised models: the format's own weights and nothing else is computed, fused or not; what was asked is what is quantised."""
from __future__ import annotations

import copy
import logging
import weakref

import pytest
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

import ftops
from ftops.quant import FORMATS, QuantizedWeight
from ftops.quant.module import QuantizedLinear
from ftops.quant.w8a8 import smoothing
from tests.families.tiny import TINY, causal, prompt, tiny
from tests.patch.checks import assert_close, fallen, logits, makeup
from tests.patch.zoo import outputs, small

ONE_OF_EACH_BLOCK = ("llama", "gpt2", "gptj", "bert")


def plain(family, *args, **options):
    """transformers' own layers with the weights that the format kept: the oracle."""
    return ftops.quantize(tiny(family), *args, **options).dequantize()


@pytest.mark.parametrize(("family", "name"), [
    (family, name) for one, family in enumerate(TINY) for other, name in enumerate(FORMATS) if (one + other) % 2 == 0])
def test_logits_are_those_of_the_weights_that_the_format_kept(family, name):
    theirs = logits(plain(family, name))
    for model in (ftops.quantize(tiny(family), name), ftops.patch(tiny(family), quant=name)):
        assert_close(logits(model), theirs)
        assert fallen(model) == {}
    assert not torch.allclose(theirs, logits(tiny(family)), atol=1e-4)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "phi", "falcon", "t5", "mixtral"])
def test_models_without_a_description(kind):
    """Their linear layers are swapped one by one; falcon's are of its own class, and are kept with an error that says so."""
    model = small(kind, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if kind == "t5" else MODEL_FOR_CAUSAL_LM_MAPPING)
    if kind == "falcon":
        with pytest.raises(ValueError, match=r"has no nn\.Linear or Conv1D"):
            ftops.quantize(model, "int8")
        return
    theirs = outputs(ftops.quantize(copy.deepcopy(model), "int8").dequantize())
    ours = outputs(ftops.patch(model, quant="int8"))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) >= 8


@pytest.mark.parametrize("family", ONE_OF_EACH_BLOCK)
def test_a_patched_model_is_quantised_in_place(family):
    model = ftops.quantize(ftops.patch(tiny(family)), "int4")
    assert torch.equal(logits(model), logits(ftops.patch(tiny(family), quant="int4")))
    assert fallen(model) == {}


def test_what_is_fused_is_one_weight():
    """Decoding reads q, k, v in one kernel; the parts are slices, so that nothing is there twice."""
    model = ftops.patch(tiny("llama"), quant="int4")
    layer = model.model.layers[1]
    weights, parts = layer._ftops.block.weights, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    assert isinstance(weights.qkv.weight, QuantizedWeight)
    assert weights.qkv.weight.shape == (1024, 256) and weights.up.weight.shape == (768, 256)
    original = tiny("llama").model.layers[1].self_attn
    whole = FORMATS["int4"].quantize(torch.cat([getattr(original, f"{n}_proj").weight.detach() for n in "qkv"]))
    for name, tensor in weights.qkv.weight.tensors.items():
        assert torch.equal(tensor, whole.tensors[name])
        assert {getattr(part, name).untyped_storage().data_ptr() for part in parts} == {tensor.untyped_storage().data_ptr()}


@pytest.mark.parametrize("patched", [False, True])
def test_the_weights_are_let_go(patched):
    model = tiny("llama")
    if patched:
        ftops.patch(model)
    held = [weakref.ref(module.weight) for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    ftops.quantize(model, "int8")
    assert [one() for one in held if one() is not None] == []
    assert not any(isinstance(module, nn.Linear) for module in model.model.modules())


@pytest.mark.parametrize("family", ONE_OF_EACH_BLOCK)
def test_unpatched_it_stays_quantised_and_says_so(family, caplog):
    before, model = ftops.quantize(tiny(family), "int4"), ftops.patch(tiny(family), quant="int4")
    with caplog.at_level(logging.WARNING, "ftops"):
        ftops.unpatch(model)
    assert "its linear layers stay int4" in caplog.text and "dequantize" in caplog.text
    assert torch.equal(logits(model), logits(before))
    assert {path: seen[0] for path, seen in makeup(model).items() if isinstance(seen, tuple) and isinstance(seen[0], type)} == {
        path: seen[0] for path, seen in makeup(before).items() if isinstance(seen, tuple) and isinstance(seen[0], type)}
    storages = [buffer.untyped_storage().data_ptr() for buffer in model.buffers()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("family", ONE_OF_EACH_BLOCK)
def test_dequantised_it_has_its_own_classes_and_names_again(family):
    model = ftops.quantize(tiny(family), "int8", head="int8", embeddings="int8")
    quantised = logits(model)
    model.dequantize()
    assert_close(logits(model), quantised)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in tiny(family).named_modules()}
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in tiny(family).state_dict().items()}


@pytest.mark.parametrize("family", ["mistral", "gpt2", "gptj"])
def test_generate(family):
    ids, mask = prompt(padding="left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    theirs = plain(family, "int8").generate(ids, **options)
    assert ftops.patch(tiny(family), quant="int8").generate(ids, **options).tolist() == theirs.tolist()


def test_each_part_as_the_configuration_says():
    config = ftops.QuantConfig("int4", group_size=64, head="int8", embeddings="fp8", overrides={
        "*.layers.0.*": None, "*.down_proj": "int8", "*.o_proj": {"format": "int4", "group_size": 32, "zero_points": True}})
    model = ftops.quantize(tiny("llama"), config)
    formats = {name: module.qw for name, module in model.named_modules() if hasattr(module, "qw")}
    assert not any(".layers.0." in name for name in formats)
    assert {name: qw.name for name, qw in formats.items() if ".layers.0." not in name and ".layers.1." not in name} == {
        "model.embed_tokens": "fp8", "lm_head": "int8", **{f"model.layers.2.{name}": "int4 g64" for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")},
        "model.layers.2.self_attn.o_proj": "int4 g32", "model.layers.2.mlp.down_proj": "int8"}
    assert formats["model.layers.2.self_attn.o_proj"].tensors["scales"].dim() == 5
    assert_close(logits(ftops.patch(model)), logits(ftops.quantize(tiny("llama"), config).dequantize()))
    assert fallen(model) == {}


def test_parts_of_one_weight_in_different_formats_are_not_fused_and_the_report_says_why():
    model = ftops.patch(tiny("llama"), quant=ftops.QuantConfig("int4", overrides={"*.2.self_attn.k_proj": "int8"}))
    rows = {row.module: row for row in ftops.report(model)}
    assert rows["model.layers.1"].swapped_to == "ftops block (llama)"
    assert rows["model.layers.2"].swapped_to is None and "q_proj" in rows["model.layers.2"].reason
    assert "int4, int8" in rows["model.layers.2"].reason
    assert_close(logits(model), logits(plain("llama", ftops.QuantConfig("int4", overrides={"*.2.self_attn.k_proj": "int8"}))))


def test_the_report_has_formats_and_bytes():
    model = ftops.patch(tiny("llama", dtype=torch.bfloat16), quant="int8")
    report = ftops.report(model)
    values = 3 * (256 * 512 * 2 + 256 * 256 * 2 + 3 * 256 * 384)
    assert report.weights[0] == 2 * values
    assert values < report.weights[1] < 1.02 * values
    text = str(report)
    assert "int8" in text and f"{2 * values / 2 ** 20:.1f} -> {report.weights[1] / 2 ** 20:.1f} MiB" in text
    assert "linears quantised" in str(ftops.report(ftops.quantize(tiny("gpt2"), "int4")))


@pytest.mark.parametrize("name", FORMATS)
def test_other_dtypes_and_copies(name):
    """bfloat16 by .to() is what bfloat16 weights would have become, within their rounding; a copy lives by itself."""
    model = ftops.patch(ftops.quantize(tiny("llama"), name))
    theirs = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), theirs)
    half = logits(other.to(torch.bfloat16)).float()
    assert (half - theirs).abs().max() <= 2 * (logits(tiny("llama", dtype=torch.bfloat16)).float() - logits(tiny("llama"))).abs().max()
    assert torch.equal(logits(model), theirs)
    assert torch.equal(logits(other.to(torch.float32).to(torch.float32)).isfinite(), torch.ones_like(theirs, dtype=torch.bool))
    assert fallen(model) == {} and fallen(other) == {}


def test_gradients_reach_what_is_not_quantised():
    model, oracle = ftops.quantize(tiny("llama"), "int8"), plain("llama", "int8")
    ids = prompt()[0]
    for one in (model, oracle):
        one(ids, labels=ids).loss.backward()
    theirs = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def test_calibration_smooths_with_the_largest_activations():
    """Layers that become one weight share their input, and so their scales."""
    model, ids = tiny("llama"), prompt(4, 20)[0]
    inputs = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    logits(model, ids)
    hook.remove()
    weight = torch.cat([getattr(model.model.layers[1].self_attn, f"{n}_proj").weight.detach() for n in "qkv"])
    expected = smoothing(inputs[0].abs().amax((0, 1)), weight)
    theirs = logits(model)
    ftops.quantize(model, "w8a8", calibration=[ids[:2], {"input_ids": ids[2:]}])
    for name in "qkv":
        assert torch.allclose(getattr(model.model.layers[1].self_attn, f"{name}_proj").smooth, expected)
    assert isinstance(ftops.patch(model).model.layers[1]._ftops.block.weights.qkv.weight, QuantizedWeight)
    assert (logits(model) - theirs).abs().max() < 0.1 * theirs.abs().max()
    assert fallen(model) == {}


@pytest.mark.parametrize(("family", "name", "options"), [
    ("llama", "int4", {"head": "int8"}), ("mistral", "fp8", {}), ("qwen2", "w8a8", {"embeddings": "int8"}), ("qwen3", "int8", {}),
    ("gpt2", "int4", {"head": "int8"}), ("gptj", "w8a8", {"embeddings": "int8"}), ("bert", "fp8", {})])
def test_from_pretrained_quantises_and_what_it_saves_comes_back(family, name, options, tmp_path):
    auto = AutoModelForCausalLM if causal(family) else AutoModelForMaskedLM
    config = ftops.QuantConfig(name, **options)
    tiny(family).save_pretrained(tmp_path / "original", max_shard_size="1MB")
    theirs = logits(ftops.quantize(tiny(family), config))
    model = auto.from_pretrained(tmp_path / "original", quantization_config=config, attn_implementation="eager")
    assert torch.equal(logits(model), theirs)
    model.save_pretrained(tmp_path / "quantised", max_shard_size="300KB")
    again, info = auto.from_pretrained(tmp_path / "quantised", attn_implementation="eager", output_loading_info=True)
    assert torch.equal(logits(again), theirs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.quantization_config.to_dict() == config.to_dict()
    assert_close(logits(ftops.patch(again)), theirs)
