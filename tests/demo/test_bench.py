"""`ftops bench`: both sides run the same prompts, their tokens are compared, and losses stand beside wins."""
from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from ftops.cli import main
from ftops.integrations import bench as module
from ftops.integrations.bench import BASELINE, COMPILED, OURS, Bench, Run, agreement, bench, prompts, timed, twin
from ftops.integrations.bench_show import draw, figure, show
from ftops.integrations.demo.load import load_causal_lm
from ftops.integrations.evaluate import library_text


@pytest.fixture(scope="module")
def found() -> Bench:
    return bench(batches=[1, 2], contexts=[16], new_tokens=6, repeats=1, device="cpu")


def fake(batches: list[int], contexts: list[int], seconds: dict[str, float], missing: tuple = ()) -> Bench:
    """A token takes a side so long at any context."""
    made = Bench("a model", "bfloat16", None, 8_030_000_000, torch.device("cpu"), 32, 3)
    made.runs = [Run(side, batch, context, 0.05, token, 2**30, 0.5, "out of memory" if (side, batch, context) in missing else "")
                 for context in contexts for batch in batches for side, token in seconds.items()]
    return made


def refuse(*_) -> None:
    raise torch.OutOfMemoryError("no")


def shown(made: Bench) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    show(console, made)
    return console.export_text()


def test_each_size_has_each_side_and_the_tokens_are_hugging_faces(found):
    assert [(run.batch, run.side) for run in found.runs] == [(1, BASELINE), (1, OURS), (2, BASELINE), (2, OURS)]
    for run in found.runs:
        assert run.equal == 1 and not run.missing
        assert 0 < run.token < run.first + 1 and run.rate == pytest.approx(run.batch / run.token)
        assert run.memory == 16002304  # of float32 weights
    assert found.remarks == []


@pytest.mark.gpu
def test_on_a_gpu_memory_is_that_of_a_run_and_the_compiled_side_is_measured():
    made = bench(batches=[1, 4], contexts=[32], new_tokens=8, compiled=True, repeats=1, dtype="float32")
    assert [run.side for run in made.runs] == [BASELINE, COMPILED, OURS] * 2
    assert not any(run.missing for run in made.runs) and all(run.equal > 0.9 for run in made.runs)
    weights = made.parameters * 4
    assert all(weights < run.memory < weights + 2**30 for run in made.runs)


def test_the_loop_of_ftops_is_what_is_timed(found, monkeypatch):
    """Otherwise both columns would be Hugging Face's loop."""
    from ftops.integrations.transformers import generate
    ran = []
    original = generate.Loop.__iter__
    monkeypatch.setattr(generate.Loop, "__iter__", lambda self: (ran.append(1), original(self))[1])
    bench(batches=[1], contexts=[8], new_tokens=3, repeats=1, device="cpu")
    assert len(ran) == module.WARM + 1


def test_times_are_those_of_the_tokens():
    model, _ = load_causal_lm(device="cpu")
    model.generation_config.eos_token_id = None
    tokens, seconds = timed(model, torch.zeros((2, 4), dtype=torch.long), 5)
    assert tokens.shape == (2, 5) and len(seconds) == 5
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_twin_needs_no_second_copy_of_the_weights():
    model, _ = load_causal_lm(device="cpu")
    other = twin(model)
    assert other is not model and other.model.layers[0] is not model.model.layers[0]
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_prompts_are_text_and_fill_any_size():
    _, tokenizer = load_causal_lm(device="cpu")
    ids = prompts(tokenizer, 3, 40)
    assert ids.shape == (3, 40) and len({tuple(row) for row in ids.tolist()}) == 3
    assert tokenizer.decode(ids.flatten()) in library_text()
    assert prompts(tokenizer, 1, 7).tolist() == [ids.flatten()[:7].tolist()]


def test_agreement_counts_what_comes_before_the_first_difference():
    """What follows a difference continues another text, and may be equal by chance."""
    theirs = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert agreement(theirs, theirs) == 1
    assert agreement(torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4]]), theirs) == 5 / 8


def test_losses_are_printed_like_wins():
    text = shown(fake([1], [128], {BASELINE: 0.02, COMPILED: 0.01, OURS: 0.04}))
    assert "2.00 x" in text and "0.50 x" in text and "50%" in text


def test_what_does_not_fit_is_said_and_the_others_are_shown(found, monkeypatch):
    """A side that runs out of memory at one size costs that figure, not the table."""
    original = module.timed

    def full(model, ids, *rest):
        if len(ids) == 2 and type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.model.layers[0], "_ftops"):
            raise torch.OutOfMemoryError("no")
        return original(model, ids, *rest)

    monkeypatch.setattr(module, "timed", full)
    made = bench(batches=[2], contexts=[8], new_tokens=3, repeats=1, device="cpu")
    assert [(run.side, run.missing) for run in made.runs] == [(BASELINE, "out of memory"), (OURS, "")]
    assert made.runs[1].token > 0 and made.runs[1].equal is None
    assert "out of memory" in shown(made)
    monkeypatch.setattr(module, "timed", refuse)
    made = bench(batches=[2], contexts=[8], new_tokens=3, repeats=1, device="cpu")
    assert [run.missing for run in made.runs] == ["out of memory"] * 2 and shown(made).count("out of memory") == 2


def test_the_command_writes_table_and_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["bench", "--device", "cpu", "--batch", "1,2", "--context", "8", "--new-tokens", "4", "--repeats", "1", "--quant", "fp8",
                 "--json", str(tmp_path / "out.json")]
    assert main(arguments) == 0
    out = capsys.readouterr()
    assert "ftops, fp8" in out.out and "fp8 is another model" in out.out and "written:" in out.err
    about = json.loads((tmp_path / "out.json").read_text())
    assert torch.__version__.startswith(about["machine"]["torch"]) and about["quant"] == "fp8" and len(about["runs"]) == 4
    assert about["runs"][1]["memory"] < 0.5 * about["runs"][0]["memory"]


def test_the_plot_shows_every_figure(tmp_path):
    pytest.importorskip("matplotlib")
    missing = (COMPILED, 16, 2048)
    made = fake([1, 4, 16], [128, 2048], {BASELINE: 0.02, COMPILED: 0.01, OURS: 0.005}, (missing,))
    axes = [one for one in figure(made).axes if one.get_visible()]
    assert [one.get_title() for one in axes] == ["context 128", "context 2,048", "batch 1", "batch 4", "batch 16"]
    assert all((one.get_xscale(), one.get_yscale()) == ("log", "log") for one in axes)
    lines = {line.get_label(): line for line in axes[1].get_lines()}
    assert list(lines[OURS].get_ydata()) == pytest.approx([200, 800, 3200]) and list(lines[OURS].get_xdata()) == [1, 4, 16]
    assert list(lines[COMPILED].get_xdata()) == [1, 4]  # what is missing is no zero
    nothing = fake([1, 4], [128], {BASELINE: 0.02}, ((BASELINE, 1, 128), (BASELINE, 4, 128)))
    draw(nothing, tmp_path / "nothing.png")
    bars, = figure(fake([1], [128], {BASELINE: 0.02, OURS: 0.005})).axes
    assert [label.get_text() for label in bars.get_yticklabels()] == [OURS, BASELINE]
    draw(made, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


WRONG = [
    (["--batch", "0"], "--batch is 0; allowed: 1 or more"),
    (["--batch", "1,x"], "--batch is '1,x'; allowed: numbers with commas"),
    (["--context", ""], "--context is"),
    (["--new-tokens", "1"], "--new-tokens is 1; allowed: 2 or more"),
    (["--context", "1024"], "--context 1024 and --new-tokens 32 exceed the 1024 positions"),
    (["--quant", "int3"], "bench: --quant is 'int3'; allowed: int4"),
    (["--device", "auto"], "--device is auto; allowed: cpu, cuda"),
    (["--compile", "--device", "cpu"], "--compile needs a GPU"),
    (["--json", "/no/such/folder/out.json"], "/no/such/folder is no folder"),
    (["--plot", "out.xls"], "--plot is out.xls; allowed: a file that ends in .png, .svg, .pdf"),
    (["/no/such/model"], "bench: MODEL is /no/such/model"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments[:2]) for arguments, _ in WRONG])
def test_wrong_arguments(arguments, message, capsys):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


def test_a_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("ftops.integrations.bench_show.find_spec", lambda name: None)
    assert main(["bench", "--plot", "out.png"]) == 2
    assert "pip install 'ftops[bench]'" in capsys.readouterr().err
