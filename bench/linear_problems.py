"""Linear layers at the shapes of models: 16-bit, int8 and int4 weights, against cuBLAS in bfloat16 and PyTorch's own quantised products."""
from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.problem import DTYPE, Problem, randn, small_sizes
from bench.record import OURS
from ftops import ops
from ftops.ops.linear import reference
from ftops.ops.linear_w8a16 import dequantise
from ftops.packing import dequantise_4bit, unpack_4bit

CHECKED = 64  # rows of which an exact result is computed
GROUP = 128
# N, K: q, k, v of Llama-3.1-8B; its gate and up; down; GPT-J's up; a 70B model's down at 8 GPUs; an odd one
SHAPES = [(6144, 4096), (28672, 4096), (4096, 14336), (16384, 4096), (8192, 3584), (5000, 2064)]
ROWS = [1, 4, 16, 64, 256, 2048]
MORE_ROWS = [2, 8, 32, 128, 1024, 8192]  # of the first shape

if small_sizes():
    SHAPES, ROWS, MORE_ROWS = [(768, 512)], [1, 16], []


def weights(op: str, N: int, K: int, device: torch.device) -> SimpleNamespace:
    """Random bits, scaled so that the results are near 1, and the dense weight that they stand for."""
    if op == "linear":
        return SimpleNamespace(dense=randn(N, K, device=device) * K ** -0.5)
    if op == "linear_w8a16":
        values, scales = torch.randint(-127, 128, (N, K), device=device, dtype=torch.int8), (torch.rand(N, device=device) + 0.5) / 75
        return SimpleNamespace(values=values, scales=scales * K ** -0.5, dense=dequantise(values, scales * K ** -0.5, K, DTYPE))
    tiles, groups = -(-N // 32), -(-K // GROUP)
    packed = torch.randint(-2 ** 31, 2 ** 31, (tiles, groups * GROUP // 32, 32, 4), device=device, dtype=torch.int32)
    scales = ((torch.rand(tiles, groups, 8, 4, device=device) + 0.5) * K ** -0.5 / 4).to(DTYPE)
    return SimpleNamespace(packed=packed, scales=scales, dense=dequantise_4bit(packed, scales, N, K, DTYPE))


def problem(op: str, rows: int, N: int, K: int) -> Problem:
    def make(device: torch.device) -> SimpleNamespace:
        i = weights(op, N, K, device)
        i.x = randn(rows, K, device=device)
        if op == "linear_w4a16" and device.type == "cuda" and K % GROUP == 0 and N % 8 == 0:
            q = unpack_4bit(i.packed, N, K)
            i.torch = torch._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
            scale = i.scales.view(-1, K // GROUP, 8, 2, 2).permute(1, 0, 3, 4, 2).reshape(K // GROUP, -1)[:, :N]
            i.torch_scales = torch.stack((scale, torch.zeros_like(scale)), -1)
        return i

    run = {"linear": lambda i: ops.linear(i.x, i.dense),
           "linear_w4a16": lambda i: ops.linear_w4a16(i.x, i.packed, i.scales, (N, K)),
           "linear_w8a16": lambda i: ops.linear_w8a16(i.x, i.values, i.scales)}[op]
    sides = {OURS: run, "torch bf16": lambda i: F.linear(i.x, i.dense)}
    if op == "linear_w4a16" and not small_sizes():
        sides["torch int4"] = lambda i: torch._weight_int4pack_mm(i.x, i.torch, GROUP, i.torch_scales)
    read = {"linear": 2.0, "linear_w4a16": 0.5 + 2 / GROUP, "linear_w8a16": 1.0}[op]
    return Problem(op, f"{rows} x {N}x{K}", make, sides,
                   lambda i: reference(i.x[:CHECKED].float(), i.dense.float(), None, None, None), lambda out, i: out[:CHECKED],
                   read * N * K + DTYPE.itemsize * rows * (N + K), 2.0 * rows * N * K)


PROBLEMS = [problem(op, rows, N, K) for op in ("linear", "linear_w8a16", "linear_w4a16") for N, K in SHAPES
            for rows in sorted(ROWS + (MORE_ROWS if SHAPES[0] == (N, K) else []))]
