"""Every op, at the shapes that models give it, beside what else does the same on this machine."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import attention_problems, linear_problems, row_problems
from bench.method import CLOCK
from bench.problem import DTYPE, Problem, from_cases, nbytes
from bench.record import OURS, Record
from ftops.ops import OPS
from ftops.timing import Side, allowed_error, copies_for, error

SUITES = {"attention": attention_problems.PROBLEMS, "linear": linear_problems.PROBLEMS, "ops": row_problems.PROBLEMS}
MEASURED = {problem.op for problems in SUITES.values() for problem in problems}
SUITES["ops"] = [*SUITES["ops"], *(from_cases(op) for op in OPS if op not in MEASURED)]
WRONG = 0.05  # of the largest value: more than any rounding of what is right costs
PROBLEMS = [(suite, problem) for suite, problems in SUITES.items() for problem in problems]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("suite", "problem"), PROBLEMS, ids=[f"{suite}-{problem}" for suite, problem in PROBLEMS])
@torch.inference_mode()
def test_op(suite: str, problem: Problem, measure: Callable[..., Record], device: torch.device) -> None:
    inputs = [problem.make(device)]
    copies = copies_for(problem.bytes, nbytes(inputs[0])) if device.type == "cuda" else 1
    inputs += [problem.make(device) for _ in range(copies - 1)]
    sides = [Side(name, run) for name, run in problem.sides.items()]
    check(problem, sides, inputs[0])
    measure(Record(suite, problem.group or problem.op, problem.name, {}, bytes=problem.bytes, flops=problem.flops), sides, inputs)


def check(problem: Problem, sides: list[Side], inputs: Any) -> None:
    """The output that is timed is right: no further from the exact one than twice the nearest peer's, two roundings, its format's cost.

    A peer that cannot run on this device or in this version is a result too, and so is one whose answer is wrong; ours must do both.
    """
    expected = problem.expected(inputs)
    largest = float(expected.abs().max())
    for side in sides:
        try:
            side.error = error(problem.view(side.run(inputs), inputs), expected)
        except Exception as reason:
            if side.name == OURS:
                raise
            side.missing = f"{type(reason).__name__}: {str(reason).partition(chr(10))[0][:100]}"
            continue
        if side.name != OURS and side.error > (WRONG + problem.format_error) * largest:
            side.missing, side.error = f"wrong by {side.error / largest:.2g} of the largest value", None
    allowed = allowed_error(expected, DTYPE, [side.error for side in sides if side.name != OURS and side.error is not None])
    allowed += problem.format_error * largest
    assert sides[0].error <= allowed
