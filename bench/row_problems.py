"""Norms, activations, rotary positions and cache writes, against eager PyTorch and against torch.compile of the same formula."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from bench.problem import DTYPE, Problem, compiled, first, randn, small_sizes
from bench.record import OURS
from ftops import ops
from ftops.ops.bias_activation import reference as bias_reference
from ftops.ops.gated_activation import reference as gated_reference
from ftops.ops.layer_norm import reference as layer_reference
from ftops.ops.layer_norm import reference_residual as layer_reference_residual
from ftops.ops.rms_norm import reference as rms_reference
from ftops.ops.rms_norm import reference_residual as rms_reference_residual
from ftops.ops.rotary import reference as rotary_reference

CHECKED = 256  # rows of which an exact result is computed
EPS = 1e-6

# rows, columns, with a residual
NORMS = [(65536, 4096, False), (65536, 4096, True), (16, 4096, True), (1, 4096, True)]
LAYER_NORMS = [(65536, 4096, False), (12288, 1024, True), (16, 4096, True)]
# rows, columns of the result
GATED, BIAS = [(65536, 4096), (16, 14336), (1, 14336)], [(65536, 4096), (12288, 4096), (16, 16384)]
# B, S, H, Hkv, D, rotary_dim, interleaved
ROTARY = [(1, 8192, 32, 8, 128, 128, False), (16, 1, 32, 8, 128, 128, False), (8, 1024, 16, 16, 256, 64, True)]
# B, T, H, Hkv, D, capacity, page size
ROTARY_APPEND = [(1, 1, 32, 8, 128, 4096, None), (64, 1, 32, 8, 128, 4096, None), (64, 1, 32, 8, 128, 4096, 16),
                 (1, 8192, 32, 8, 128, 8192, None)]
# B, T, Hkv, D, capacity, page size
APPEND = [(1, 8192, 8, 128, 8192, None), (64, 1, 8, 128, 4096, None), (64, 1, 8, 128, 4096, 16)]

if small_sizes():
    NORMS, LAYER_NORMS = [(512, 1024, False), (512, 1024, True)], [(512, 768, True)]
    GATED, BIAS = [(256, 1408)], [(256, 3072)]
    ROTARY, APPEND = [(1, 256, 8, 2, 64, 64, False)], [(4, 16, 2, 64, 128, None)]
    ROTARY_APPEND = [(4, 16, 4, 2, 64, 128, None)]


def norm(op: str, rows: int, columns: int, residual: bool) -> Problem:
    rms = op == "rms_norm"

    def make(device: torch.device) -> SimpleNamespace:
        vectors = [randn(columns, device=device) for _ in range(1 if rms else 2)]
        return SimpleNamespace(x=randn(rows, columns, device=device), vectors=vectors,
                               residual=randn(rows, columns, device=device) if residual else None)

    public = getattr(ops, op)
    reference = {(True, False): rms_reference, (True, True): rms_reference_residual,
                 (False, False): layer_reference, (False, True): layer_reference_residual}[rms, residual]
    fused, last = compiled(reference), (0.0,) if rms else ()

    def inputs_of(i: SimpleNamespace) -> tuple[Any, ...]:
        return (i.x, *([i.residual] if residual else []), *i.vectors, EPS, *last)

    def expected(i: SimpleNamespace) -> torch.Tensor:
        total = i.x[:CHECKED] + i.residual[:CHECKED] if residual else i.x[:CHECKED]
        wide = (total.float(), *(v.float() for v in i.vectors), EPS, *last)
        return rms_reference(*wide) if rms else layer_reference(*wide)

    def eager(i: SimpleNamespace) -> torch.Tensor:
        x = i.x + i.residual if residual else i.x
        return F.rms_norm(x, (columns,), *i.vectors, EPS) if rms else F.layer_norm(x, (columns,), *i.vectors, EPS)

    return Problem(op, f"{rows}x{columns}" + (" residual" if residual else ""), make,
                   {OURS: lambda i: public(i.x, *i.vectors, EPS, residual=i.residual), "torch": eager,
                    "torch.compile": lambda i: fused(*inputs_of(i))},
                   expected, lambda out, i: first(out)[:CHECKED], rows * columns * DTYPE.itemsize * (4 if residual else 2))


def gated(rows: int, columns: int) -> Problem:
    def make(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(x=randn(rows, 2 * columns, device=device))

    def eager(i: SimpleNamespace) -> torch.Tensor:
        gate, up = i.x.chunk(2, -1)
        return F.silu(gate) * up

    fused = compiled(gated_reference)
    return Problem("gated_activation", f"{rows}x2x{columns} silu", make,
                   {OURS: lambda i: ops.gated_activation(i.x, "silu"), "torch": eager, "torch.compile": lambda i: fused(i.x, "silu")},
                   lambda i: gated_reference(i.x[:CHECKED].float(), "silu"), lambda out, i: out[:CHECKED],
                   rows * columns * DTYPE.itemsize * 3)


def bias(rows: int, columns: int) -> Problem:
    def make(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(x=randn(rows, columns, device=device), bias=randn(columns, device=device))

    fused = compiled(bias_reference)
    return Problem("bias_activation", f"{rows}x{columns} gelu", make,
                   {OURS: lambda i: ops.bias_activation(i.x, i.bias, "gelu"), "torch": lambda i: F.gelu(i.x + i.bias),
                    "torch.compile": lambda i: fused(i.x, i.bias, "gelu")},
                   lambda i: bias_reference(i.x[:CHECKED].float(), i.bias.float(), "gelu"), lambda out, i: out[:CHECKED],
                   rows * columns * DTYPE.itemsize * 2)


def rotary(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, interleaved: bool) -> Problem:
    """As transformers does it: cos and sin of the step's tokens are there, once for all layers."""
    def make(device: torch.device) -> SimpleNamespace:
        angles = torch.rand(batch, length, rotary_dim // 2, device=device) * 6.28
        q, k = (randn(batch, length, count, head_dim, device=device) for count in (heads, kv_heads))
        return SimpleNamespace(q=q, k=k, cos=angles.cos(), sin=angles.sin())

    def formula(i: SimpleNamespace, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        wide = (t[:, :rows].float() if rows else t for t in (i.q, i.k))
        return rotary_reference(*wide, None, i.cos[:, :rows], i.sin[:, :rows], interleaved, rotary_dim)

    fused = compiled(rotary_reference)
    elements = batch * length * (heads + kv_heads) * head_dim
    name = f"{batch},{length},{heads},{kv_heads},{head_dim}" + (f" {rotary_dim} interleaved" if interleaved else "")
    return Problem("rotary", name, make,
                   {OURS: lambda i: ops.rotary(i.q, i.k, None, (i.cos, i.sin), interleaved=interleaved, rotary_dim=rotary_dim),
                    "torch": formula, "torch.compile": lambda i: fused(i.q, i.k, None, i.cos, i.sin, interleaved, rotary_dim)},
                   lambda i: formula(i, CHECKED)[0], lambda out, i: out[0][:, :CHECKED],
                   2 * elements * DTYPE.itemsize + 4 * batch * length * rotary_dim)


def cached(i: SimpleNamespace, capacity: int, page_size: int | None) -> SimpleNamespace:
    """inputs k and v[B,T,Hkv,D] with caches and the positions at which they go there."""
    (batch, new, kv_heads, head_dim), device = i.k.shape, i.k.device
    shape = (batch, capacity) if page_size is None else (batch * capacity // page_size, page_size)
    i.caches, i.table = [torch.zeros(*shape, kv_heads, head_dim, device=device, dtype=DTYPE) for _ in range(2)], None
    i.positions = torch.randint(0, capacity - new + 1, (batch, 1), device=device) + torch.arange(new, device=device)
    if page_size is not None:
        i.table = torch.randperm(shape[0], device=device).view(batch, -1).to(torch.int32)
    return i


def slots(i: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the caches' first two dimensions the tokens go."""
    if i.table is None:
        return torch.arange(len(i.positions), device=i.positions.device).unsqueeze(-1), i.positions
    page_size = i.caches[0].shape[1]
    return i.table.long().gather(1, i.positions // page_size), i.positions % page_size


def rotary_append(batch: int, new: int, heads: int, kv_heads: int, head_dim: int, capacity: int, page_size: int | None) -> Problem:
    """Qwen3's step between the QKV linear and the attention: norms, rotation, keys and values into their places."""
    def make(device: torch.device) -> SimpleNamespace:
        q, k, v = randn(batch, new, heads + 2 * kv_heads, head_dim, device=device).split((heads, kv_heads, kv_heads), 2)
        angles = torch.rand(batch, new, head_dim // 2, device=device) * 6.28
        norms = {name: randn(head_dim, device=device) for name in ("q_norm", "k_norm")}
        return cached(SimpleNamespace(q=q, k=k, v=v, cos=angles.cos(), sin=angles.sin(), norms=norms), capacity, page_size)

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, where: Any,
                cos: torch.Tensor, sin: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = rotary_reference(rms_reference(q, q_norm, EPS, 0.0), rms_reference(k, k_norm, EPS, 0.0), None, cos, sin, False, head_dim)
        k_cache[where], v_cache[where] = k, v
        return q, k_cache

    def ours(i: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rotary_append(i.q, i.k, i.v, *i.caches, i.positions, (i.cos, i.sin), page_table=i.table, eps=EPS, **i.norms), i.caches[0]

    def apart(i: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = ops.rms_norm(i.q, i.norms["q_norm"], EPS), ops.rms_norm(i.k, i.norms["k_norm"], EPS)
        q, k = ops.rotary(q, k, None, (i.cos, i.sin))
        ops.append_kv(k, i.v, *i.caches, i.positions, page_table=i.table)
        return q, i.caches[0]

    def expected(i: SimpleNamespace) -> torch.Tensor:
        q, k, *norms = (t.float() for t in (i.q[:, :CHECKED], i.k[:, :CHECKED], *i.norms.values()))
        q, k = (rms_reference(x, weight, EPS, 0.0) for x, weight in zip((q, k), norms, strict=True))
        return torch.cat(rotary_reference(q, k, None, i.cos[:, :CHECKED], i.sin[:, :CHECKED], False, head_dim), 2)

    def view(out: tuple[torch.Tensor, torch.Tensor], i: SimpleNamespace) -> torch.Tensor:
        return torch.cat((out[0][:, :CHECKED], out[1][slots(i)][:, :CHECKED]), 2)

    fused, token = compiled(formula), (heads + kv_heads) * head_dim * DTYPE.itemsize
    return Problem("rotary_append", f"{batch},{new},{heads},{kv_heads},{head_dim}" + (f" page {page_size}" if page_size else ""), make,
                   {OURS: ours, "4 ops": apart,
                    "torch.compile": lambda i: fused(i.q, i.k, i.v, *i.caches, slots(i), i.cos, i.sin, *i.norms.values())},
                   expected, view, batch * new * (2 * token + 2 * kv_heads * head_dim * DTYPE.itemsize + 4 * head_dim))


def append(batch: int, new: int, kv_heads: int, head_dim: int, capacity: int, page_size: int | None) -> Problem:
    """Keys and values of new tokens into their places."""
    def make(device: torch.device) -> SimpleNamespace:
        return cached(SimpleNamespace(**{name: randn(batch, new, kv_heads, head_dim, device=device) for name in "kv"}), capacity, page_size)

    def eager(i: SimpleNamespace) -> torch.Tensor:
        where = slots(i)
        for cache, value in zip(i.caches, (i.k, i.v), strict=True):
            cache[where] = value
        return i.caches[1]

    def ours(i: SimpleNamespace) -> torch.Tensor:
        ops.append_kv(i.k, i.v, *i.caches, i.positions, page_table=i.table)
        return i.caches[1]

    return Problem("append_kv", f"{batch},{new},{kv_heads},{head_dim}" + (f" page {page_size}" if page_size else ""), make,
                   {OURS: ours, "torch": eager}, lambda i: i.v.float(), lambda out, i: out[slots(i)],
                   4 * batch * new * kv_heads * head_dim * DTYPE.itemsize)


PROBLEMS = [*(norm("rms_norm", *shape) for shape in NORMS), *(norm("layer_norm", *shape) for shape in LAYER_NORMS),
            *(rotary(*shape) for shape in ROTARY), *(gated(*shape) for shape in GATED), *(bias(*shape) for shape in BIAS),
            *(rotary_append(*shape) for shape in ROTARY_APPEND), *(append(*shape) for shape in APPEND)]
