"""The parts of the method that need no GPU: whose time is counted, and which output may be timed at all."""
from __future__ import annotations

import pytest
import torch

from bench import attention_problems, row_problems
from bench.method import CLOCK, one_round
from bench.problem import from_cases
from bench.record import OURS
from bench.test_ops import PROBLEMS as BY_SUITE
from bench.test_ops import check
from ftops import timing
from ftops.ops import OPS
from ftops.timing import Side, allowed_error, copies_for, error, order

PROBLEMS = [problem for _, problem in BY_SUITE]


def test_inputs_outgrow_the_cache_or_are_many():
    assert copies_for(moved=1e9, held=1e9) == 2
    assert copies_for(moved=10e6, held=10e6) * 10e6 >= 2 * timing.L2_BYTES
    assert copies_for(moved=8e3, held=8e3) == timing.COPIES[1]
    assert copies_for(moved=8e3, held=1e9) == 8  # a small part of a large cache: memory is what there is
    assert copies_for(moved=1e11, held=1e11) == 1


def test_no_side_always_runs_behind_the_same():
    sides = [Side(name, print) for name in "abc"]
    assert ["".join(side.name for side in order(sides, turn)) for turn in range(4)] == ["abc", "bca", "cab", "abc"]


def test_a_round_measures_each_side_once_and_advances_the_clock_by_ours():
    """Whatever the order, each time goes to the side that took it: here the k-th side takes k seconds for two calls."""
    sides = [Side(name, print) for name in (OURS, "b", "c")]
    for place, side in enumerate(sides, 1):
        side.replay = lambda place=place: float(place)
    before = CLOCK()
    for turn in range(3):
        one_round(sides, turn, 2, lambda replays: [replay() for replay in replays])
    assert [side.seconds for side in sides] == [[0.5] * 3, [1.0] * 3, [1.5] * 3]
    assert CLOCK() - before == pytest.approx(1.5)


def test_every_call_runs_on_inputs_of_its_own():
    seen: list[int] = []
    side = Side("a", seen.append)
    timing.prepare(side, [1, 2, 3], torch.device("cpu"))
    side.replay()
    assert seen == [1, 2, 3]


def test_rounds_fit_the_time_there_is():
    slow, quick = (lambda seconds: lambda replays: [seconds for _ in replays])(1.0), lambda replays: [1e-6 for _ in replays]
    assert timing.rounds_for([Side("a", print)], slow) == timing.ROUNDS[0]
    assert timing.rounds_for([Side("a", print)], quick) == timing.ROUNDS[1]


def test_error_does_not_overlook_nan():
    assert error(torch.tensor([1.0, float("nan")]), torch.zeros(2)) == float("inf")
    assert error(torch.tensor([1.0, -3.0]), torch.zeros(2)) == 3.0


def test_allowed_error_follows_the_best_peer():
    expected = torch.tensor([8.0])
    rounding = 2 * 8.0 * torch.finfo(torch.bfloat16).eps
    assert allowed_error(expected, torch.bfloat16, [0.5, 0.1]) == pytest.approx(0.2 + rounding)
    assert allowed_error(expected, torch.bfloat16, []) == pytest.approx(rounding)


@torch.inference_mode()
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problems_are_right(problem):
    """What is expected is what the op's CPU kernel gives, and each peer computes the same thing."""
    inputs = problem.make(torch.device("cpu"))
    sides = [Side(name, run) for name, run in problem.sides.items() if not name.startswith("torch.compile")]
    check(problem, sides, inputs)
    assert [side.missing for side in sides] == [None] * len(sides)
    scale = float(problem.expected(inputs).abs().max())
    assert all(side.error <= 0.05 * scale for side in sides)


@torch.inference_mode()
@pytest.mark.parametrize("wrong", [lambda out: out * 1.1, lambda out: out * float("nan"), torch.zeros_like], ids=["scaled", "nan", "zero"])
def test_a_wrong_kernel_gets_no_number(wrong):
    problem = next(problem for problem in PROBLEMS if problem.op == "attention")
    sides = [Side(name, run) for name, run in problem.sides.items()]
    sides[0].run = lambda inputs: wrong(problem.sides[OURS](inputs))
    with pytest.raises(AssertionError):
        check(problem, sides, problem.make(torch.device("cpu")))


@torch.inference_mode()
def test_a_peer_that_cannot_run_is_missing_and_ours_is_an_error():
    def cannot(inputs: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    problem = next(problem for problem in PROBLEMS if problem.op == "attention")
    inputs = problem.make(torch.device("cpu"))
    sides = [Side(OURS, problem.sides[OURS]), Side("peer", cannot)]
    check(problem, sides, inputs)
    assert sides[1].missing == "RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="no such kernel"):
        check(problem, [Side(OURS, cannot)], inputs)


def test_every_op_is_measured():
    assert {problem.op for problem in PROBLEMS} == set(OPS)


def test_names_tell_problems_apart():
    """A later run renews the record of the same name."""
    names = [(suite, problem.group or problem.op, problem.name) for suite, problem in BY_SUITE]
    assert len(set(names)) == len(names)


def test_an_op_without_shapes_of_its_own_is_measured_on_its_largest_case():
    problem = from_cases("gated_activation")
    assert problem.name == "wide"
    inputs = problem.make(torch.device("cpu"))
    torch.testing.assert_close(problem.view(problem.sides[OURS](inputs), inputs), problem.expected(inputs))


def test_bytes_and_operations_of_known_problems():
    """64 sequences of 2048 tokens, 32 heads of 128: 2.15 GB of keys and values, in the 478 us that cuDNN takes 4.49 TB/s."""
    assert attention_problems.decode(64, 32, 32, 2048, 128, None, torch.bfloat16).bytes / 478e-6 == pytest.approx(4.49e12, rel=0.01)
    assert attention_problems.decode(64, 32, 8, 4096, 128, None, torch.int8).bytes == pytest.approx(0.537e9, rel=0.01)
    assert attention_problems.prefill(4, 16, 16, 4096, 128, False).flops == 2 * 2 * 4 * 16 * 4096 ** 2 * 128
    assert attention_problems.prefill(4, 16, 16, 4096, 128, True).flops == 2 * 4 * 16 * 4096 ** 2 * 128
    assert attention_problems.chunk(1, 2, 1, 100, 64, 3).flops == 4 * 2 * (98 + 99 + 100) * 64
    assert row_problems.norm("rms_norm", 65536, 4096, True).bytes == 4 * 65536 * 4096 * 2
