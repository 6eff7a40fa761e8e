"""Every (op, case) there is, and what a public function hands to PyTorch."""
from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ftops
from ftops.op import DTYPES, Case
from ftops.ops import OPS, op_module

CASES = [pytest.param(name, case, id=f"{name}-{case}") for name in OPS for case in op_module(name).cases()]
CASES_AND_DTYPES = [pytest.param(name, case, dtype, id=f"{name}-{case}-{str(dtype)[6:]}")
                    for name in OPS for case in op_module(name).cases() for dtype in case.dtypes]
# Each case in one of its dtypes in turn, where these matter little; an op's first case in all.
IN_TURN = [pytest.param(name, case, dtype, id=f"{name}-{case}-{str(dtype)[6:]}")
           for name in OPS for number, case in enumerate(op_module(name).cases())
           for dtype in (case.dtypes if number == 0 else [case.dtypes[number % len(case.dtypes)]])]
DTYPE_IDS = {"argvalues": DTYPES, "ids": [str(dtype)[6:] for dtype in DTYPES]}


def case(name: str, which: str) -> Case:
    return next(case for case in op_module(name).cases() if case.name == which)


def call(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    return getattr(ftops.ops, name)(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Collects the ftops handles that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ftops":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def handle_calls(name: str, args: tuple, kwargs: dict[str, Any]) -> list[tuple[torch._ops.OpOverload, tuple]]:
    with Recorder() as recorder:
        call(name, args, kwargs)
    assert recorder.calls, f"{name} reached no ftops op"
    return recorder.calls


def reference_of(module: ModuleType, handle: torch._ops.OpOverload) -> Any:
    """`reference`, or `reference_residual` for the handles that add one."""
    return module.reference_residual if "add_" in handle.name() else module.reference
