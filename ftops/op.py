"""How an op is registered with PyTorch. The only file that says torch.library.

`Library.define` + `impl` + `register_fake` costs the host 2.6 us a call and `torch.library.custom_op` 9.6 (docs/design.md, 2). An op
file calls `register` once and keeps the handle that it returns (`torch.ops.ftops.<name>.default`), for graphs, and what `straight`
makes of it, for its public function.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Held for the life of the process: dropping a Library unregisters its ops.
LIBRARY = torch.library.Library("ftops", "FRAGMENT")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# FTOPS_DEBUG=1: public functions also check what only the device knows, and wait for it.
DEBUG = os.environ.get("FTOPS_DEBUG", "0") != "0"
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(schema: str, *, cpu: Callable[..., Any], cuda: Callable[[], Callable[..., Any]],
             fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Registers `schema` (e.g. "rms_norm(Tensor x, ...) -> Tensor") under the namespace ftops and returns its handle.

    cpu: the implementation for tensors there. cuda: gives the one for a GPU; asked once, when a tensor on a GPU first comes, since it
    imports Numba. fake: the same signature, on shapes and dtypes alone, for tracing.
    Ops have no derivative: called on tensors that require grad while grad mode is on, their public functions raise (`check_tensors`).
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _IMPLEMENTATIONS[name] = {"cpu": cpu, "cuda": _at_first_call(cuda)}
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, _IMPLEMENTATIONS[name]["cuda"], "CUDA")
    torch.library.register_fake(f"ftops::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.ftops, name).default


def straight(handle: torch._ops.OpOverload) -> Callable[..., Any]:
    """`handle`, past PyTorch's dispatcher where nobody listens there. The result is the same, since ops have no derivative."""
    implementations = _IMPLEMENTATIONS[handle._schema.name.removeprefix("ftops::")]

    def call(x: torch.Tensor, *rest: Any) -> Any:
        if heard(x):
            return handle(x, *rest)
        return implementations.get(x.device.type, handle)(x, *rest)

    return call


def heard(x: torch.Tensor) -> bool:
    """Whether somebody listens at PyTorch's dispatcher to what is done with x: tracing, a dispatch mode, functorch, a tensor subclass."""
    return (torch.compiler.is_compiling() or type(x) is not torch.Tensor or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None)


def _at_first_call(give: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    found = None

    def call(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = give()
        return found(*args)

    return call


def invalid(op: str, argument: str, got: object, allowed: str) -> ValueError:
    """The error of an op's public function: the argument, what it was and what is allowed.

    Written `if <wrong>: raise invalid(...)`: a call with good arguments formats no message, and tracing one fixes no size.
    """
    return ValueError(f"{op}: {argument} is {got}; allowed: {allowed}")


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """The floating tensors of an op: one dtype out of DTYPES, one device, and no gradient that would be lost. None is skipped."""
    grad = torch.is_grad_enabled()
    first = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise invalid(op, argument, f"a {type(tensor).__name__}", "a tensor")
        if first is None:
            first, dtype, device = argument, tensor.dtype, tensor.device
            if dtype not in DTYPES:
                raise invalid(op, f"{argument}.dtype", dtype, "float32, float16, bfloat16")
            if not (tensor.is_cuda or tensor.is_cpu or tensor.is_meta):
                raise invalid(op, f"{argument}.device", device, "cpu and cuda")
        elif tensor.dtype is not dtype:
            raise ValueError(f"{op}: {argument}.dtype is {tensor.dtype} but {first}.dtype is {dtype}; "
                             f"convert one of them, {argument}.to({dtype})")
        elif tensor.device != device:
            raise ValueError(f"{op}: {argument} is on {tensor.device} but {first} is on {device}; move one of them")
        if grad and tensor.requires_grad:
            raise _needs_grad(op, argument)


def check_beside(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """The other tensors of an op, of any dtype: on `device`, and no gradient that would be lost. None is skipped."""
    grad = torch.is_grad_enabled()
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise invalid(op, argument, f"a {type(tensor).__name__}", "a tensor")
        if tensor.device != device:
            raise ValueError(f"{op}: {argument} is on {tensor.device} but the first argument is on {device}; move one of them")
        if grad and tensor.requires_grad:
            raise _needs_grad(op, argument)


def debugging() -> bool:
    """Whether values on the device may be looked at: FTOPS_DEBUG=1, outside of tracing and of the capture of a CUDA graph."""
    return DEBUG and not torch.compiler.is_compiling() and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _needs_grad(op: str, argument: str) -> RuntimeError:
    return RuntimeError(f"{op}: {argument} requires grad and ftops ops have no derivative; "
                        "call under torch.no_grad() or torch.inference_mode(), or detach it")


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
