"""`ftops generate`: the text is the model's own, it is shown while it is made, and what cannot be served is said at once."""
from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from ftops.cli import main
from ftops.integrations.demo.load import EMBEDDED, load_causal_lm

PROMPT = "class TestQueue(unittest.TestCase):\n\n    def setUp(self):"


class Clock(io.StringIO):
    """Standard output that remembers how many forward passes had been made at each write."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.seen = 0, []

    def write(self, text: str) -> int:
        if text.strip():
            self.seen.append(self.passes)
        return super().write(text)


@pytest.fixture(scope="module")
def expected() -> str:
    """What transformers itself writes after PROMPT, unpatched."""
    model, tokenizer = load_causal_lm(device="cpu")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize("flags", [[], ["--no-patch"], ["--model", str(EMBEDDED)]], ids=["embedded", "unpatched", "folder"])
def test_text_is_that_of_transformers(flags, expected, capsys):
    assert main(["generate", "--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "32", *flags]) == 0
    shown = capsys.readouterr()
    assert shown.out.rstrip("\n") == expected.rstrip("\n")
    assert ("not patched" if "--no-patch" in flags else "6 modules swapped") in shown.err
    assert "32 tokens" in shown.err


def test_text_appears_while_it_is_made(monkeypatch):
    """Words are written between forward passes, not all at the end."""
    clock, forward = Clock(), LlamaForCausalLM.forward

    def counted(self, *args, **kwargs):
        clock.passes += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    monkeypatch.setattr(sys, "stdout", clock)
    assert main(["generate", "--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "32"]) == 0
    assert clock.seen[0] <= 1 and len(set(clock.seen)) >= 6


def test_temperature_samples_by_its_seed(capsys):
    """One seed gives one text, another seed another: the temperature and the seed both arrive."""
    def text(seed: str) -> str:
        flags = ["--max-new-tokens", "24", "--temperature", "1.0", "--seed", seed]
        assert main(["generate", "--device", "cpu", "--prompt", "import", *flags]) == 0
        return capsys.readouterr().out

    assert text("1") == text("1") != text("2")


@pytest.mark.parametrize(("flags", "words"), [
    (["--model", "/nowhere/at/all"], ["--model", "/nowhere/at/all", "config.json", "save_pretrained"]),
    (["--model", "./no-such-folder"], ["--model", "./no-such-folder", "config.json", "save_pretrained"]),
    (["--model", "no-such-owner/no-such-model"], ["--model", "no-such-owner/no-such-model", ".safetensors"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens", "0", "1 or more"]),
    (["--max-new-tokens", "1024"], ["1024 positions", "shorten"]),
    (["--temperature", "-1"], ["--temperature", "-1", "0 (greedy)"]),
    (["--device", "tpu"], ["--device", "tpu", "cpu, cuda"]),
], ids=lambda value: "_".join(value) if value and value[0].startswith("--") else "")
def test_errors_name_the_argument_and_the_remedy(flags, words, capsys):
    assert main(["generate", "--prompt", "x", *flags]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("ftops generate: ")
    for word in words:
        assert word in shown.err


def start(**environment: str) -> subprocess.Popen:
    """As a shell starts it in the foreground: whoever runs the tests in the background has signals of the keyboard ignored."""
    command = (sys.executable, "-m", "ftops", "generate", "--device", "cpu", "--prompt", "# Größe ☃\nimport", "--max-new-tokens", "900")
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=os.environ | environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly():
    """`ftops generate ... | head -1` under cron: question marks for what ASCII does not have, and no traceback."""
    with start(PYTHONIOENCODING="ascii") as process:
        assert process.stdout.readline() == b"# Gr??e ?\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=300)) == (b"", 141)


@pytest.mark.slow
def test_ctrl_c_ends_it_quietly():
    with start() as process:
        assert process.stdout.readline().decode() == "# Größe ☃\n"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert (process.stderr.read().strip(), process.wait(timeout=300)) == (b"", 130)


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", "--prompt", "x", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_pickled_weights_are_refused(tmp_path, capsys):
    """A checkpoint that only has pickles, which may run code when opened, is not loaded."""
    model, tokenizer = load_causal_lm(device="cpu")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert main(["generate", "--prompt", "x", "--model", str(tmp_path)]) == 2
    assert "safetensors" in capsys.readouterr().err
