"""Attention of a few new tokens over a cache of keys and values: the step that decoding repeats.

Query t of T sits at lengths[b] - T + t. The cache is contiguous or paged, in q's dtype or 8-bit. Split over the keys as in
"Flash-Decoding" (Dao, Haziza, Massa, Sizov, 2023). The formula with every option is in `ftops/formula.py`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.formula import attention_formula
from ftops.op import Case, check_beside, check_tensors, debugging, invalid, register, straight
from ftops.ops.append_kv import CACHE_8BIT, check_cache, check_pages, of_tokens, to_cache, token_scales
from ftops.ops.attention import MAX_HEAD_DIM, check_bias, check_options
from ftops.ops.attention import _cpu as attention_cpu
from ftops.samples import integers, randn

MAX_NEW_TOKENS = 16


def _gather(cache: torch.Tensor, page_table: torch.Tensor | None, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The cache as [B,S,Hkv,D] in `dtype`. A page outside the pool reads as zeros."""
    if page_table is not None:
        outside = _outside(page_table, cache)
        pages = page_table.long().masked_fill(outside, 0)
        cache, scale = cache[pages], scale[pages] if of_tokens(scale) else scale
    if scale is not None:
        cache = (cache.float() * scale.unsqueeze(-1)).to(dtype)
    cache = cache.to(dtype)
    return cache if page_table is None else cache.masked_fill(outside.view(*outside.shape, 1, 1, 1), 0).flatten(1, 2)


def _outside(page_table: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return (page_table < 0) | (page_table >= cache.shape[0])


def reference(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor | None,
              scale: float, window: int, softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None,
              k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, fixed_split: int = 0) -> torch.Tensor:
    # 8-bit caches are widened to at least float32, not to q's dtype: the kernels apply the scale to the float32 sums.
    dtype = q.dtype if k_scale is None else torch.promote_types(q.dtype, torch.float32)
    k, v = _gather(k_cache, page_table, k_scale, dtype), _gather(v_cache, page_table, v_scale, dtype)
    if page_table is not None:
        hidden = torch.zeros(page_table.shape, dtype=dtype, device=q.device).masked_fill(_outside(page_table, k_cache), float("-inf"))
        hidden = hidden.repeat_interleave(k_cache.shape[1], 1)[:, None, None]
        bias = hidden if bias is None else hidden + bias
    positions = lengths.unsqueeze(-1).long() - q.shape[1] + torch.arange(q.shape[1], device=q.device)
    out = attention_formula(q.to(dtype), k, v, positions, causal=True, scale=scale, window=(window, -1), softcap=softcap, bias=bias,
                            alibi_slopes=alibi_slopes, kv_lengths=lengths)
    return out.to(q.dtype)


def _cpu(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor | None,
         scale: float, window: int, softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None,
         k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, fixed_split: int = 0) -> torch.Tensor:
    """`attention` over the filled part of the cache where all sequences are as long; the formula elsewhere."""
    if fixed_split:
        return _each_alone(q, k_cache, v_cache, lengths, page_table, bias, scale, window, softcap, alibi_slopes, k_scale, v_scale)
    filled = set(lengths.tolist())
    if len(filled) != 1 or page_table is not None or k_scale is not None:
        return reference(q, k_cache, v_cache, lengths, page_table, scale, window, softcap, bias, alibi_slopes, k_scale, v_scale)
    keys = filled.pop()
    return attention_cpu(q, k_cache[:, :keys], v_cache[:, :keys], True, scale, window, -1, softcap,
                         None if bias is None else bias[..., :keys], alibi_slopes, None)


def _each_alone(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor | None,
                bias: torch.Tensor | None, scale: float, window: int, softcap: float, alibi_slopes: torch.Tensor | None,
                k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> torch.Tensor:
    """One sequence at a time, over the keys that it has: libraries round otherwise in a batch, or over a longer cache."""
    out = torch.empty(q.shape, dtype=q.dtype)
    for row, length in enumerate(lengths.tolist()):
        this = slice(row, row + 1)
        if page_table is None:
            k, v, table = k_cache[this, :length], v_cache[this, :length], None
            k_scales, v_scales = (s[this, :length] if of_tokens(s) else s for s in (k_scale, v_scale))
        else:
            k, v, table = k_cache, v_cache, page_table[this, : -(-length // k_cache.shape[1])]
            k_scales, v_scales = k_scale, v_scale
        keys = k.shape[1] * (1 if table is None else table.shape[1])
        out[this] = _cpu(q[this], k, v, lengths[this], table, scale, window, softcap, None if bias is None else bias[this, ..., :keys],
                         alibi_slopes, k_scales, v_scales)
    return out


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.decode_attention import launch
    return launch


DECODE_ATTENTION = register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? page_table, float scale, int window, "
    "float softcap, Tensor? bias, Tensor? alibi_slopes, Tensor? k_scale, Tensor? v_scale, int fixed_split=0) -> Tensor",
    cpu=_cpu, cuda=_cuda, fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device))
_decode_attention = straight(DECODE_ATTENTION)


def decode_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, *,
                     page_table: torch.Tensor | None = None, scale: float | None = None, window: int | None = None, softcap: float = 0.0,
                     bias: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None, k_scale: torch.Tensor | None = None,
                     v_scale: torch.Tensor | None = None, fixed_split: int | None = None) -> torch.Tensor:
    """Attention of the T <= 16 newest tokens, q[B,T,H,D], over the cache that already holds them. Returns [B,T,H,D], contiguous.

    lengths[B] int32 counts the tokens in the cache, the new ones included, and is at most its capacity; 0 gives 0.
    The caches are [B,S,Hkv,D], or [pages,page_size,Hkv,D] with page_table[B,n] int32; in q's dtype, or int8 or float8_e4m3fn with
    k_scale and v_scale float32, a scale a head or a token and head, as of `append_kv`. window: how many tokens to the left of itself
    a query sees (None: all). bias, in q's dtype or float32, broadcasts to [B,H,T,S] and is added; -inf hides a key. scale (D ** -0.5),
    softcap and alibi_slopes as in `attention`.
    A page outside the pool is never read, and its keys are hidden; with FTOPS_DEBUG=1 one that the lengths reach is an error.

    fixed_split: keys a split (rounded up to the kernel's tile, 64 at most). A sequence's result then has the same bits whatever else is
    in the batch, however long, and whatever the capacity: it depends on its own tokens, T, the options and the layout of the caches.
    None splits by the size of the batch, which is faster: sums are then added in another order in another batch.
    float32, float16 or bfloat16, any strides. Raises ValueError.
    """
    op = "decode_attention"
    check_tensors(op, q=q)
    check_beside(op, q.device, k_cache=k_cache, v_cache=v_cache, lengths=lengths, page_table=page_table, bias=bias,
                 alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale)
    shape = q.shape
    if len(shape) != 4 or shape[1] > MAX_NEW_TOKENS:
        raise invalid(op, "q.shape", tuple(shape), f"[B,T,H,D] with T <= {MAX_NEW_TOKENS}; for more use attention")
    batch, new, heads, head_dim = shape
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise invalid(op, "head_dim", head_dim, f"1 to {MAX_HEAD_DIM}")
    check_cache(op, q, k_cache, v_cache, page_table, k_scale, v_scale)
    if lengths.shape != (batch,) or lengths.dtype is not torch.int32:
        raise invalid(op, "lengths", f"{lengths.dtype} {tuple(lengths.shape)}", f"int32 ({batch},)")
    if window is not None and window < -1:
        raise invalid(op, "window", window, "None, or how many tokens to the left, 0 or more")
    if fixed_split is not None and fixed_split < 1:
        raise invalid(op, "fixed_split", fixed_split, "None, or how many keys a split, 1 or more")
    check_options(op, heads, softcap, alibi_slopes)
    if bias is not None:
        keys = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
        bias = check_bias(op, bias, q, (batch, heads, new, keys))
    if page_table is not None and debugging():
        first = torch.arange(page_table.shape[1], device=q.device) * k_cache.shape[1]  # key of each page
        reached = first < lengths.unsqueeze(-1)
        if window is not None and window >= 0:
            reached &= first + k_cache.shape[1] > lengths.unsqueeze(-1) - new - window
        check_pages(op, page_table, torch.where(reached, first // k_cache.shape[1], -1), k_cache.shape[0])
    return _decode_attention(q, k_cache, v_cache, lengths, page_table, head_dim ** -0.5 if scale is None else scale,
                            -1 if window is None else window, softcap, bias, alibi_slopes, k_scale, v_scale, fixed_split or 0)


def _sample(device: torch.device, dtype: torch.dtype, *, lengths: tuple[int, ...] = (1, 97, 200), new: int = 1, heads: int = 8,
            kv_heads: int = 2, head_dim: int = 64, capacity: int = 208, page_size: int | None = None,
            cache_dtype: torch.dtype | None = None, heads_first: bool = False, bias: tuple[int, ...] | None = None,
            alibi: bool = False, tokens: bool = False, **options: object) -> tuple[tuple, dict]:
    batch = len(lengths)
    q = randn((batch, new, heads, head_dim), device, dtype)
    caches = [randn((batch, capacity, kv_heads, head_dim), device, dtype) for _ in range(2)]
    for cache in caches:
        for row, length in enumerate(lengths):
            cache[row, length:] = float("nan")
    if cache_dtype in CACHE_8BIT:
        if tokens:  # of values of which some are a thousand times others
            caches = [c * (10 ** (3 * torch.rand(c.shape[:3]) - 1.5)).to(device, dtype).unsqueeze(-1) for c in caches]
            caches[0] = caches[0] / 10
            scales = [token_scales(c, cache_dtype) for c in caches]
            caches = [to_cache(c.nan_to_num(3.0), cache_dtype, s.nan_to_num(1.0)) for c, s in zip(caches, scales, strict=True)]
        else:
            scales = [(torch.rand(kv_heads) * 0.02 + 0.02).to(device) for _ in range(2)]
            caches = [to_cache(c.nan_to_num(3.0), cache_dtype, s) for c, s in zip(caches, scales, strict=True)]
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
    if page_size:
        # Page order[i] holds what page i of the contiguous cache held; one page in front belongs to nobody.
        order = torch.randperm(batch * (capacity // page_size)) + 1
        pools = [torch.zeros((len(order) + 1, page_size, kv_heads, head_dim), dtype=c.dtype, device=device) for c in caches]
        for pool, cache in zip(pools, caches, strict=True):
            pool[order.to(device)] = cache.view(-1, page_size, kv_heads, head_dim)
        if tokens:
            paged = [torch.ones(pools[0].shape[:3], device=device) for _ in range(2)]
            for pool, given in zip(paged, scales, strict=True):
                pool[order.to(device)] = given.view(-1, page_size, kv_heads)
            options |= {"k_scale": paged[0], "v_scale": paged[1]}
        caches, options["page_table"] = pools, order.view(batch, -1).to(device, torch.int32)
    if heads_first:
        caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches]
    if bias is not None:
        options["bias"] = randn(bias, device, dtype).masked_fill(torch.rand(bias).to(device) < 0.3, float("-inf"))
    if alibi:
        options["alibi_slopes"] = (2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)).to(device)
    return (q, *caches, integers(lengths, device)), options


def cases() -> Iterator[Case]:
    samples = {f"d{d}": {"head_dim": d} for d in (8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)}
    int8, fp8 = {"cache_dtype": torch.int8}, {"cache_dtype": torch.float8_e4m3fn}
    most = {"new": 16, "lengths": (16, 97, 200)}
    samples |= {
        "mha": {"heads": 4, "kv_heads": 4}, "mqa": {"heads": 16, "kv_heads": 1, "head_dim": 128},
        "wide_group": {"heads": 40, "kv_heads": 2}, "three": {"heads": 9, "kv_heads": 3},
        "zero": {"lengths": (0, 5)}, "full": {"lengths": (208, 208)},
        "new_tokens": {"new": 5, "lengths": (5, 97, 200)}, "most_new": most, "most_new_d256": most | {"head_dim": 256},
        "short": {"new": 4, "lengths": (2, 4, 9)}, "window": {"window": 40}, "window_self": {"window": 0},
        "window_new": {"window": 40, "new": 5}, "softcap": {"softcap": 5.0}, "alibi": {"alibi": True},
        "alibi_new": {"alibi": True, "new": 3},
        "bias": {"bias": (3, 1, 1, 208)}, "bias_heads": {"bias": (8, 4, 208), "new": 4, "lengths": (4, 97, 200)}, "scale": {"scale": 1.0},
        "heads_first": {"heads_first": True, "head_dim": 128}, "paged": {"page_size": 16}, "paged_small": {"page_size": 1},
        "paged_new": {"page_size": 16, "new": 3, "lengths": (3, 97, 200)}, "paged_window": {"page_size": 16, "window": 30},
        "paged_bias": {"page_size": 16, "bias": (3, 1, 1, 208)}, "int8": int8 | {"head_dim": 128}, "fp8": fp8 | {"head_dim": 128},
        "int8_new": int8 | {"new": 3, "lengths": (3, 97, 200)}, "odd_int8": int8 | {"head_dim": 59},
        "heads_first_fp8": fp8 | {"heads_first": True}, "paged_int8": int8 | {"page_size": 16}, "paged_fp8": fp8 | {"page_size": 16},
        "int8_tokens": int8 | {"tokens": True, "head_dim": 128}, "fp8_tokens": fp8 | {"tokens": True, "window": 40, "softcap": 5.0},
        "odd_int8_tokens": int8 | {"tokens": True, "head_dim": 59}, "fixed_tokens": fp8 | {"tokens": True, "fixed_split": 64},
        "paged_int8_tokens": int8 | {"tokens": True, "page_size": 16, "new": 3, "lengths": (3, 97, 200), "heads": 16},
        "everything": {"page_size": 16, "new": 3, "lengths": (3, 97, 200), "window": 50, "softcap": 5.0, "bias": (1, 8, 1, 208),
                       "alibi": True, "scale": 0.2},
        "long": {"lengths": (3000, 4096), "capacity": 4096, "head_dim": 128},
        "long_window": {"lengths": (3000, 4096), "capacity": 4096, "head_dim": 128, "window": 1000},
        "fixed": {"fixed_split": 64}, "fixed_long": {"lengths": (3000, 4096), "capacity": 4096, "head_dim": 128, "fixed_split": 200},
        "fixed_everything": {"page_size": 16, "new": 3, "lengths": (3, 97, 200), "window": 50, "bias": (1, 8, 1, 208), "fixed_split": 32},
        "empty_batch": {"lengths": ()}, "no_tokens": {"new": 0},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, dtype, **options))
