"""What cannot be quantised is said, with what to do, and the model is as it was."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ftops
from tests.families.tiny import tiny
from tests.patch.checks import assert_same_values, logits, makeup, values

IDS = torch.ones((1, 4), dtype=torch.long)


def with_nan(model):
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = float("nan")


def with_hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def in_float64(model):
    model.model.layers[1].mlp.up_proj.double()


WRONG = {
    "format": ({"quant": "int3"}, None, ["format is 'int3'", "int4, int8, fp8, w8a8"]),
    "kind": ({"quant": 4}, None, ["the format is 4", "ftops.QuantConfig"]),
    "group size": ({"quant": "int4", "group_size": 48}, None, ["group_size is 48", "32, 64 or 128"]),
    "group size of int8": ({"quant": "int8", "group_size": 32}, None, ["int8: group_size is 32", "None"]),
    "option of another": ({"quant": "int8", "zero_points": True}, None, ["int8 has no option zero_points", "int4 has group_size"]),
    "option": ({"quant": "int8", "bits": 3}, None, ["'bits'", "the options of ftops.QuantConfig"]),
    "embeddings": ({"quant": "int8", "embeddings": "int4"}, None, ["embeddings is 'int4'", "int8, fp8"]),
    "head": ({"quant": "int8", "head": "int2"}, None, ["format is 'int2'"]),
    "pattern": ({"quant": "int8", "overrides": {"*.mpl.*": None}}, None, ["'*.mpl.*'", "match no linear layer", "model.layers.0"]),
    "override": ({"quant": "int8", "overrides": {"*.mlp.*": "int5"}}, None, ["format is 'int5'"]),
    "everything kept": ({"quant": "int8", "overrides": {"*": None}}, None, ["has no nn.Linear or Conv1D"]),
    "calibration": ({"quant": "int8", "calibration": IDS}, None, ["calibration is given, and no layer is w8a8"]),
    "calibration of text": ({"quant": "w8a8", "calibration": "some text"}, None, ["calibration has a str", "tokenizer(text"]),
    "values": ({"quant": "int8"}, with_nan, ["model.layers.2.mlp.down_proj.weight is not finite", "overrides={'model.layers.2.mlp"]),
    "hooks": ({"quant": "int8"}, with_hook, ["model.layers.1.mlp.up_proj has hooks", "overrides="]),
    "dtype": ({"quant": "int8"}, in_float64, ["model.layers.1.mlp.up_proj.weight", "torch.float64", "bfloat16"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_changes_nothing(wrong):
    options, prepare, parts = WRONG[wrong]
    model = tiny("llama")
    if prepare:
        prepare(model)
    before, held = makeup(model), values(model)
    with pytest.raises(ValueError) as caught:
        ftops.quantize(model, **options)
    for part in parts:
        assert part in str(caught.value)
    assert makeup(model) == before
    if not prepare:
        assert_same_values(model, held)
    if set(options) == {"quant"} and not prepare:
        with pytest.raises(ValueError):
            ftops.patch(model, **options)
        assert makeup(model) == before


def test_too_few_inputs_for_a_group():
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 8))
    with pytest.raises(ValueError, match=r"0 has 96 inputs, fewer than group_size 128; allowed: group_size=64, or overrides=\{'0': None\}"):
        ftops.quantize(model, "int4")
    with pytest.raises(ValueError, match="1 has 64 inputs, fewer than group_size 128"):
        ftops.quantize(model, "int4", overrides={"0": None})
    ftops.quantize(model, "int4", group_size=32)
    assert model(torch.zeros(2, 96)).shape == (2, 8)


def test_twice():
    model = ftops.quantize(tiny("llama"), "int8")
    theirs = logits(model)
    with pytest.raises(ValueError, match=r"q_proj is quantised already \(int8\); load the original model"):
        ftops.patch(model, quant="int4")
    assert torch.equal(logits(model), theirs)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = type(tiny("llama"))(copy.deepcopy(tiny("llama").config))
    with pytest.raises(ValueError, match="is on the meta device and has no values; load the weights first"):
        ftops.quantize(model, "int8")


def test_no_model():
    with pytest.raises(TypeError, match=r"model is a str; pass a torch\.nn\.Module"):
        ftops.quantize("llama", "int8")
