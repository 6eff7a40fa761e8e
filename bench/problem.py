"""What is measured of an op: its inputs, the implementations that are compared, and what the right output is."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import ftops
from bench.record import OURS
from ftops.ops import op_module

DTYPE = torch.bfloat16
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Problem:
    """make(device) draws one set of inputs; each side computes from it, the first being ours.

    expected(inputs) is computed in float32, of that part of the output alone that view(output, inputs) picks, so that it can be paid for.
    bytes that must move and flops that must be done, whoever does it. format_error: what the op's number format may cost, of the largest
    value. group: the heading under which it is shown, if not the op.
    """

    op: str
    name: str
    make: Callable[[torch.device], SimpleNamespace]
    sides: dict[str, Run]
    expected: Run
    view: Callable[[Any, Any], torch.Tensor]
    bytes: float
    flops: float = 0.0
    format_error: float = 0.0
    group: str = ""

    def __str__(self) -> str:
        return f"{self.group or self.op}-{self.name}".replace(" ", "_")


def small_sizes() -> bool:
    """Without a GPU the same problems are measured at sizes that a CPU finishes in a minute."""
    return not torch.cuda.is_available()


def randn(*shape: int, device: torch.device, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32 if dtype.itemsize == 1 else dtype).to(dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op's formula, as torch.compile fuses it for these very shapes; compiled on the first call."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def from_cases(op: str) -> Problem:
    """For an op whose shapes nobody has chosen: the largest of its cases(), against the CPU's result alone."""
    def make(device: torch.device, case: Any) -> SimpleNamespace:
        args, kwargs = case.make(device, DTYPE)
        return SimpleNamespace(args=args, kwargs=kwargs)

    def run(inputs: SimpleNamespace) -> Any:
        return getattr(ftops.ops, op)(*inputs.args, **inputs.kwargs)

    cases = [case for case in op_module(op).cases() if DTYPE in case.dtypes]
    sizes = [nbytes(make(torch.device("cpu"), case)) for case in cases]
    largest = max(range(len(cases)), key=sizes.__getitem__)
    def expected(inputs: SimpleNamespace) -> torch.Tensor:
        on_cpu = SimpleNamespace(**tree_map_only(torch.Tensor, torch.Tensor.cpu, vars(inputs)))
        return first(run(on_cpu)).to(first(inputs.args).device)

    return Problem(op, str(cases[largest]), lambda device: make(device, cases[largest]), {OURS: run}, expected,
                   lambda out, _: first(out), sizes[largest])


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def nbytes(inputs: SimpleNamespace) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(vars(inputs)) if isinstance(leaf, torch.Tensor))
