"""Linear layers at the shapes of models: each weight format against cuBLAS in bfloat16, PyTorch's own products of that format, and those of
gemlite and torchao if they are installed."""
from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.peers import built, compiled_linear, gemlite_int4, gemlite_w8a8, installed, torchao_int8
from bench.problem import DTYPE, Problem, Run, randn, small_sizes
from bench.record import OURS
from ftops import ops
from ftops.ops.linear import reference
from ftops.packing import dequantise_4bit, unpack_4bit, unpack_groups

CHECKED = 64  # rows of which an exact result is computed
GROUP = 128
# N, K: q, k, v of Llama-3.1-8B, its output, gate and up, down; GPT-J's q, k, v, up, down; a 70B model's q, k, v, output, gate and up, down
# at 8 GPUs; an odd one
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (12288, 4096), (16384, 4096), (4096, 16384), (1280, 8192), (8192, 1024),
          (7168, 8192), (8192, 3584), (5000, 2064)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 8192]
# gemlite and torchao compile a kernel for each problem and time tens of it, but for gemlite's at these, which it comes tuned for.
COMPILED_SHAPES, COMPILED_ROWS = SHAPES[:4], (1, 16, 32, 128, 256, 2048)
GEMLITE, TORCHAO = ("linear_w4a16", "linear_w8a8"), ("linear_w8a16",)
FP8 = torch.float8_e4m3fn
# Bytes a weight is read in; what rounding activations to the format costs, of the largest value: measured 0.01 and 0.02 on normal data.
READ = {"linear": 2.0, "linear_w8a16": 1.0, "linear_fp8": 1.0, "linear_w8a8": 1.0, "linear_w4a16": 0.5 + 2 / GROUP}
FORMAT_ERROR = {"linear_fp8": 0.05, "linear_w8a8": 0.025}

if small_sizes():
    SHAPES, ROWS = [(768, 512)], [1, 96]


def weights(op: str, N: int, K: int, device: torch.device) -> SimpleNamespace:
    """Random bits, scaled so that the results are near 1, and the dense weight that they stand for."""
    if op == "linear":
        return SimpleNamespace(dense=randn(N, K, device=device) * K ** -0.5)
    if op == "linear_w4a16":
        tiles, groups = -(-N // 32), -(-K // GROUP)
        packed = torch.randint(-2 ** 31, 2 ** 31, (tiles, groups * GROUP // 32, 32, 4), device=device, dtype=torch.int32)
        scales = ((torch.rand(tiles, groups, 8, 4, device=device) + 0.5) * K ** -0.5 / 4).to(DTYPE)
        return SimpleNamespace(packed=packed, scales=scales, dense=dequantise_4bit(packed, scales, N, K, DTYPE))
    if op == "linear_fp8":
        values, size = (randn(N, K, device=device) * 100).clamp(-448, 448).to(FP8), 100
    else:
        values, size = torch.randint(-127, 128, (N, K), device=device, dtype=torch.int8), 75
    scales = (torch.rand(N, device=device) + 0.5) / size * K ** -0.5
    return SimpleNamespace(values=values, scales=scales, dense=(values.float() * scales[:, None]).to(DTYPE))


def ours(op: str, N: int, K: int) -> Run:
    if op == "linear":
        return lambda i: ops.linear(i.x, i.dense)
    if op == "linear_w4a16":
        return lambda i: ops.linear_w4a16(i.x, i.packed, i.scales, (N, K))
    function = getattr(ops, op)
    return lambda i: function(i.x, i.values, i.scales)


def compiles(package: str, ops: tuple[str, ...], op: str, rows: int, N: int, K: int) -> bool:
    return op in ops and rows in COMPILED_ROWS and (N, K) in COMPILED_SHAPES and installed(package)


def peers(op: str, rows: int, N: int, K: int) -> dict[str, Run]:
    """The 8-bit products are given activations that are in 8 bits already, where ours quantises them; that of integers is not scaled."""
    sides: dict[str, Run] = {"torch bf16": lambda i: F.linear(i.x, i.dense)}
    if small_sizes():
        return sides
    if op == "linear_w4a16":
        sides["torch int4"] = lambda i: i.torch(i.x)
    if op == "linear_fp8":
        sides["torch._scaled_mm alone"] = lambda i: torch._scaled_mm(
            i.x8, i.values.t(), scale_a=i.x_scales, scale_b=i.scales[None], out_dtype=DTYPE)
    if op == "linear_w8a8" and rows > 16:  # fewer are refused
        sides["torch._int_mm alone"] = lambda i: torch._int_mm(i.x8, i.values.t())
    if compiles("gemlite", GEMLITE, op, rows, N, K):
        sides["gemlite"] = lambda i: i.gemlite(i.x)
    if compiles("torchao", TORCHAO, op, rows, N, K):
        linear = compiled_linear()
        sides["torchao"] = lambda i: i.torchao(i.x, F.linear)
        sides["torchao, compiled"] = lambda i: i.torchao(i.x, linear)
    return sides


def torch_int4(values: torch.Tensor, scales: torch.Tensor) -> Run:
    """Of values [N,K], of which 8 is zero, and scales [N,groups], by the product that torchao's Int4WeightOnlyConfig calls."""
    packed = torch._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], 8)
    pairs = torch.stack((scales.t(), torch.zeros_like(scales.t())), -1)
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, pairs)


def problem(op: str, rows: int, N: int, K: int) -> Problem:
    def make(device: torch.device) -> SimpleNamespace:
        i = weights(op, N, K, device)
        i.x = randn(rows, K, device=device)
        if device.type != "cuda":
            return i
        if op == "linear_w4a16":
            q, scales = unpack_4bit(i.packed, N, K), unpack_groups(i.scales, N)
            i.torch = built(lambda: torch_int4(q, scales))
        if compiles("gemlite", GEMLITE, op, rows, N, K):
            i.gemlite = built(lambda: gemlite_int4(q, scales) if op == "linear_w4a16" else gemlite_w8a8(i.values, i.scales))
        if compiles("torchao", TORCHAO, op, rows, N, K):
            i.torchao = built(lambda: torchao_int8(i.values, i.scales))
        if op in FORMAT_ERROR:
            i.x_scales = i.x.float().abs().amax(-1, keepdim=True) / (448 if op == "linear_fp8" else 127)
            scaled = i.x.float() / i.x_scales
            i.x8 = scaled.to(FP8) if op == "linear_fp8" else scaled.round().to(torch.int8)
        return i

    def view(out: torch.Tensor, i: SimpleNamespace) -> torch.Tensor:
        return out[:CHECKED] if out.dtype is not torch.int32 else out[:CHECKED] * i.x_scales[:CHECKED] * i.scales

    return Problem(op, str(rows), make, {OURS: ours(op, N, K), **peers(op, rows, N, K)},
                   lambda i: reference(i.x[:CHECKED].float(), i.dense.float(), None, None, None), view,
                   READ[op] * N * K + DTYPE.itemsize * rows * (N + K), 2.0 * rows * N * K, FORMAT_ERROR.get(op, 0.0),
                   group=f"{op} {N}x{K}")


PROBLEMS = [problem(op, rows, N, K) for op in READ for N, K in SHAPES for rows in ROWS]
