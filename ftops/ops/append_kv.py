"""Writes new keys and values into a cache, at given positions, contiguous or paged, quantising on the way if the cache is 8-bit.

    cache[b, positions[b, t]] = k[b, t]            or, paged,   cache[page_table[b, p // page_size], p % page_size] = k[b, t]
"""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ftops.op import Case, register, require, require_device, require_dtype, require_no_grad
from ftops.samples import integers, randn

CACHE_8BIT = (torch.int8, torch.float8_e4m3fn)


def to_cache(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x[..., Hkv, D] as a cache of `dtype` holds it: x / scale[Hkv], rounded to nearest even and clipped."""
    if dtype not in CACHE_8BIT:
        return x
    scaled = x.float() / scale.view(-1, 1)
    return scaled.round().clamp(-127, 127).to(dtype) if dtype is torch.int8 else scaled.clamp(-448, 448).to(dtype)


def reference(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
              page_table: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    rows = torch.arange(k.shape[0], device=k.device).unsqueeze(-1).expand(positions.shape)
    positions = positions.long()
    if page_table is None:
        capacity, slots = k_cache.shape[1], positions
    else:
        page_size = k_cache.shape[1]
        capacity = page_table.shape[1] * page_size
        pages = positions.clamp(0, max(capacity - 1, 0)) // page_size
        rows, slots = page_table.long().gather(1, pages) if capacity else rows, positions % page_size
    keep = (positions >= 0) & (positions < capacity) & (rows >= 0) & (rows < k_cache.shape[0])
    k_cache[rows[keep], slots[keep]] = to_cache(k[keep], k_cache.dtype, k_scale)
    v_cache[rows[keep], slots[keep]] = to_cache(v[keep], v_cache.dtype, v_scale)


def _cuda(*args: object) -> None:
    from ftops.numba_kernels.append_kv import launch
    launch(*args)


APPEND_KV = register(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? page_table, "
    "Tensor? k_scale, Tensor? v_scale) -> ()", cpu=reference, cuda=_cuda, fake=lambda *_: None)


def append_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor, *,
              page_table: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None) -> None:
    """Writes k and v[B,T,Hkv,D] into k_cache and v_cache at positions[B,T] (int32 or int64) of each sequence, in place.

    The caches are [B,S,Hkv,D], or [pages,page_size,Hkv,D] with page_table[B,n] int32, in k's dtype, or int8 or float8_e4m3fn with
    k_scale and v_scale[Hkv] float32 (then k / k_scale is stored). A position below 0 or past the capacity is skipped, as is a page
    outside the pool. Positions of one sequence should differ. Any strides. Raises ValueError.
    """
    require_no_grad("append_kv", k, v)
    require_dtype("append_kv", k=k, v=v)
    require_device("append_kv", k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, page_table=page_table, k_scale=k_scale, v_scale=v_scale)
    require(k.dim() == 4 and v.shape == k.shape, "append_kv", "k.shape, v.shape", (tuple(k.shape), tuple(v.shape)), "two alike, [B,T,Hkv,D]")
    require(positions.shape == k.shape[:2] and positions.dtype in (torch.int32, torch.int64), "append_kv", "positions",
            f"{positions.dtype} {tuple(positions.shape)}", f"int32 or int64 {tuple(k.shape[:2])}")
    check_cache("append_kv", k, k_cache, v_cache, page_table, k_scale, v_scale)
    APPEND_KV(k, v, k_cache, v_cache, positions, page_table, k_scale, v_scale)


def check_cache(op: str, x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor | None,
                k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """Caches that fit x[B,T,heads,D]: dtype, scales, head_dim, and either B rows or a page table of B rows."""
    require(k_cache.dim() == 4 and v_cache.shape == k_cache.shape and v_cache.dtype is k_cache.dtype, op, "k_cache, v_cache",
            f"{k_cache.dtype} {tuple(k_cache.shape)}, {v_cache.dtype} {tuple(v_cache.shape)}", "two alike, of 4 dimensions")
    require(k_cache.shape[3] == x.shape[3], op, "k_cache's head_dim", k_cache.shape[3], str(x.shape[3]))
    heads = k_cache.shape[2]
    require(heads > 0 and x.shape[2] % heads == 0, op, "k_cache's heads", heads, f"a divisor of {x.shape[2]}")
    if page_table is None:
        require(k_cache.shape[0] == x.shape[0], op, "k_cache.shape[0]", k_cache.shape[0], f"the batch size, {x.shape[0]}, unless page_table is given")
    else:
        require(page_table.dim() == 2 and page_table.shape[0] == x.shape[0] and page_table.dtype is torch.int32, op, "page_table",
                f"{page_table.dtype} {tuple(page_table.shape)}", f"int32 [{x.shape[0]}, n]")
    if k_cache.dtype in CACHE_8BIT:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is None:
                raise ValueError(f"{op}: k_cache.dtype is {k_cache.dtype} but {name} is None; pass k_scale and v_scale "
                                 f"([{heads}] float32) or a cache of {x.dtype}")
            require(scale.shape == (heads,) and scale.dtype is torch.float32, op, name, f"{scale.dtype} {tuple(scale.shape)}", f"float32 ({heads},)")
    else:
        require(k_cache.dtype is x.dtype, op, "k_cache.dtype", k_cache.dtype, f"{x.dtype}, torch.int8 or torch.float8_e4m3fn")
        require(k_scale is None and v_scale is None, op, "k_scale, v_scale", "given", "None for a cache that is not 8-bit")


def _sample(device: torch.device, dtype: torch.dtype, *, batch: int = 3, new: int = 1, kv_heads: int = 2, head_dim: int = 64, capacity: int = 48,
            page_size: int | None = None, cache_dtype: torch.dtype | None = None, first: int = -1, heads_first: bool = False) -> tuple[tuple, dict]:
    k, v = (randn((batch, new, kv_heads, head_dim), device, dtype) for _ in range(2))
    options = {}
    if page_size:
        per_row = capacity // page_size
        shape = (batch * per_row + 2, page_size, kv_heads, head_dim)
        options["page_table"] = (torch.randperm(batch * per_row).view(batch, per_row) + 1).to(device=device, dtype=torch.int32)
    else:
        shape = (batch, capacity, kv_heads, head_dim)
    caches = [torch.zeros(shape, dtype=cache_dtype or dtype, device=device) for _ in range(2)]
    if heads_first:
        caches = [c.new_zeros(batch, kv_heads, capacity, head_dim).transpose(1, 2) for c in caches]
    if cache_dtype:
        options |= {name: (torch.rand(kv_heads) * 0.02 + 0.01).to(device) for name in ("k_scale", "v_scale")}
    positions = torch.arange(new).unsqueeze(0) + integers([first + 17 * row for row in range(batch)], torch.device("cpu")).unsqueeze(-1)
    return (k, v, *caches, positions.to(device)), options


def cases() -> Iterator[Case]:
    samples = {
        "decode": {}, "prefill": {"new": 13, "first": 0}, "skipped": {"new": 3, "first": -2}, "beyond": {"new": 20, "first": 0}, "d128": {"head_dim": 128},
        "odd": {"head_dim": 59, "kv_heads": 1}, "heads_first": {"heads_first": True, "new": 5}, "paged": {"page_size": 16, "new": 20, "first": 0},
        "int8": {"cache_dtype": torch.int8, "new": 5, "first": 0}, "fp8": {"cache_dtype": torch.float8_e4m3fn, "new": 5, "first": 0},
        "paged_int8": {"cache_dtype": torch.int8, "page_size": 16, "new": 5, "first": 0}, "empty_batch": {"batch": 0}, "no_tokens": {"new": 0},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, dtype, **options))
