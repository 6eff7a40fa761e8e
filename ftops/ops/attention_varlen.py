"""Fused attention of sequences packed end to end, so that padding costs nothing.

Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. The formula with every option is in `ftops/formula.py`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch

from ftops.op import Case, check_beside, invalid, register, straight
from ftops.ops.attention import _cpu as attention_cpu
from ftops.ops.attention import check_heads, check_options, check_window
from ftops.ops.attention import reference as attention_reference
from ftops.samples import integers, randn

KERNEL = "attention"  # its file serves both ops


def _each(attend: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor,
          max_seqlen_q: int, max_seqlen_kv: int, causal: bool, scale: float, window_left: int, window_right: int, softcap: float,
          alibi_slopes: torch.Tensor | None) -> torch.Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts_q, starts_kv = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
    for row, key, row_end, key_end in zip(starts_q, starts_kv, starts_q[1:], starts_kv[1:], strict=False):
        out[row:row_end] = attend(q[None, row:row_end], k[None, key:key_end], v[None, key:key_end], causal, scale, window_left,
                                  window_right, softcap, None, alibi_slopes, None)[0]
    return out


def reference(*args: object) -> torch.Tensor:
    return _each(attention_reference, *args)


def _cpu(*args: object) -> torch.Tensor:
    return _each(attention_cpu, *args)


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.attention import launch_varlen
    return launch_varlen


ATTENTION_VARLEN = register(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_kv, SymInt max_seqlen_q, SymInt max_seqlen_kv, "
    "bool causal, float scale, int window_left, int window_right, float softcap, Tensor? alibi_slopes) -> Tensor",
    cpu=_cpu, cuda=_cuda, fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device))
_attention_varlen = straight(ATTENTION_VARLEN)


def attention_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor,
                     max_seqlen_q: int, max_seqlen_kv: int, *, causal: bool = False, scale: float | None = None,
                     window: tuple[int, int] | None = None, softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None) -> torch.Tensor:
    """Attention within each of B packed sequences: q[T,H,D] over k and v[Tk,Hkv,D]. Returns [T,H,D], contiguous.

    cu_seqlens_q and cu_seqlens_kv, int32 [B + 1], run from 0 to T and to Tk and do not fall; rows of q past the last one belong to no
    sequence and their results are undefined. max_seqlen_q and max_seqlen_kv bound the lengths. The options are those of
    `attention`, per sequence. float32, float16 or bfloat16, any strides. Raises ValueError.
    On a GPU a sequence's result has the same bits whatever is packed with it: no kernel splits the keys of a sequence.
    """
    op = "attention_varlen"
    check_heads(op, q, k, v, 3)
    check_beside(op, q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, alibi_slopes=alibi_slopes)
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if len(starts.shape) != 1 or not starts.shape[0] or starts.dtype is not torch.int32:
            raise invalid(op, name, f"{starts.dtype} {tuple(starts.shape)}", "int32 [B + 1]")
    if cu_seqlens_kv.shape != cu_seqlens_q.shape:
        raise invalid(op, "cu_seqlens_kv.shape", tuple(cu_seqlens_kv.shape), f"cu_seqlens_q's, {tuple(cu_seqlens_q.shape)}")
    left, right = check_window(op, window)
    check_options(op, q.shape[1], softcap, alibi_slopes)
    return _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, causal,
                            q.shape[-1] ** -0.5 if scale is None else scale, left, right, softcap, alibi_slopes)


def _sample(device: torch.device, dtype: torch.dtype, lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...], *, heads: int = 4,
            kv_heads: int = 2, head_dim: int = 64, alibi: bool = False, **options: object) -> tuple[tuple, dict]:
    starts_q, starts_kv = (integers([0, *accumulate(lengths)], device) for lengths in (lengths_q, lengths_kv))
    q = randn((sum(lengths_q), heads, head_dim), device, dtype)
    k, v = (randn((sum(lengths_kv), kv_heads, head_dim), device, dtype) for _ in range(2))
    if alibi:
        options["alibi_slopes"] = (2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)).to(device)
    return (q, k, v, starts_q, starts_kv, max(lengths_q, default=0), max(lengths_kv, default=0)), options


def cases() -> Iterator[Case]:
    ragged = (97, 1, 0, 200, 3)
    samples = {
        "ragged": (ragged, ragged, {}), "causal": (ragged, ragged, {"causal": True}), "one": ((130,), (130,), {"causal": True}),
        "d128": (ragged, ragged, {"head_dim": 128, "causal": True}), "d40": (ragged, ragged, {"head_dim": 40}),
        "d256": (ragged, ragged, {"head_dim": 256, "causal": True}), "d59": (ragged, ragged, {"head_dim": 59, "heads": 3, "kv_heads": 1}),
        "cross": ((5, 70, 3), (90, 2, 0), {"causal": True}), "decode": ((1, 1, 1), (90, 2, 300), {"causal": True}),
        "window": ((300, 7), (300, 7), {"window": (50, 0)}), "window_shifted": ((30, 7), (300, 90), {"causal": True, "window": (50, -1)}),
        "softcap": (ragged, ragged, {"softcap": 5.0}), "alibi": (ragged, ragged, {"alibi": True, "causal": True}),
        "scale": (ragged, ragged, {"scale": 0.3}), "many": ((3,) * 200, (5,) * 200, {"causal": True}),
        "no_sequences": ((), (), {}), "no_tokens": ((0, 0), (0, 0), {}),
    }
    for name, (lengths_q, lengths_kv, options) in samples.items():
        yield Case(name, lambda device, dtype, a=lengths_q, b=lengths_kv, options=options: _sample(device, dtype, a, b, **options))

    def fused(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """q, k and v as views of one packed QKV buffer."""
        (_, _, _, *starts), options = _sample(device, dtype, ragged, ragged, causal=True)
        qkv = randn((sum(ragged), 8, 64), device, dtype)
        return (*qkv.split((4, 2, 2), 1), *starts), options

    yield Case("fused", fused)
