"""What a decode step does between its QKV linear and its attention: q and k normed and rotated, k and v written into the cache.

    q' = rotary(norm(q)),  k' = rotary(norm(k)),  append_kv(k', v)            norm(x) = x / sqrt(mean(x^2) + eps) * (offset + weight)

The norm is Qwen3's, over each head, and may be left out. Formulas of the parts: `rms_norm`, `rotary`, `append_kv`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_beside, check_tensors, debugging, invalid, register, straight
from ftops.ops.append_kv import CACHE_8BIT, INDEX_DTYPES, check_cache, check_pages
from ftops.ops.append_kv import _cpu as append_cpu
from ftops.ops.append_kv import reference as append_reference
from ftops.ops.rms_norm import _cpu as norm_cpu
from ftops.ops.rms_norm import reference as norm_reference
from ftops.ops.rotary import _cpu as rotary_cpu
from ftops.ops.rotary import angles, check_freqs, rotate
from ftops.samples import randn


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
              rotary_positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None, q_norm: torch.Tensor | None,
              k_norm: torch.Tensor | None, eps: float, norm_offset: float, interleaved: bool, rotary_dim: int,
              page_table: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> torch.Tensor:
    """Rounds once, at the end: to q's dtype, or straight to that of an 8-bit cache."""
    if rotary_positions is not None and sin is not None:
        rotary_positions = rotary_positions.clamp(0, cos.shape[0] - 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = angles(rotary_positions, cos, sin, rotary_dim // 2, wide)

    def turned(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.to(wide)
        return rotate(x if weight is None else norm_reference(x, weight, eps, norm_offset), cos, sin, interleaved, rotary_dim)

    k = turned(k, k_norm)
    append_reference(k if k_cache.dtype in CACHE_8BIT else k.to(q.dtype), v, k_cache, v_cache, positions, page_table, k_scale, v_scale)
    return turned(q, q_norm).to(q.dtype).contiguous()


def _cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
         rotary_positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None, q_norm: torch.Tensor | None,
         k_norm: torch.Tensor | None, eps: float, norm_offset: float, interleaved: bool, rotary_dim: int, page_table: torch.Tensor | None,
         k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> torch.Tensor:
    """The parts' own: a quarter of the reference's time for one token."""
    if rotary_positions is not None and sin is not None:
        rotary_positions = rotary_positions.clamp(0, cos.shape[0] - 1)
    q = q if q_norm is None else norm_cpu(q, q_norm, eps, norm_offset)
    k = k if k_norm is None else norm_cpu(k, k_norm, eps, norm_offset)
    q, k = rotary_cpu(q, k, rotary_positions, cos, sin, interleaved, rotary_dim)
    append_cpu(k, v, k_cache, v_cache, positions, page_table, k_scale, v_scale)
    return q


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.rotary_append import launch
    return launch


ROTARY_APPEND = register(
    "rotary_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? rotary_positions, "
    "Tensor cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, float eps, float norm_offset, bool interleaved, int rotary_dim, "
    "Tensor? page_table, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> Tensor",
    cpu=_cpu, cuda=_cuda, fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device))
_rotary_append = straight(ROTARY_APPEND)


def rotary_append(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
                  freqs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *, rotary_positions: torch.Tensor | None = None,
                  q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 1e-6, norm_offset: float = 0.0,
                  interleaved: bool = False, rotary_dim: int | None = None, page_table: torch.Tensor | None = None,
                  k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Norms and rotates q[B,T,H,D] and k[B,T,Hkv,D], writes k and v into the caches at positions[B,T], and returns q, contiguous.

    q, k and v may be views of one packed QKV[B,T,(H + 2 Hkv) D]; any strides. Caches, page_table, k_scale, v_scale and positions are those
    of `append_kv` (a token at a position below 0 or past the capacity is rotated but not kept); freqs, interleaved and rotary_dim those of
    `rotary`. Where freqs are indexed, tables [P, R/2] or inv_freq, it is by rotary_positions[B,T], or if None by positions; an index
    outside a table takes its nearest row. q_norm and k_norm: weights [D] of an RMS norm of each head, with eps, times norm_offset + weight.
    float32, float16 or bfloat16; arithmetic in float32, rounded once. Raises ValueError.
    """
    op = "rotary_append"
    check_tensors(op, q=q, k=k, v=v, q_norm=q_norm, k_norm=k_norm)
    check_beside(op, q.device, k_cache=k_cache, v_cache=v_cache, positions=positions, rotary_positions=rotary_positions,
                 page_table=page_table, k_scale=k_scale, v_scale=v_scale)
    shape, keys = q.shape, k.shape
    if len(shape) != 4 or len(keys) != 4 or v.shape != keys or keys[:2] != shape[:2] or keys[3] != shape[3]:
        raise invalid(op, "q.shape, k.shape, v.shape", (tuple(shape), tuple(keys), tuple(v.shape)), "[B,T,H,D] and two of [B,T,Hkv,D]")
    head_dim = shape[3]
    if positions.shape != shape[:2] or positions.dtype not in INDEX_DTYPES:
        raise invalid(op, "positions", f"{positions.dtype} {tuple(positions.shape)}", f"int32 or int64 {tuple(shape[:2])}")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (head_dim,):
            raise invalid(op, f"{name}.shape", tuple(weight.shape), f"({head_dim},)")
    check_cache(op, k, k_cache, v_cache, page_table, k_scale, v_scale)
    if k_cache.shape[2] != keys[2]:
        raise invalid(op, "k_cache's heads", k_cache.shape[2], f"k's, {keys[2]}")
    a_row_a_token = isinstance(freqs, (tuple, list)) and all(getattr(table, "ndim", 0) == 3 for table in freqs)
    if rotary_positions is None and not a_row_a_token:
        rotary_positions = positions
    size = head_dim if rotary_dim is None else rotary_dim
    cos, sin = check_freqs(op, q, rotary_positions, freqs, interleaved, size)
    if page_table is not None and debugging():
        check_pages(op, page_table, positions // k_cache.shape[1], k_cache.shape[0])
    return _rotary_append(q, k, v, k_cache, v_cache, positions, rotary_positions, cos, sin, q_norm, k_norm, eps, norm_offset, interleaved,
                          size, page_table, k_scale, v_scale)


def _sample(device: torch.device, dtype: torch.dtype, *, batch: int = 3, new: int = 1, heads: int = 4, kv_heads: int = 2,
            head_dim: int = 64, capacity: int = 48, first: int = 5, form: str = "token", index: torch.dtype = torch.int64,
            norms: str = "", page_size: int | None = None, cache_dtype: torch.dtype | None = None, packed: bool = True,
            heads_first: bool = False, shifted: bool = False, tokens: bool = False, **options: Any) -> tuple[tuple, dict]:
    if packed:
        qkv = randn((batch, new, (heads + 2 * kv_heads) * head_dim), device, dtype).view(batch, new, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    else:
        q, k, v = (randn((batch, count, new, head_dim), device, dtype).transpose(1, 2) for count in (heads, kv_heads, kv_heads))
    positions = torch.arange(new) + torch.tensor([first + 17 * row for row in range(batch)], dtype=torch.int64).unsqueeze(-1)
    shape = (batch, capacity, kv_heads, head_dim)
    if page_size:
        table = torch.randperm(batch * (capacity // page_size)).view(batch, -1) + 1
        options["page_table"], shape = table.to(device, torch.int32), (table.numel() + 2, page_size, kv_heads, head_dim)
    caches = [torch.zeros(shape, dtype=cache_dtype or dtype, device=device) for _ in range(2)]
    if heads_first:
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    if cache_dtype:
        options |= {name: (torch.rand(shape[:3] if tokens else kv_heads) * 0.02 + 0.02).to(device) for name in ("k_scale", "v_scale")}
    options |= {name: randn((head_dim,), device, dtype) for name in ("q_norm", "k_norm") if name[0] in norms}
    half = options.get("rotary_dim", head_dim) // 2
    inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / max(half, 1))
    turned_at = positions - 3 if shifted else positions
    if shifted:
        options["rotary_positions"] = turned_at.to(device, index)
    angle = {"token": turned_at.unsqueeze(-1) * inv_freq, "table": torch.arange(100).unsqueeze(-1) * inv_freq}.get(form)
    freqs = inv_freq.to(device) if angle is None else (angle.cos().to(device), angle.sin().to(device))
    return (q, k, v, *caches, positions.to(device, index), freqs), options


def cases() -> Iterator[Case]:
    int8, fp8 = {"cache_dtype": torch.int8}, {"cache_dtype": torch.float8_e4m3fn}
    prefill = {"new": 13, "first": 0}
    qwen3 = {"head_dim": 128, "heads": 8, "norms": "qk", "form": "table"}
    samples = {
        "decode": {}, "prefill": prefill, "inv_freq": {"form": "inv_freq", "index": torch.int32},
        "qwen3": qwen3, "qwen3_prefill": qwen3 | prefill, "qwen3_paged_fp8": qwen3 | fp8 | {"page_size": 16},
        "gemma3": prefill | {"norms": "qk", "norm_offset": 1.0, "head_dim": 256, "kv_heads": 1, "eps": 1e-5},
        "gptj": prefill | {"heads": 4, "kv_heads": 4, "head_dim": 256, "interleaved": True, "rotary_dim": 64, "form": "table"},
        "interleaved_norm": prefill | {"interleaved": True, "norms": "qk"}, "partial": prefill | {"head_dim": 80, "rotary_dim": 32},
        "no_rotation": {"rotary_dim": 0}, "odd": prefill | {"head_dim": 59, "rotary_dim": 22, "norms": "qk"},
        "odd_int8": prefill | int8 | {"head_dim": 59, "rotary_dim": 22}, "d96": {"head_dim": 96, "norms": "k"},
        "shifted": prefill | {"form": "table", "shifted": True},
        "skipped": {"new": 3, "first": -2, "form": "table"},
        "beyond": {"new": 20, "first": 40, "form": "table"}, "heads_first": prefill | {"packed": False, "heads_first": True},
        "paged_small": {"page_size": 3, "new": 20}, "fp8": prefill | fp8,
        "paged_int8": prefill | int8 | {"page_size": 16}, "many": {"new": 500, "capacity": 520, "heads": 6, "kv_heads": 3, "norms": "qk"},
        "qwen3_int8_tokens": qwen3 | int8 | {"tokens": True, "page_size": 16, "kv_heads": 4}, "many_fp8_tokens": fp8 | {
            "tokens": True, "new": 700, "capacity": 720, "heads": 8, "norms": "qk", "head_dim": 80, "rotary_dim": 32},
        "odd_int8_tokens": prefill | int8 | {"tokens": True, "head_dim": 59, "rotary_dim": 22},
        "empty_batch": {"batch": 0, "packed": False}, "no_tokens": {"new": 0},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, dtype, **options))
