"""Writes new keys and values into a cache, at given positions, contiguous or paged, quantising on the way if the cache is 8-bit.

    cache[b, positions[b, t]] = k[b, t]            or, paged,   cache[page_table[b, p // page_size], p % page_size] = k[b, t]

An 8-bit cache has a scale a head, given, or one a token and head, which is measured here: max |k[b, t, h]| / 127, or / 448 of e4m3.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_beside, check_tensors, debugging, invalid, register, straight
from ftops.samples import randn

LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
CACHE_8BIT = tuple(LARGEST)
SMALLEST = 1e-20  # what a token's largest value counts as at least, so that no scale is 0
INDEX_DTYPES = (torch.int32, torch.int64)


def to_cache(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x[..., Hkv, D] as a cache of `dtype` holds it: x / scale[Hkv] or [..., Hkv], rounded to nearest even and clipped."""
    if dtype not in CACHE_8BIT:
        return x
    scaled = x.float() / scale.unsqueeze(-1)
    return (scaled.round() if dtype is torch.int8 else scaled).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def of_tokens(scale: torch.Tensor | None) -> bool:
    """Whether there is a scale a token and head, which is written with the token, and not a given one a head."""
    return scale is not None and scale.dim() == 3


def token_scales(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [..., Hkv] of x[..., Hkv, D] with which a cache of `dtype` holds each head's largest value as its own largest number."""
    return x.float().abs().amax(-1).clamp(min=SMALLEST) / LARGEST[dtype]


def _write(x: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None, places: tuple[torch.Tensor, torch.Tensor]) -> None:
    if of_tokens(scale):
        measured = token_scales(x, cache.dtype)
        scale.index_put_(places, measured.to(scale.dtype))
        scale = measured
    cache.index_put_(places, to_cache(x, cache.dtype, scale))


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
    _write(k[keep], k_cache, k_scale, (rows[keep], slots[keep]))
    _write(v[keep], v_cache, v_scale, (rows[keep], slots[keep]))


def _cpu(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
         page_table: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """A tenth of the reference's time for one token, where none is to be skipped and there are no pages."""
    if page_table is not None or not positions.numel() or positions.min() < 0 or positions.max() >= k_cache.shape[1]:
        reference(k, v, k_cache, v_cache, positions, page_table, k_scale, v_scale)
        return
    places = torch.arange(len(positions)).unsqueeze(-1), positions.long()
    _write(k, k_cache, k_scale, places)
    _write(v, v_cache, v_scale, places)


KERNEL = "rotary_append"


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.rotary_append import append
    return append


APPEND_KV = register(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? page_table, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()", cpu=_cpu, cuda=_cuda, fake=lambda *_: None)
_append_kv = straight(APPEND_KV)


def append_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor, *,
              page_table: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None) -> None:
    """Writes k and v[B,T,Hkv,D] into k_cache and v_cache at positions[B,T] (int32 or int64) of each sequence, in place.

    The caches are [B,S,Hkv,D], or [pages,page_size,Hkv,D] with page_table[B,n] int32, in k's dtype, or int8 or float8_e4m3fn with
    k_scale and v_scale float32 (then k / k_scale is stored): [Hkv], or [B,S,Hkv] or [pages,page_size,Hkv], contiguous, where the scales
    of the new tokens are written too. A position below 0 or past the capacity is skipped, as is a page outside the pool: with
    FTOPS_DEBUG=1 that is an error. Positions of one sequence should differ. Any strides but of scales. Raises ValueError.
    """
    op = "append_kv"
    check_tensors(op, k=k, v=v)
    check_beside(op, k.device, k_cache=k_cache, v_cache=v_cache, positions=positions, page_table=page_table,
                 k_scale=k_scale, v_scale=v_scale)
    shape = k.shape
    if len(shape) != 4 or v.shape != shape:
        raise invalid(op, "k.shape, v.shape", (tuple(shape), tuple(v.shape)), "two alike, [B,T,Hkv,D]")
    if positions.shape != shape[:2] or positions.dtype not in INDEX_DTYPES:
        raise invalid(op, "positions", f"{positions.dtype} {tuple(positions.shape)}", f"int32 or int64 {tuple(shape[:2])}")
    check_cache(op, k, k_cache, v_cache, page_table, k_scale, v_scale)
    if k_cache.shape[2] != shape[2]:
        raise invalid(op, "k_cache's heads", k_cache.shape[2], f"k's, {shape[2]}")
    if page_table is not None and debugging():
        check_pages(op, page_table, positions // k_cache.shape[1], k_cache.shape[0])
    _append_kv(k, v, k_cache, v_cache, positions, page_table, k_scale, v_scale)


def check_cache(op: str, x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor | None,
                k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """Caches that fit x[B,T,heads,D]: dtype, scales, head_dim, and either B rows or a page table of B rows."""
    shape, cache = x.shape, k_cache.shape
    if len(cache) != 4 or v_cache.shape != cache or v_cache.dtype is not k_cache.dtype:
        raise invalid(op, "k_cache, v_cache", f"{k_cache.dtype} {tuple(cache)}, {v_cache.dtype} {tuple(v_cache.shape)}",
                      "two alike, of 4 dimensions")
    if cache[3] != shape[3]:
        raise invalid(op, "k_cache's head_dim", cache[3], shape[3])
    heads = cache[2]
    if not heads or shape[2] % heads:
        raise invalid(op, "k_cache's heads", heads, f"a divisor of {shape[2]}")
    if page_table is None:
        if cache[0] != shape[0]:
            raise invalid(op, "k_cache.shape[0]", cache[0], f"the batch size, {shape[0]}, unless page_table is given")
    elif len(page_table.shape) != 2 or page_table.shape[0] != shape[0] or page_table.dtype is not torch.int32:
        raise invalid(op, "page_table", f"{page_table.dtype} {tuple(page_table.shape)}", f"int32 [{shape[0]}, n]")
    if k_cache.dtype is x.dtype:
        if k_scale is not None or v_scale is not None:
            raise invalid(op, "k_scale, v_scale", "given", f"None for a cache of {x.dtype}; they belong to an 8-bit one")
        return
    if k_cache.dtype not in CACHE_8BIT:
        raise invalid(op, "k_cache.dtype", k_cache.dtype, f"{x.dtype}, torch.int8 or torch.float8_e4m3fn")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            raise ValueError(f"{op}: k_cache.dtype is {k_cache.dtype} but {name} is None; pass k_scale and v_scale "
                             f"([{heads}] float32), or {list(cache[:3])} for a scale a token and head, or a cache of {x.dtype}")
        if scale.dtype is not torch.float32 or scale.shape not in ((heads,), cache[:3]):
            raise invalid(op, name, f"{scale.dtype} {tuple(scale.shape)}",
                          f"float32 ({heads},), or {tuple(cache[:3])} for a scale a token and head")
        if not scale.is_contiguous() and of_tokens(scale):
            raise invalid(op, f"{name}.stride()", scale.stride(), "that of a contiguous tensor; scales of tokens are written in place")
    if k_scale.dim() != v_scale.dim():
        raise invalid(op, "k_scale.shape, v_scale.shape", (tuple(k_scale.shape), tuple(v_scale.shape)), "two alike")


def check_pages(op: str, page_table: torch.Tensor, columns: torch.Tensor, pages: int) -> None:
    """Entries [b, columns[b, i]] of page_table[B,n] that exist are pages of the pool. Waits for the device."""
    rows, places = ((columns >= 0) & (columns < page_table.shape[1])).nonzero(as_tuple=True)
    columns = columns[rows, places].long()
    entries = page_table[rows, columns]
    for wrong in ((entries < 0) | (entries >= pages)).nonzero()[:1].flatten().tolist():
        raise invalid(op, f"page_table[{rows[wrong]}, {columns[wrong]}]", entries[wrong].item(), f"0 to {pages - 1}, the pages of the pool")


def _sample(device: torch.device, dtype: torch.dtype, *, batch: int = 3, new: int = 1, kv_heads: int = 2, head_dim: int = 64,
            capacity: int = 48, page_size: int | None = None, cache_dtype: torch.dtype | None = None, first: int = -1,
            index: torch.dtype = torch.int64, heads_first: bool = False, fused: bool = False,
            tokens: bool = False) -> tuple[tuple, dict]:
    if fused:  # k and v as views of one QKV buffer, the way a fused projection leaves them
        k, v = randn((batch, new, 3 * kv_heads, head_dim), device, dtype)[:, :, kv_heads:].split(kv_heads, 2)
    else:
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
        options |= {name: (torch.rand(shape[:3] if tokens else kv_heads) * 0.02 + 0.01).to(device) for name in ("k_scale", "v_scale")}
    positions = torch.arange(new) + torch.tensor([first + 17 * row for row in range(batch)], dtype=torch.int64).unsqueeze(-1)
    return (k, v, *caches, positions.to(device, index)), options


def cases() -> Iterator[Case]:
    int8, fp8 = {"cache_dtype": torch.int8}, {"cache_dtype": torch.float8_e4m3fn}
    prefill = {"new": 13, "first": 0}
    samples = {
        "decode": {}, "prefill": prefill, "int32": prefill | {"index": torch.int32}, "skipped": {"new": 3, "first": -2},
        "beyond": {"new": 20, "first": 0}, "d128": prefill | {"head_dim": 128}, "d256": {"head_dim": 256, "kv_heads": 1},
        "odd": prefill | {"head_dim": 59, "kv_heads": 1},
        "heads_first": prefill | {"heads_first": True}, "fused": prefill | {"fused": True},
        "paged": {"page_size": 16, "new": 20, "first": 0}, "paged_small": {"page_size": 3, "new": 20, "first": 5},
        "int8": prefill | int8, "fp8": prefill | fp8, "odd_int8": prefill | int8 | {"head_dim": 59},
        "heads_first_fp8": fp8 | {"heads_first": True},
        "paged_int8": prefill | int8 | {"page_size": 16}, "paged_fp8": prefill | fp8 | {"page_size": 16},
        "int8_tokens": int8 | {"tokens": True, "head_dim": 128, "kv_heads": 8}, "odd_fp8_tokens": prefill | fp8 | {
            "tokens": True, "head_dim": 59},
        "paged_int8_tokens": int8 | {"tokens": True, "page_size": 16, "new": 20, "first": -2},
        "empty_batch": {"batch": 0}, "no_tokens": {"new": 0},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, dtype, **options))
