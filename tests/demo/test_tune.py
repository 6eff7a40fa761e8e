"""`ftops tune`: the fastest of the candidates that are right is kept, for the shapes that the model's fused layers have."""
from __future__ import annotations

import io
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console

import ftops
from ftops import ops
from ftops import tune as module
from ftops.cli import main
from ftops.integrations import tune as command
from ftops.integrations.transformers.archs import ARCHS
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.tune import shapes_of, show, tune_model
from ftops.tune import Choice, Weight, measured, tune, winners
from tests.families.tiny import tiny


class Clock:
    """Candidates that take as long as they are told, and the stopwatch that sees it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def candidate(self, seconds: float, factor: float = 1.0):
        def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            self.seconds += seconds
            return factor * (x @ weight.T)
        return run

    def __call__(self, replays) -> list[float]:
        taken = []
        for replay in replays:
            before = self.seconds
            replay()
            taken.append(self.seconds - before)
        return taken


def refuses(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("too much shared memory\nand more")


@pytest.fixture
def weight() -> Weight:
    dense = torch.randn(24, 16)
    return Weight(None, [(dense,), (dense.clone(),)], dense)


def test_the_fastest_that_is_right_wins(weight):
    """A kernel that is quick because it is wrong is never kept, and one that cannot run costs nothing but a line."""
    clock = Clock()
    candidates = {"usual": clock.candidate(3.0), "quick": clock.candidate(2.0), "wrong": clock.candidate(1.0, 1.5),
                  "nan": clock.candidate(1.0, float("nan")), "none": refuses}
    choice = measured("linear float32 24x16", candidates, torch.randn(5, 16), weight, clock)
    assert choice.seconds == {"usual": 3.0, "quick": 2.0}  # of one call, not of one on each copy
    assert (choice.winner, choice.untuned, choice.loss) == ("quick", "usual", 1.5)
    assert choice.refused["none"] == "RuntimeError: too much shared memory"
    assert choice.refused["wrong"].startswith("wrong: off by") and choice.refused["nan"].startswith("wrong: off by inf")


def test_nothing_right_is_an_error(weight):
    with pytest.raises(RuntimeError, match="no candidate of p at 2 rows is right"):
        measured("p", {"a": refuses, "b": Clock().candidate(1.0, 2.0)}, torch.randn(2, 16), weight, Clock())


def test_where_there_is_no_choice_nothing_is_measured(weight):
    clock, done = Clock(), []

    def offer(x, dense):
        return "p", {"a": clock.candidate(2.0), **({"b": clock.candidate(1.0 * len(x))} if len(x) < 8 else {})}

    asked = Weight(offer, weight.tensors, weight.dense)
    choices = list(tune(asked, clock, (1, 4, 8), lambda: done.append(1)))
    assert winners(choices) == {"p": {1: "b", 4: "a"}} and len(done) == 3
    again = list(tune(asked, clock, (1, 4, 8), lambda: done.append(1), known={("p", 1)}))
    assert [choice.rows for choice in again] == [4] and len(done) == 6


@pytest.mark.parametrize("family", ARCHS)
def test_shapes_are_those_of_the_fused_layers(family, tmp_path):
    """Read from the configuration alone: no weight is loaded to find out."""
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    blocks = [layer._ftops.block.weights for layer in ftops.patch(model).modules() if isinstance(layer, FusedLayer)]
    shapes, _ = shapes_of(tmp_path)
    assert set(shapes) == {tuple(linear.weight.shape) for block in blocks for linear in (block.qkv, block.out, block.up, block.down)}


def test_formats_are_measured_on_the_tensors_that_their_op_takes():
    """On a CPU the offers cannot be asked; the weight that is compared with is the one that the tensors stand for."""
    for format, count in ((None, 1), ("int8", 2), ("fp8", 2), ("w8a8", 2), ("int4", 3)):
        made = module.random_weight(format, 64, 128, torch.bfloat16, torch.device("cpu"))
        assert [len(tensors) for tensors in made.tensors] == [count]
        assert made.dense.shape == (64, 128) and made.dense.dtype is torch.bfloat16
    packed, scales, features = made.tensors[0]
    exact = ftops.ops.linear_w4a16(torch.eye(128, dtype=torch.bfloat16), packed, scales, (features, 128))
    assert torch.equal(exact.T, made.dense)


def test_the_table_says_what_an_unmeasured_choice_costs(tmp_path):
    choices = [Choice("linear bfloat16 64x32", 1, "linear: a", {"linear: a": 2e-6, "library": 1e-6}, {"linear: b": "wrong: off"}),
               Choice("linear bfloat16 64x32", 2, "linear: a", {"linear: a": 1e-6, "library": 1e-6})]
    console = Console(width=120, record=True, file=io.StringIO())
    show(console, choices, tmp_path / "gpu.json")
    text = " ".join(console.export_text().split())
    assert "64x32 1 1.0 library 2.00 x" in text and "2 1.0 linear: a 1.00 x" in text
    assert "At most 1.10 x in 1 of 2; the worst 2.00 x, linear bfloat16 64x32 at 1 rows" in text
    assert "refused 1 times: linear: b: wrong: off" in text and "gpu.json" in text
    show(console, [], tmp_path / "gpu.json")
    assert "nothing to choose" in console.export_text()


def test_the_command_keeps_what_later_processes_ask_for(tmp_path, monkeypatch, capsys):
    """All of it but the GPU: each shape of the model, the table, the file."""
    from ftops.numba_kernels import tuned
    clock = Clock()

    def fake_weight(format, N, K, dtype, device):
        assert (format, dtype, device) == ("int8", torch.bfloat16, torch.device("cuda", 0))
        dense = torch.randn(N, K)
        return Weight(lambda x, _: (f"linear_w8a16 bfloat16 {N}x{K}", {"library": clock.candidate(3.0), "linear: a": clock.candidate(2.0)}),
                      [(dense,)], dense)

    for name, value in {"is_available": lambda: True, "current_device": lambda: 0, "device": lambda _: nullcontext(),
                        "empty_cache": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(command, "random_weight", fake_weight)
    monkeypatch.setattr(command, "Stopwatch", lambda device: clock)
    monkeypatch.setattr(module, "measured_rows", lambda: (1, 2))
    monkeypatch.setattr(tuned, "gpu_of", lambda device: "NVIDIA H200")
    monkeypatch.setenv("FTOPS_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    tuned.forget()
    try:
        assert main(["tune", "--quant", "int8"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "linear_w8a16 bfloat16" in shown and "1.50 x" in shown and "At most 1.10 x in 0 of 8" in shown
        assert str(tmp_path / "tuned" / "nvidia_h200.json") in shown
        assert tuned.winner("linear_w8a16 bfloat16 512x256", 2, 0) == "linear: a" and tuned.known(0)[1] == 4
    finally:
        tuned.forget()


WRONG = [
    (["--quant", "int3"], "--quant is int3; allowed: none, int8, fp8, int4, w8a8"),
    (["--device", "cpu"], "--device is cpu; allowed: cuda"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=["quant", "device"])
def test_wrong_arguments(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_model_that_is_not_fused_is_refused(tmp_path):
    from transformers import OPTConfig
    OPTConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="OPTModel, whose linear layers stay PyTorch's own; fused are those of llama"):
        shapes_of(tmp_path)
    with pytest.raises(ValueError, match="MODEL is '/no/such', whose configuration could not be read"):
        shapes_of("/no/such")


@pytest.mark.gpu
def test_on_a_gpu_winners_are_kept_and_taken(tmp_path, monkeypatch):
    """Every candidate of every format runs and is right, and what won is what a launch then takes."""
    from ftops.numba_kernels import linear, tuned
    monkeypatch.setattr(tuned, "file_of", lambda gpu: tmp_path / "winners.json")  # and not the cache of kernels
    monkeypatch.setattr(module, "measured_rows", lambda: (1, 32, 2048))
    tuned.forget()
    try:
        choices, file = tune_model(command.EMBEDDED, ["none", "int8", "int4", "fp8", "w8a8"])
        assert file.is_file() and not any(choice.refused for choice in choices)
        assert {choice.problem.split()[0] for choice in choices} == {"linear", "linear_w8a16", "linear_w4a16", "linear_fp8", "linear_w8a8"}
        for choice in choices:
            assert tuned.winner(choice.problem, choice.rows, 0) == choice.winner and choice.loss >= 1
        x, weight = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16), torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
        won = tuned.winner(tuned.problem("linear", x.dtype, 512, 256), 1, 0)
        linear._takes.cache_clear()
        assert linear.serves(x, weight, 16) == won.startswith("linear: ")
    finally:
        monkeypatch.undo()
        tuned.forget()
        linear._takes.cache_clear()
        linear._kernel.cache_clear()


CALLS = {None: ops.linear, "int8": ops.linear_w8a16, "fp8": ops.linear_fp8, "w8a8": ops.linear_w8a8,
         "int4": lambda x, packed, scales, N: ops.linear_w4a16(x, packed, scales, (N, x.shape[-1]))}


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "rows"), [*((format, 64) for format in CALLS), ("fp8", 128), ("w8a8", 128)])
def test_on_a_gpu_the_op_runs_what_has_won(format, rows, tmp_path, monkeypatch):
    """Whatever has won: the op's result is that candidate's, bit for bit."""
    from ftops.numba_kernels import linear, linear_sm90_launch, linear_w4a16, tuned
    caches = (linear._takes, linear._kernel, linear_w4a16._takes, linear_w4a16._kernel, linear_sm90_launch._takes,
              linear_sm90_launch._picked)
    monkeypatch.setattr(tuned, "file_of", lambda gpu: tmp_path / "winners.json")  # and not the cache of kernels
    weight = module.random_weight(format, 256, 512, torch.bfloat16, torch.device("cuda"))
    x = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda")
    problem, candidates = weight.offer(x, *weight.tensors[0])
    try:
        for name, run in candidates.items():
            tuned.keep(0, {problem: {rows: name}})
            for cache in caches:
                cache.cache_clear()
            assert torch.equal(CALLS[format](x, *weight.tensors[0]), run(x, *weight.tensors[0])), name
        assert len(candidates) >= (4 if rows == 64 else 2)
    finally:
        monkeypatch.undo()
        tuned.forget()
        for cache in caches:
            cache.cache_clear()
