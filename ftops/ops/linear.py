"""A linear layer with what follows it, and the RMS norm before it where one is given: y = act(x W^T + bias) + residual.

act may be gated, swiglu and its like: W is then gate and up, one behind the other, and y = act(gate) * up + residual has N / 2 columns.
Few rows of x read the weights at memory speed in one kernel of ours; more rows, float32 and weights whose rows do not start on 16 bytes
go to the library (cuBLAS on a GPU), activation and residual after it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ftops.op import Case, check_tensors, invalid, register, straight
from ftops.ops.bias_activation import ACTIVATIONS, bias_activation
from ftops.ops.gated_activation import GLU, gated_activation
from ftops.ops.gated_activation import reference as gated_reference
from ftops.ops.rms_norm import RMS_NORM
from ftops.ops.rms_norm import reference as rms_reference
from ftops.samples import randn

MAX_ROWS = 16  # of x that the kernel is for
# What cuBLASLt does in the end of its product, behind the bias. 2048 x 4096 -> 16384 and gelu_tanh took an H100 447 us, and takes 421.
# Its gelu is that one. For the exact one it would do on average, but below -3, where little is left, be off by up to a tenth.
EPILOGUES = "relu", "gelu_tanh"


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, residual: torch.Tensor | None,
              norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
    n = reference_normed(x, norm, eps)
    wide = n.dtype
    y = F.linear(n, weight.to(wide), None if bias is None else bias.to(wide))
    if activation in GLU:
        y = gated_reference(y, GLU[activation])
    elif activation:
        y = ACTIVATIONS[activation](y)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def normed(x: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x, by its RMS norm where one is given."""
    return x if norm is None else RMS_NORM(x, norm, eps, 0.0)


def after_norm(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What an op does of all its arguments, the last two being the norm's, with `run`, which knows no norm."""
    def call(x: torch.Tensor, *given: Any) -> torch.Tensor:
        *rest, norm, eps = given
        return run(normed(x, norm, eps), *rest)
    return call


def reference_normed(x: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x in float32 or wider, by its RMS norm where one is given."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if norm is None else rms_reference(wide, norm, eps, 0.0)


def library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None,
            residual: torch.Tensor | None) -> torch.Tensor:
    """By the library's matmul, which on a GPU also does some activations; the kernel of another adds the bias there."""
    late = activation in ACTIVATIONS and x.is_cuda
    if late and bias is not None and x.dtype is not torch.float32 and activation in EPILOGUES:
        y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=activation != "relu")
        return followed(y.view(*x.shape[:-1], -1), None, None, residual)
    return followed(F.linear(x, weight, None if late else bias), bias if late else None, activation, residual).contiguous()


def followed(y: torch.Tensor, bias: torch.Tensor | None, activation: str | None, residual: torch.Tensor | None) -> torch.Tensor:
    """A product and what follows it."""
    if activation in ACTIVATIONS:
        y = bias_activation(y, bias, activation)
    elif bias is not None:
        y = y + bias
    if activation in GLU:
        y = gated_activation(y, GLU[activation])
    return y if residual is None else y + residual


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.linear import serves
    from ftops.numba_kernels.linear_sm90_launch import serves as serves_many
    few_rows, many_rows = make_few_rows(), make_many_rows()

    def many(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        return many_rows(x, weight, None, *rest) if serves_many(x, weight) else library(x, weight, *rest)
    others = after_norm(many)

    def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        return few_rows(x, weight, None, *rest) if serves(x, weight, MAX_ROWS) else others(x, weight, *rest)
    return linear


def make_few_rows() -> Callable[..., torch.Tensor]:
    """few_rows(x, weight, scales, bias, activation, residual, norm, eps): by the kernel that reads weights of 16 or 8 bits once."""
    from ftops.numba_kernels.linear import GATED_ROWS, NORM_ROWS, launch
    run = with_norm(with_gate(launch, GATED_ROWS), NORM_ROWS)
    return lambda x, weight, *rest: run(weight.shape[0], x, weight, *rest)


def with_norm(run: Callable[..., torch.Tensor], most: int) -> Callable[..., torch.Tensor]:
    """run(N, x, ..., norm, eps) of a kernel that knows a norm of up to `most` rows; else it is a launch before."""
    from ftops.numba_kernels.linear_tile import normalises

    def call(N: int, x: torch.Tensor, *given: Any) -> torch.Tensor:
        *rest, norm, eps = given
        if norm is None or not normalises(x, most):
            return run(N, normed(x, norm, eps), *rest)
        return run(N, x, *rest, norm=norm, eps=eps)
    return call


def make_many_rows() -> Callable[..., torch.Tensor]:
    """many_rows(x, weight, scales, bias, activation, residual): by the kernel for many rows on Hopper."""
    from ftops.numba_kernels.linear_sm90_launch import GATED_ROWS, launch
    run = with_gate(launch, GATED_ROWS)
    return lambda x, weight, *rest: run(weight.shape[0], x, weight, *rest)


def make_narrow(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """narrow(x, smooth, values, scales, bias, activation, residual, norm, eps): x, by its norm and by smooth where there are, is rounded to
    values' `dtype`, a scale a row, in one kernel, and multiplied by the one for many rows on Hopper. picked: as its launch has it."""
    from ftops.numba_kernels.linear_sm90_launch import GATED_ROWS, launch_narrow
    from ftops.numba_kernels.quantise_rows import launch as quantise
    run = with_gate(launch_narrow, GATED_ROWS)

    def narrow(x: torch.Tensor, smooth: torch.Tensor | None, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
               activation: str | None, residual: torch.Tensor | None, norm: torch.Tensor | None = None, eps: float = 0.0,
               **picked: Any) -> torch.Tensor:
        x8, x_scales = quantise(x, dtype, smooth, norm, eps)
        y = run(values.shape[0], x8, x_scales, x.dtype, values, scales, bias, activation, residual, **picked)
        return y.view(*x.shape[:-1], -1)
    return narrow


def with_gate(launch: Callable[..., torch.Tensor], multiple: int) -> Callable[..., torch.Tensor]:
    """run(N, ..., bias, activation, residual): `launch` where it knows the activation. Its gate and up are a multiple of `multiple` rows
    together; of others the gate is a launch behind it."""
    def run(N: int, *given: Any, **picked: Any) -> torch.Tensor:
        *operands, bias, activation, residual = given
        if activation not in GLU:
            return launch(*given, **picked)
        if N % multiple:
            return followed(launch(*operands, bias, None, None, **picked), None, activation, residual)
        return launch(*operands, bias, GLU[activation], residual, gated=True, **picked)
    return run


def fake(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Of any linear op whose weights [N, ...] come second, and activation, residual, norm and eps last."""
    return torch.empty((*x.shape[:-1], columns(weight.shape[0], rest[-4])), dtype=x.dtype, device=x.device)


def columns(N: int, activation: str | None) -> int:
    """Of the result."""
    return N // 2 if activation in GLU else N


LINEAR = register("linear(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, Tensor? norm, float eps) -> Tensor",
                  cpu=after_norm(library), cuda=_cuda, fake=fake)
_linear = straight(LINEAR)


def check_beside_weight(op: str, x: torch.Tensor, N: int, K: int, bias: torch.Tensor | None, activation: str | None,
                        residual: torch.Tensor | None, norm: torch.Tensor | None) -> None:
    """What a linear op is given beside its weights [N, K], in whatever format they are."""
    shape = x.shape
    if not shape or shape[-1] != K:
        raise invalid(op, "x.shape", tuple(shape), f"[..., {K}], the weight's last dimension")
    if bias is not None and bias.shape != (N,):
        raise invalid(op, "bias.shape", tuple(bias.shape), f"({N},), the weight's first dimension")
    if activation is not None and activation not in ACTIVATIONS and activation not in GLU:
        raise invalid(op, "activation", repr(activation), f"None, {', '.join((*ACTIVATIONS, *GLU))}")
    if activation in GLU and N % 2:
        raise invalid(op, "activation", repr(activation), f"one without a gate, since the weight's {N} rows are not gate and up")
    if norm is not None and norm.shape != (K,):
        raise invalid(op, "norm.shape", tuple(norm.shape), f"({K},), x's last dimension")
    if residual is not None and residual.shape != (*shape[:-1], columns(N, activation)):
        raise invalid(op, "residual.shape", tuple(residual.shape), f"{(*shape[:-1], columns(N, activation))}, the result's shape")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str | None = None,
           residual: torch.Tensor | None = None, norm: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """act(x W^T + bias) + residual for x[..., K], weight[N, K], bias[N] and residual[..., N]; the result [..., N] is contiguous.

    activation: None, silu, gelu, gelu_tanh, relu or quick_gelu; or swiglu, geglu, geglu_tanh, reglu or quick_geglu, which are act of the
    first half of the columns times the second: result and residual are then [..., N / 2]. norm[K]: x is first what
    `ops.rms_norm(x, norm, eps)` gives, on a GPU in the same pass for up to 16 rows of x in bfloat16. All of one dtype (float32, float16,
    bfloat16; sums in float32), any strides. On a GPU, 16-bit weights with up to 16 rows of x are read at memory speed if K and the rows'
    stride are multiples of 8. Raises ValueError.
    """
    check_tensors("linear", x=x, weight=weight, bias=bias, residual=residual, norm=norm)
    if weight.dim() != 2:
        raise invalid("linear", "weight.shape", tuple(weight.shape), "[N, K]")
    check_beside_weight("linear", x, *weight.shape, bias, activation, residual, norm)
    return _linear(x, weight, bias, activation, residual, norm, eps)


def cases() -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], N: int, **options: Any) -> Case:
        def make(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            K = shape[-1]
            given: dict[str, Any] = {"activation": options.get("activation")}
            if options.get("residual"):
                given["residual"] = randn((*shape[:-1], columns(N, given["activation"])), device, dtype)
            if options.get("norm"):
                given |= {"norm": randn((K,), device, dtype), "eps": 1e-2}
            bias = randn((N,), device, dtype) if options.get("bias") else None
            return (randn(shape, device, dtype), randn((N, K), device, dtype, K ** -0.5), bias), given
        return Case(name, make)

    yield case("row", (1, 1, 4096), 200)
    yield case("batch", (8, 1, 1024), 256, bias=True)
    yield case("most", (16, 2200), 64, residual=True)
    yield case("everything", (3, 5, 768), 96, bias=True, activation="gelu", residual=True)
    yield case("many", (40, 512), 200, bias=True, activation="silu", residual=True)
    yield case("many_gelu", (2, 20, 512), 200, bias=True, activation="gelu")
    yield case("many_gelu_tanh", (40, 512), 200, bias=True, activation="gelu_tanh", residual=True)
    yield case("many_relu", (40, 512), 200, bias=True, activation="relu")
    yield case("gated", (1, 1, 4096), 96, activation="swiglu")
    yield case("gated_everything", (9, 520), 112, bias=True, activation="geglu", residual=True)
    yield case("gated_odd", (3, 64), 42, bias=True, activation="reglu")
    yield case("gated_many", (40, 512), 96, bias=True, activation="geglu_tanh", residual=True)
    yield case("tile_ends", (9, 1, 1032), 33)
    yield case("norm", (1, 1, 4096), 200, norm=True)
    yield case("norm_gated", (8, 1, 1032), 96, norm=True, activation="swiglu")
    yield case("norm_everything", (16, 520), 112, norm=True, bias=True, activation="geglu", residual=True)
    yield case("norm_many", (40, 512), 64, norm=True, residual=True)
    yield case("odd", (2, 111), 7, bias=True)
    yield case("vector", (256,), 48, activation="relu")
    yield case("empty", (0, 64), 8, bias=True)
    yield Case("columns", lambda device, dtype: (
        (randn((4, 512), device, dtype)[:, 128:384], randn((48, 512), device, dtype, 0.1)[:, 64:320]), {}))
    yield Case("transposed", lambda device, dtype: ((randn((256, 4), device, dtype).T, randn((256, 48), device, dtype, 0.1).T), {}))
