"""Attention, whole prompts and single tokens, against SDPA by FlashAttention-2 and by cuDNN, FlexAttention, and FlashInfer if installed."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import flashinfer_decode, flashinfer_prefill, installed
from bench.problem import Problem, Run, randn, small_sizes
from bench.record import OURS
from ftops import ops
from ftops.formula import attention_formula
from ftops.ops.append_kv import to_cache, token_scales
from ftops.ops.attention_fp8 import quantise_heads
from ftops.ops.decode_attention import reference as decode_reference

BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
ROWS = 64  # queries at the end of which an exact result is computed

# B, H, Hkv, S, D, causal
PREFILL = [(4, 16, 16, 4096, 128, True), (1, 32, 8, 16384, 128, True), (4, 16, 16, 4096, 128, False), (2, 32, 32, 4096, 64, True),
           (8, 16, 16, 2048, 256, True), (32, 12, 12, 384, 64, False), (16, 32, 8, 128, 128, True)]
# B, H, Hkv, S, D, the newest tokens that are queries: a piece of a prompt, or what a conversation goes on with
CHUNKS = [(1, 32, 8, 16384, 128, 64), (1, 32, 8, 16384, 128, 256), (1, 32, 8, 65536, 128, 32), (1, 32, 8, 2048, 128, 128),
          (4, 32, 8, 16384, 128, 32), (8, 32, 8, 2048, 128, 64), (1, 16, 16, 16384, 128, 64), (1, 32, 8, 16384, 64, 64)]
# B, H, Hkv, context, D, page size, dtype of the cache
BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
SCALES = {INT8: 4 / 127, FP8: 4 / 448}  # of keys and values in 8 bits: normal ones stay below 4 but for one in 16,000, which is cut off
DECODE = [(1, 32, 8, 1024, 128, None, BF16), (1, 32, 8, 8192, 128, None, BF16), (1, 32, 8, 131072, 128, None, BF16),
          (16, 32, 8, 4096, 128, None, BF16), (64, 32, 8, 4096, 128, None, BF16), (64, 32, 32, 2048, 128, None, BF16),
          (16, 16, 16, 2048, 256, None, BF16), (8, 32, 1, 32768, 128, None, BF16), (256, 32, 8, 512, 128, None, BF16),
          (16, 32, 8, 4096, 64, None, BF16)]
PAGED = [(batch, 32, 8, context, 128, page_size, BF16) for batch, context in ((1, 8192), (1, 131072), (16, 4096), (64, 4096))
         for page_size in (16, 64, 256)]
CACHE_8BIT = [(*shape, page_size, dtype) for shape in ((1, 32, 8, 131072, 128), (16, 32, 8, 4096, 128), (64, 32, 8, 4096, 128),
                                                       (64, 32, 32, 2048, 128))
              for page_size, dtype in ((None, INT8), (None, FP8), (16, FP8))]
CACHE_8BIT += [(16, 32, 8, 4096, 128, None, INT8, True), (64, 32, 8, 4096, 128, 16, INT8, True)]
PREFILL_FP8 = [(4, 16, 16, 4096, 128, True), (1, 32, 8, 16384, 128, True), (4, 16, 16, 4096, 128, False)]
# B, longest, H, D: BERT's batch of which about half are padding
VARLEN = [(32, 384, 12, 64)]

if small_sizes():
    PREFILL = [(1, 4, 4, 128, 64, True), (1, 8, 2, 128, 64, True), (2, 4, 4, 96, 64, False)]
    DECODE, PAGED, CACHE_8BIT = ([(4, 8, 2, 256, 64, page_size, dtype)] for page_size, dtype in ((None, BF16), (16, BF16), (None, INT8)))
    CACHE_8BIT = [*CACHE_8BIT, (4, 8, 2, 256, 64, 16, INT8, True)]
    VARLEN = [(4, 64, 4, 64)]
    CHUNKS = [(2, 8, 2, 128, 64, 20)]
    PREFILL_FP8 = [(1, 4, 2, 128, 128, True)]


def sdpa(backend: SDPBackend | None, **options: Any) -> Run:
    """Scaled dot product attention of inputs q, k, v laid out as ours are, by one backend, or whichever PyTorch takes."""
    def run(i: SimpleNamespace) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (i.q, i.k, i.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=getattr(i, "mask", None), enable_gqa=q.shape[1] != k.shape[1],
                                              **options).transpose(1, 2)

    def by_backend(i: SimpleNamespace) -> torch.Tensor:
        with sdpa_kernel(backend):
            return run(i)

    return run if backend is None else by_backend


def peers(**options: Any) -> dict[str, Run]:
    if small_sizes():
        return {"SDPA": sdpa(None, **options)}
    return {name: sdpa(backend, **options) for name, backend in BACKENDS.items()}


def flex(causal: bool = False) -> dict[str, Run]:
    """torch's FlexAttention, compiled for the very shapes; the mask is made once."""
    if small_sizes():
        return {}
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
    fused = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, BlockMask] = {}

    def run(i: SimpleNamespace) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (i.q, i.k, i.v))
        length = q.shape[2]
        if causal and length not in masks:
            masks[length] = create_block_mask(lambda b, h, row, column: row >= column, None, None, length, length, device=q.device)
        return fused(q, k, v, block_mask=masks.get(length), enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return {"FlexAttention": run}


def flashinfer(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, causal: bool, dtype: torch.dtype) -> dict[str, Run]:
    if not installed("flashinfer"):
        return {}
    attend = flashinfer_prefill([length] * batch, heads, kv_heads, head_dim, causal, dtype)

    def run(i: SimpleNamespace) -> torch.Tensor:
        tensors, scales = (i.narrow, i.scales) if dtype is FP8 else ((i.q, i.k, i.v), ())
        return attend(*(t.flatten(0, 1) for t in tensors), *scales).view_as(i.q)

    return {"FlashInfer, fp8" if dtype is FP8 else "FlashInfer": run}


def last_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Exact attention of the last ROWS queries of the first sequence."""
    q, k, v = q[:1, -ROWS:].float(), k[:1].float(), v[:1].float()
    positions = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device).unsqueeze(0)
    return attention_formula(q, k, v, positions, causal=causal, scale=q.shape[3] ** -0.5, window=(-1, -1))


def prefill(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, causal: bool) -> Problem:
    def make(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(q=randn(batch, length, heads, head_dim, device=device),
                               **{name: randn(batch, length, kv_heads, head_dim, device=device) for name in "kv"})

    pairs = batch * heads * length * length / (2 if causal else 1)
    return Problem("attention", f"{batch},{heads},{kv_heads},{length},{head_dim} {'causal' if causal else 'full'}", make,
                   {OURS: lambda i: ops.attention(i.q, i.k, i.v, causal=causal), **peers(is_causal=causal), **flex(causal),
                    **flashinfer(batch, heads, kv_heads, length, head_dim, causal, BF16)},
                   lambda i: last_rows(i.q, i.k, i.v, causal),
                   lambda out, i: out[:1, -ROWS:], 2 * 2 * batch * length * (heads + kv_heads) * head_dim, 4 * pairs * head_dim)


def chunk(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, queries: int) -> Problem:
    """The last `queries` tokens of sequences, causal. PyTorch's flash kernel is told that the triangle ends at the last key, cuDNN's by a
    mask."""
    from torch.nn.attention.bias import causal_lower_right

    def make(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(q=randn(batch, queries, heads, head_dim, device=device),
                               mask=torch.ones(queries, length, dtype=torch.bool, device=device).tril_(length - queries),
                               **{name: randn(batch, length, kv_heads, head_dim, device=device) for name in "kv"})

    def flash(i: SimpleNamespace) -> torch.Tensor:
        given = SimpleNamespace(q=i.q, k=i.k, v=i.v, mask=causal_lower_right(queries, length))
        return sdpa(BACKENDS["SDPA flash"])(given)

    sides = {OURS: lambda i: ops.attention(i.q, i.k, i.v, causal=True)}
    if small_sizes():
        sides["SDPA"] = sdpa(None)
    else:
        sides |= {"SDPA flash": flash, "SDPA cuDNN": sdpa(BACKENDS["SDPA cuDNN"])}
    pairs = batch * heads * (queries * length - queries * (queries - 1) / 2)
    return Problem("attention", f"{batch},{heads},{kv_heads},{length},{head_dim} last {queries}", make, sides,
                   lambda i: last_rows(i.q, i.k, i.v, True), lambda out, i: out[:1, -ROWS:],
                   4 * batch * head_dim * (queries * heads + length * kv_heads), 4 * pairs * head_dim, group="attention, last tokens")


def prefill_fp8(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, causal: bool) -> Problem:
    """8-bit q, k, v against FlashInfer's of them, and ours and PyTorch's of the same values in bfloat16."""
    def make(device: torch.device) -> SimpleNamespace:
        quantised = [quantise_heads(randn(batch, length, count, head_dim, device=device)) for count in (heads, kv_heads, kv_heads)]
        i = SimpleNamespace(narrow=[values for values, _ in quantised], scales=[scale for _, scale in quantised])
        i.q, i.k, i.v = ((values.float() * scale.unsqueeze(-1)).to(BF16) for values, scale in quantised)
        return i

    def expected(i: SimpleNamespace) -> torch.Tensor:
        return last_rows(*(values[:1].float() * scale.unsqueeze(-1) for values, scale in zip(i.narrow, i.scales, strict=True)), causal)

    pairs = batch * heads * length * length / (2 if causal else 1)
    return Problem("attention_fp8", f"{batch},{heads},{kv_heads},{length},{head_dim} {'causal' if causal else 'full'}", make,
                   {OURS: lambda i: ops.attention_fp8(*i.narrow, *i.scales, causal=causal),
                    "ftops, bf16": lambda i: ops.attention(i.q, i.k, i.v, causal=causal), **peers(is_causal=causal),
                    **flashinfer(batch, heads, kv_heads, length, head_dim, causal, FP8)}, expected,
                   lambda out, i: out[:1, -ROWS:], 2 * batch * length * (1.5 * heads + kv_heads) * head_dim, 4 * pairs * head_dim,
                   format_error=0.125)


def decode(batch: int, heads: int, kv_heads: int, context: int, head_dim: int, page_size: int | None, dtype: torch.dtype,
           tokens: bool = False) -> Problem:
    """One new token a sequence; tokens: an 8-bit cache has a scale a token and head, not a head. PyTorch's peers read the same keys and
    values contiguous and in bfloat16, FlashInfer reads our caches."""
    def make(device: torch.device) -> SimpleNamespace:
        i = SimpleNamespace(q=randn(batch, 1, heads, head_dim, device=device),
                            lengths=torch.full((batch,), context, dtype=torch.int32, device=device), options={},
                            **{name: randn(batch, context, kv_heads, head_dim, device=device) for name in "kv"})
        i.caches = [i.k, i.v]
        if dtype is not BF16:
            a_head = torch.full((kv_heads,), SCALES[dtype], device=device)
            scales = [token_scales(cache, dtype) if tokens else a_head for cache in i.caches]
            i.caches = [to_cache(*pair) for pair in zip(i.caches, (dtype, dtype), scales, strict=True)]
            i.k, i.v = ((cache.float() * scale.unsqueeze(-1)).to(BF16) for cache, scale in zip(i.caches, scales, strict=True))
            i.options = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        if page_size is not None:
            same = torch.Generator(device).manual_seed(0)  # for all sets of inputs: FlashInfer's plan is of one table
            table = torch.randperm(batch * (context // page_size), device=device, generator=same)
            i.caches = [_paged(cache, table, page_size) for cache in i.caches]
            if tokens:
                i.options = {name: _paged(scale, table, page_size) for name, scale in i.options.items()}
            i.options["page_table"] = table.view(batch, -1).to(torch.int32)
        return i

    def expected(i: SimpleNamespace) -> torch.Tensor:
        table = i.options.get("page_table")
        caches = i.caches if table is not None else [cache[:1] for cache in i.caches]
        scales = [i.options.get(name) for name in ("k_scale", "v_scale")]
        if tokens and table is None:
            scales = [scale[:1] for scale in scales]
        return decode_reference(i.q[:1].float(), *caches, i.lengths[:1], None if table is None else table[:1], head_dim ** -0.5, -1, 0.0,
                                None, None, *scales)

    name = f"{batch},{heads},{kv_heads},{context},{head_dim}" + (f" page {page_size}" if page_size else "")
    name += {INT8: " int8", FP8: " fp8"}.get(dtype, "") + (", scales of tokens" if tokens else "")
    sides = {OURS: lambda i: ops.decode_attention(i.q, *i.caches, i.lengths, **i.options)}
    group = "decode_attention"
    if dtype is not BF16:
        group += ", 8-bit cache"
    elif page_size is not None:
        group += ", paged"
    if group != "decode_attention":
        sides["ftops, contiguous bf16"] = lambda i: ops.decode_attention(i.q, i.k, i.v, i.lengths)
    sides |= {**peers(), **(flex() if group == "decode_attention" else {})}
    if dtype is not INT8 and not tokens:  # which FlashInfer does not read
        sides |= flashinfer_decode(batch, heads, kv_heads, context, head_dim, page_size, dtype, SCALES.get(dtype))
    return Problem("decode_attention", name, make, sides, expected,
                   lambda out, i: out[:1],
                   2 * batch * context * kv_heads * (head_dim * dtype.itemsize + 4 * tokens) + 4 * batch * heads * head_dim,
                   group=group)


def _paged(cache: torch.Tensor, table: torch.Tensor, page_size: int) -> torch.Tensor:
    """[B,S,Hkv,D] or [B,S,Hkv] as pages in the order of `table`."""
    pages = cache.view(-1, page_size, *cache.shape[2:])
    pool = torch.empty_like(pages)
    pool[table] = pages
    return pool


def varlen(batch: int, longest: int, heads: int, head_dim: int) -> Problem:
    """Sequences of lengths from 1 to `longest`, packed; SDPA is given them padded, with the mask that hides the padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    lengths[0] = longest
    total = int(lengths.sum())

    def make(device: torch.device) -> SimpleNamespace:
        i = SimpleNamespace(**{name: randn(batch, longest, heads, head_dim, device=device) for name in "qkv"})
        i.valid = torch.arange(longest, device=device) < lengths.to(device).unsqueeze(-1)
        i.mask = i.valid[:, None, None]
        i.packed = [t[i.valid] for t in (i.q, i.k, i.v)]
        i.starts = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        return i

    def expected(i: SimpleNamespace) -> torch.Tensor:
        q, k, v = (t[:1].float() for t in (i.q, i.k, i.v))
        return attention_formula(q, k, v, torch.arange(longest, device=q.device).unsqueeze(0), causal=False, scale=head_dim ** -0.5,
                                 window=(-1, -1))[0]

    def flash(i: SimpleNamespace) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(*i.packed, i.starts, i.starts, longest, longest)

    sides = {OURS: lambda i: ops.attention_varlen(*i.packed, i.starts, i.starts, longest, longest)}
    if not small_sizes():
        sides["torch varlen (flash)"] = flash
        sides["SDPA cuDNN, padded"] = sdpa(BACKENDS["SDPA cuDNN"])
        if installed("flashinfer"):
            attend = flashinfer_prefill(lengths.tolist(), heads, heads, head_dim, causal=False)
            sides["FlashInfer"] = lambda i: attend(*i.packed)
    else:
        sides["SDPA, padded"] = sdpa(None)
    return Problem("attention_varlen", f"{batch} x 1-{longest}, {heads},{head_dim}", make, sides, expected,
                   lambda out, i: (out[0] if out.dim() == 4 else out)[:longest], 2 * 4 * total * heads * head_dim,
                   4 * heads * head_dim * float((lengths ** 2).sum()))


PROBLEMS = [*(prefill(*shape) for shape in PREFILL), *(chunk(*shape) for shape in CHUNKS),
            *(prefill_fp8(*shape) for shape in PREFILL_FP8),
            *(varlen(*shape) for shape in VARLEN), *(decode(*shape) for shape in (*DECODE, *PAGED, *CACHE_8BIT))]
