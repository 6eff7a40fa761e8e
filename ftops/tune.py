"""Which candidate is the fastest for a linear of what sizes, measured: what `ftops tune` does with shapes that it is told.

For each weight [N, K], format and number of rows of x every candidate (ops/candidates.py) is checked against the formula in float32, then
all that are right are timed in turns as ftops/timing.py does. FasterTransformer's GEMM autotuning, for more than one kind of kernel.
"""
from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ftops.ops import op_module
from ftops.ops.candidates import OF_FORMAT, Offer, Run, as_multiplied, measured_rows
from ftops.quant import FORMATS
from ftops.timing import Side, allowed_error, copies_for, error, median, one_round, prepare, rounds_for

CHECKED = 64  # rows of x whose result is compared with the formula


@dataclass
class Choice:
    """What was measured for one weight and number of rows of x. untuned: what is taken without a measurement; refused: candidates that
    cannot run or are wrong, and why."""

    problem: str
    rows: int
    untuned: str
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def winner(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def loss(self) -> float:
        """Time of the untuned choice over the winner's."""
        return self.seconds.get(self.untuned, float("inf")) / self.seconds[self.winner]


@dataclass(frozen=True)
class Weight:
    """A weight [N, K]: the tensors that the op takes, several times, the weight that they stand for, and their format."""

    offer: Offer
    tensors: list[tuple[Any, ...]]
    dense: torch.Tensor
    format: str | None = None


def random_weight(format: str | None, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Weight:
    """Normal numbers, quantised if format is one of `OF_FORMAT`, in as many copies as are more than the L2 holds."""
    dense = torch.randn(N, K, dtype=dtype, device=device) * K ** -0.5
    if format is None:
        tensors: tuple[Any, ...] = (dense,)
    else:
        qw = FORMATS[format].quantize(dense)
        dense, tensors = FORMATS[format].dequantize(qw), tuple(qw.tensors.values())
    size = sum(tensor.nbytes for tensor in tensors)
    copies = [tensors, *(tuple(tensor.clone() for tensor in tensors)
                         for _ in range(copies_for(size, size) - 1 if device.type == "cuda" else 0))]
    return Weight(OF_FORMAT[format], [(*copy, N) if format == "int4" else copy for copy in copies], dense, format)


def tune(weight: Weight, stopwatch: Callable[..., list[float]], rows: Sequence[int] | None = None,
         advance: Callable[..., None] = lambda: None, known: Container[tuple[str, int]] = ()) -> Iterator[Choice]:
    """Measures every number of rows that there is a choice for, but for problems and rows that are `known`: two formats may share one.

    advance() is called after each number.
    """
    for count in rows or measured_rows():
        x = torch.randn(count, weight.dense.shape[1], dtype=weight.dense.dtype, device=weight.dense.device)
        problem, candidates = weight.offer(x, *weight.tensors[0])
        if len(candidates) > 1 and (problem, count) not in known:
            yield measured(problem, candidates, x, weight, stopwatch)
        advance()


@torch.inference_mode()
def measured(problem: str, candidates: dict[str, Run], x: torch.Tensor, weight: Weight, stopwatch: Callable[..., list[float]]) -> Choice:
    """Raises RuntimeError if no candidate is right."""
    inputs = [(x.clone() if place else x, *tensors) for place, tensors in enumerate(weight.tensors)]
    choice, sides = Choice(problem, len(x), next(iter(candidates))), []
    seen = as_multiplied(weight.format, x[:CHECKED], len(x))
    expected = op_module("linear").reference(seen, weight.dense.float(), None, None, None)
    errors = {}
    for name, run in candidates.items():
        try:
            errors[name] = error(run(*inputs[0])[:CHECKED], expected)
        except RuntimeError as reason:  # a configuration that this GPU or driver refuses
            choice.refused[name] = f"{type(reason).__name__}: {str(reason).splitlines()[0][:100]}"
    allowed = allowed_error(expected, x.dtype, [error(F.linear(seen.to(x.dtype), weight.dense), expected)])
    for name, found in errors.items():
        if found <= allowed:
            sides.append(Side(name, lambda given, run=candidates[name]: run(*given)))
        else:
            choice.refused[name] = f"wrong: off by {found:.2g}, {allowed:.2g} allowed"
    if not sides:
        raise RuntimeError(f"tune: no candidate of {problem} at {len(x)} rows is right: {choice.refused}")
    for side in sides:
        prepare(side, inputs, x.device)
    for turn in range(rounds_for(sides, stopwatch)):
        one_round(sides, turn, len(inputs), stopwatch)
    choice.seconds = {side.name: median(side) for side in sides}
    return choice


def winners(choices: Sequence[Choice]) -> dict[str, dict[int, str]]:
    """By problem and rows, as they are kept."""
    found: dict[str, dict[int, str]] = {}
    for choice in choices:
        found.setdefault(choice.problem, {})[choice.rows] = choice.winner
    return found

