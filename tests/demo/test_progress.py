"""Bars for what takes long: on a terminal they move and go away, in a file or a pipe there are none, and results are the same."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops import progress
from ftops.cli import main
from tests.families.tiny import prompt, tiny


@pytest.fixture
def terminal(monkeypatch):
    """What rich takes for a terminal; drawn at every step."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "REDRAWN", 0.0)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["steps", "lookup"])
def test_generate_counts_tokens_on_standard_error(options, terminal, capsys):
    model, (ids, mask) = ftops.patch(tiny("llama")), prompt()
    plain = ftops.generate(model, ids, mask, max_new_tokens=7, **options)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(ftops.generate(model, ids, mask, max_new_tokens=7, progress=True, **options), plain)
    shown = capsys.readouterr()
    assert not shown.out and "generating" in shown.err and "7/7" in shown.err and "0/7" in shown.err


def test_the_command_shows_a_bar_where_its_text_goes_to_a_file(terminal, capsys):
    assert main(["generate", "--device", "cpu", "--prompt", "import", "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr()
    assert "generating" not in shown.out and "0/5" in shown.err and "5/5" in shown.err


def test_no_terminal_no_bar(capsys):
    """A log file is not filled with the frames of a bar."""
    ids, mask = prompt()
    ftops.generate(ftops.patch(tiny("llama")), ids, mask, max_new_tokens=3, progress=True)
    assert capsys.readouterr() == ("", "")


def test_warmup_counts_its_runs(terminal, capsys):
    ftops.warmup(ftops.patch(tiny("bert")), max_length=8)
    shown = capsys.readouterr()
    assert not shown.out and "compiling kernels" in shown.err and "4/4" in shown.err


def test_it_is_not_redrawn_at_every_token(terminal, capsys, monkeypatch):
    """A frame costs as long as a decode step."""
    monkeypatch.setattr(progress, "REDRAWN", 3600.0)
    assert list(progress.track(range(500), "counting", 500)) == list(range(500))
    assert capsys.readouterr().err.count("counting") <= 4


def test_an_error_inside_comes_through(terminal):
    with pytest.raises(ZeroDivisionError), progress.bar("dividing", 2) as advance:
        advance()
        1 / 0  # noqa: B018
