"""The embedded model: small enough to be cloned, able to do its job, and trained by the script that the repository shows."""
from __future__ import annotations

import json
import math
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftops.integrations.demo import train
from ftops.integrations.demo.corpus import is_held_out, read_corpus
from ftops.integrations.demo.load import EMBEDDED, load_causal_lm

LOG = json.loads((EMBEDDED / "training_log.json").read_text())


def test_it_is_what_its_log_says():
    """Size limit, parameters and shape; a log of another model would mislead whoever reads it."""
    size = sum(file.stat().st_size for file in EMBEDDED.glob("*.safetensors"))
    model, _ = load_causal_lm(device="cpu")
    assert size == LOG["result"]["bytes"] <= 8 * 2**20
    assert sum(p.numel() for p in model.parameters()) == LOG["result"]["parameters"]
    assert {key: getattr(model.config, key) for key in train.SHAPE} == train.SHAPE


def test_it_predicts_python_it_has_not_seen():
    """On held-out files its perplexity is within a factor of two of the log's: weights and tokenizer belong together."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    names = [n for path in sorted(stdlib.glob("*.py")) if is_held_out(n := Path(path.name))]
    model, tokenizer = load_causal_lm(device="cpu")
    losses = []
    for name in names:
        tokens = tokenizer((stdlib / name).read_text(), return_tensors="pt", truncation=True, max_length=512).input_ids
        with torch.inference_mode():
            losses.append(model(input_ids=tokens, labels=tokens).loss.item())
    assert names and math.exp(sum(losses) / len(losses)) < 2 * LOG["result"]["perplexity"] + 4


def test_its_tokenizer_gives_back_any_text():
    tokenizer = load_causal_lm(device="cpu")[1]
    text = "def f(a1):\n\tx = 'héllo ☃ 日本'  # 1234\r\n\n    return  x \n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_training_makes_what_auto_classes_load(tmp_path, monkeypatch):
    """The documented command on a small library: the loss falls, and every file that the log promises is there and loads."""
    library, out = tmp_path / "lib", tmp_path / "out"
    library.mkdir()
    source = Path(sysconfig.get_paths()["stdlib"])
    names = [f"m{i}.py" for i in range(1000)]
    held_out = next(name for name in names if is_held_out(Path(name)))
    shown = [name for name in names if not is_held_out(Path(name))]
    for name, target in (("shlex.py", shown[0]), ("textwrap.py", shown[1]), ("shlex.py", shown[2]), ("heapq.py", held_out)):
        (library / target).write_text((source / name).read_text())
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--stdlib", str(library), "--steps", "6", "--batch-tokens", "1024",
                                      "--device", "cpu"])
    monkeypatch.setattr(train, "CURVE_WINDOWS", 2)
    monkeypatch.setattr(train, "PROMPTS", train.PROMPTS[:1])
    monkeypatch.setitem(train.SHAPE, "num_hidden_layers", 1)
    train.main()

    log = json.loads((out / "training_log.json").read_text())
    assert log["corpus"]["files"] == 3 and log["corpus"]["validation_files"] == 1  # the copy counts once
    assert log["curve"][-1]["validation_loss"] < log["curve"][0]["validation_loss"] - 0.1
    assert log["result"]["bytes"] <= 8 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype is torch.bfloat16
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert "| 6 |" in (out / "training_log.md").read_text()


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 usable"):
        read_corpus(tmp_path)
