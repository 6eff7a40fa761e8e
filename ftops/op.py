"""How an op is registered with PyTorch. The only file that says torch.library.

`Library.define` + `impl` + `register_fake` costs 2.6 us a call on the host; `torch.library.custom_op` costs 9.6.
An op file calls `register` once and keeps the handle that it returns (`torch.ops.ftops.<name>.default`).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Held for the life of the process: dropping a Library unregisters its ops.
LIBRARY = torch.library.Library("ftops", "FRAGMENT")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Registers `schema` (e.g. "rms_norm(Tensor x, ...) -> Tensor") under the namespace ftops and returns its handle.

    cpu, cuda: implementations for tensors on those devices. fake: the same signature, on shapes and dtypes alone, for tracing.
    Ops have no derivative: called on tensors that require grad while grad mode is on, they raise (see `require_no_grad`).
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"ftops::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.ftops, name).default


def require(condition: bool, op: str, argument: str, got: object, allowed: str) -> None:
    """Raises ValueError naming the op, the argument, what it was and what is allowed."""
    if not condition:
        raise ValueError(f"{op}: {argument} is {got}; allowed: {allowed}")


def require_dtype(op: str, **tensors: torch.Tensor) -> None:
    """Every tensor must have one of float32, float16, bfloat16, and all the same."""
    first = next(iter(tensors.values())).dtype
    for argument, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {argument}.dtype is {tensor.dtype}; allowed: float32, float16, bfloat16")
        if tensor.dtype is not first:
            raise ValueError(f"{op}: {argument}.dtype is {tensor.dtype} but {next(iter(tensors))}.dtype is {first}; "
                             f"convert one of them, {argument}.to({first})")


def require_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor that is given must lie on one device, a CPU or a CUDA one."""
    given = {argument: tensor for argument, tensor in tensors.items() if tensor is not None}
    argument, first = next(iter(given.items()))
    if first.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{op}: {argument} is on {first.device}; allowed: cpu and cuda")
    for other, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(f"{op}: {other} is on {tensor.device} but {argument} is on {first.device}; move one of them")


def require_no_grad(op: str, *tensors: torch.Tensor | None) -> None:
    """The ops serve inference. A gradient that would be lost is refused instead."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: an input requires grad and ftops ops have no derivative; "
                           "call under torch.no_grad() or torch.inference_mode(), or detach the inputs")


@dataclass(frozen=True)
class Case:
    """One sample call of an op, for opcheck, the reference tests, the GPU tests and the benchmarks.

    make(device, dtype) returns the positional and keyword arguments of the public function, drawn from `torch.manual_seed`.
    """

    name: str
    make: Callable[[torch.device, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]
    dtypes: Sequence[torch.dtype] = field(default=DTYPES)

    def __str__(self) -> str:
        return self.name
