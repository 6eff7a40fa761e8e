"""`ftops demo` is the first thing a stranger runs: it must work as a command, and it must not call a broken patch the same."""
from __future__ import annotations

import torch

import ftops
from ftops.cli import main
from ftops.integrations.demo.demo import compare_tokens, mean_pool


def test_demo(capsys):
    """Both real models run, patched as whole layers, and both outputs are the same; MiniLM knows what Rome is."""
    assert main(["demo", "--device", "cpu", "--runs", "1", "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Output: same") == 2
    assert "all 48 tokens are equal" in shown
    assert "ftops block (bert)" in shown and "ftops block" in shown.split("LlamaForCausalLM")[1]
    assert "Rome." in shown and "The capital of Italy" in shown
    assert "self." in shown.split("def setUp(self):")[1][:80]


def test_demo_fails_where_patch_changes_the_output(monkeypatch, capsys):
    """A patch that gets one layer wrong is reported as different, and the exit status says so."""
    patch = ftops.patch

    def broken(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "layer" in name and p.dim() == 2).mul_(-1)
        return patch(model)

    monkeypatch.setattr(ftops, "patch", broken)
    assert main(["demo", "--device", "cpu", "--runs", "1", "--max-new-tokens", "6"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("DIFFERENT") == 2 and "Output: same" not in shown


def test_demo_needs_its_encoder(monkeypatch, capsys):
    monkeypatch.setattr("ftops.integrations.demo.load.ENCODER_PACKAGE", "not_there_at_all")
    assert main(["demo"]) == 2
    assert "not-there-at-all" in (message := capsys.readouterr().err) and "pip install" in message


def test_tokens_that_differ_beyond_a_tie_are_different():
    """Logits 1 apart are no tie in any dtype; the sentence names the first place and the gap there."""
    before = torch.tensor([[3, 1, 2], [0, 0, 1]])
    after = torch.tensor([[3, 1, 2], [0, 2, 1]])
    logits = torch.nn.functional.one_hot(before, 4).float()
    same, remark = compare_tokens(before, after, logits, torch.bfloat16)
    assert not same
    assert "prompt 2 differs from token 2 on" in remark and "1.0e+00" in remark


def test_tokens_that_differ_by_a_tie_are_told_and_accepted():
    """Two logits one bfloat16 rounding apart: the same in bfloat16, different in float32."""
    before, after = torch.tensor([[1, 1]]), torch.tensor([[1, 2]])
    logits = torch.zeros(1, 2, 4)
    logits[..., 1], logits[..., 2] = 8.0, 8.0 - 8 * 2**-8
    assert compare_tokens(before, after, logits, torch.bfloat16)[0]
    assert not compare_tokens(before, after, logits, torch.float32)[0]
    assert "differs from token 2" in compare_tokens(before, after, logits, torch.bfloat16)[1]


def test_tokens_of_another_length_are_different():
    before = torch.ones(1, 3, dtype=torch.long)
    assert not compare_tokens(before, before[:, :2], torch.zeros(1, 3, 4), torch.float32)[0]


def test_padding_takes_no_part_in_an_embedding():
    """A short sentence in a batch with a long one embeds as it does alone."""
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    hidden[0, 2:] = 1e4
    torch.testing.assert_close(mean_pool(hidden, mask)[0], mean_pool(hidden[:1, :2], mask[:1, :2])[0])
