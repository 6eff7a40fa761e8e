"""Saved models: the same logits back, and a file that is not what it should be is refused before any of it is used."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM

import ftops
from ftops.integrations.demo.load import load_causal_lm
from ftops.quant import FORMATS
from tests.families.tiny import tiny
from tests.patch.checks import logits
from tests.patch.zoo import outputs, small

CONFIG = {"head": "int8", "overrides": {"*.0.*": "fp8"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Several files of several formats, to damage copies of."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    ftops.save(ftops.quantize(tiny("llama"), "int4", **CONFIG), folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def eager(folder):
    model = ftops.load(folder, device="cpu")
    model.config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize(("family", "patched"), [("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_loaded_model_is_the_saved_one(family, name, patched, tmp_path):
    model = ftops.quantize(tiny(family), name)
    theirs = logits(model)
    ftops.save(ftops.patch(model) if patched else model, tmp_path / "model")
    assert torch.equal(logits(eager(tmp_path / "model")), theirs)
    again = eager(tmp_path / "model").state_dict()
    assert all(torch.equal(again[key].view(torch.uint8), value.view(torch.uint8)) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "bert"])
def test_a_head_and_embeddings_that_shared_a_weight(family, tmp_path):
    """In formats of their own they no longer do, and the file says so."""
    model = ftops.quantize(tiny(family), "int8", head="int4", embeddings="fp8")
    ftops.save(model, tmp_path / "model")
    assert torch.equal(logits(eager(tmp_path / "model")), logits(model))


def test_a_head_that_is_tied_whatever_the_configuration_says(tmp_path):
    model = ftops.quantize(small("t5", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING), "int8", head="int8")
    ftops.save(model, tmp_path / "model")
    assert all(map(torch.equal, outputs(ftops.load(tmp_path / "model", device="cpu")), outputs(model)))


def test_several_files_of_several_formats(saved):
    model = eager(saved)
    assert {module.format for module in model.modules() if hasattr(module, "format")} == {"int4", "int8", "fp8"}
    assert torch.equal(logits(model), logits(ftops.quantize(tiny("llama"), "int4", **CONFIG)))
    whole, base = AutoModelForCausalLM.from_pretrained(saved), AutoModel.from_pretrained(saved)
    assert torch.equal(whole.model.layers[2].mlp.up_proj.packed, base.layers[2].mlp.up_proj.packed)


def test_the_tokenizer_comes_along(tmp_path):
    model, tokenizer = load_causal_lm(device="cpu")
    ftops.save(ftops.quantize(model, "int8"), tmp_path / "model")
    loaded, again = load_causal_lm(tmp_path / "model", device="cpu")
    assert again("def f(x):").input_ids == tokenizer("def f(x):").input_ids
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o644}
    assert torch.equal(logits(loaded), logits(model))


def test_metadata_names_format_and_version(saved):
    with safe_open(next(saved.glob("*.safetensors")), "pt") as file:
        held = json.loads(file.metadata()["ftops"])
    assert held["version"] == 1
    assert held["weights"]["model.layers.1.mlp.up_proj"] == {
        "format": "int4", "shape": [384, 256], "metadata": {"version": 1, "group_size": 128, "dtype": "float32"}}


def change(file, tensors=None, **metadata):
    """The same file with other tensors or metadata."""
    with safe_open(file, "pt") as opened:
        held = json.loads(opened.metadata()["ftops"]) | metadata
    save_file(tensors or load_file(file), file, {"format": "pt", "ftops": json.dumps(held)})


def with_tensor(folder, name, tensor):
    """The folder's file that holds `name`, with another value there; None: without it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / index[name]) | {name: tensor}
    change(folder / index[name], {key: value for key, value in tensors.items() if value is not None})


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(folder):
    data = shards(folder)[1].read_bytes()
    shards(folder)[1].write_bytes(data[: len(data) - 100])


def other_save(folder):
    torch.manual_seed(5)
    ftops.save(ftops.quantize(tiny("llama"), "int4", **CONFIG), folder.with_name("other"), max_shard_size="400KB")
    shutil.copy(shards(folder.with_name("other"))[0], shards(folder)[0])


def not_ours(folder):
    save_file(load_file(shards(folder)[0]), shards(folder)[0], {"format": "pt"})


DIFFERENT = "config.json and the weights are of different models"
PACKED = "model.layers.1.mlp.up_proj.packed"
DAMAGE = {
    "cut": (cut, "damaged, cut short"),
    "text": (lambda folder: shards(folder)[0].write_text("not found"), "damaged, cut short"),
    "empty": (lambda folder: shards(folder)[0].write_bytes(b""), "damaged, cut short"),
    "foreign": (not_ours, "is not of ftops"),
    "other save": (other_save, "belongs to another save"),
    "newer": (lambda folder: [change(file, version=2) for file in shards(folder)], "has version 2; this ftops reads 1"),
    "no file": (lambda folder: shards(folder)[0].unlink(), "which .* has not; download"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "neither model.safetensors nor"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no .*config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "not quantised": (lambda folder: edit(folder / "config.json", quantization_config=None), "is not quantised"),
    "other config": (lambda folder: edit(folder / "config.json", intermediate_size=640), DIFFERENT),
    "more words": (lambda folder: edit(folder / "config.json", vocab_size=200), DIFFERENT),
    "more layers": (lambda folder: edit(folder / "config.json", num_hidden_layers=4), "is not a whole LlamaForCausalLM: it misses"),
    "fewer layers": (lambda folder: edit(folder / "config.json", num_hidden_layers=2), "it has besides model.layers.2"),
    "architecture": (lambda folder: edit(folder / "config.json", architectures=["NoSuch"]), "names the architecture NoSuch"),
    "a tensor less": (lambda folder: with_tensor(folder, PACKED, None), "packed is in none of the files"),
    "a norm less": (lambda folder: with_tensor(folder, "model.norm.weight", None), "it misses model.norm.weight"),
    "wrong shape": (lambda folder: with_tensor(folder, PACKED, torch.zeros(12, 7, 32, 4).int()), "does not hold the 384 x 256"),
    "wrong dtype": (lambda folder: with_tensor(folder, PACKED, torch.zeros(12, 8, 32, 4)), "does not hold the 384 x 256"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_is_refused(damage, folder):
    do, message = DAMAGE[damage]
    do(folder)
    with pytest.raises(ValueError, match=message):
        ftops.load(folder, device="cpu")


def test_a_gpu_that_is_not_there_is_said(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="load: device is 'cuda:0' but PyTorch finds no CUDA device"):
        ftops.load(folder, device="cuda:0")


def test_a_format_that_is_not_known(folder):
    for file in shards(folder):
        with safe_open(file, "pt") as opened:
            weights = json.loads(opened.metadata()["ftops"])["weights"]
        weights["lm_head"]["format"] = "int3"
        change(file, weights=weights)
    with pytest.raises(ValueError, match=r"lm_head in .* is 'int3'; this ftops reads int4"):
        ftops.load(folder, device="cpu")


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = ftops.quantize(tiny("llama"), "int8")

    def fail(*_, **__):
        (tmp_path / "seen").write_text(str(sorted(path.name for path in tmp_path.iterdir())))
        raise OSError("disk full")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ftops.save(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]
    assert "'model'" not in (tmp_path / "seen").read_text()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        ftops.save(ftops.quantize(tiny("llama"), "int8"), tmp_path)
    with pytest.raises(ValueError, match="no quantised weights"):
        ftops.save(tiny("llama"), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
