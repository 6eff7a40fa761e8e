"""Attention of whole sequences with q, k and v in 8 bits (float8_e4m3fn), a scale a head: softmax(scale q k^T) v.

    q[b, i, h] stands for q_scale[h] * q[b, i, h], k and v likewise; the weights are rounded to e4m3 too before they meet v.
Shah et al., "FlashAttention-3", 2024, section 3.3.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.formula import attention_formula
from ftops.op import Case, check_beside, invalid, register, straight
from ftops.ops.attention import MAX_HEAD_DIM, check_window
from ftops.samples import randn

E4M3 = torch.float8_e4m3fn
KERNEL = "attention"  # its file serves this op too


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_scale: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor,
              causal: bool, scale: float, window_left: int, window_right: int) -> torch.Tensor:
    """With weights that are not rounded, in bfloat16; in float64 where the scales are."""
    wide = q_scale.dtype
    q, k, v = (t.to(wide) * s.unsqueeze(-1) for t, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    positions = torch.arange(q.shape[1], device=q.device).unsqueeze(0) + (k.shape[1] - q.shape[1])
    out = attention_formula(q, k, v, positions, causal=causal, scale=scale, window=(window_left, window_right))
    return out if wide is torch.float64 else out.to(torch.bfloat16)


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.attention import launch_fp8
    return launch_fp8


ATTENTION_FP8 = register(
    "attention_fp8(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, bool causal, float scale, "
    "int window_left, int window_right) -> Tensor",
    cpu=reference, cuda=_cuda, fake=lambda q, *_: torch.empty(q.shape, dtype=torch.bfloat16, device=q.device))
_attention_fp8 = straight(ATTENTION_FP8)


def attention_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_scale: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor,
                  *, causal: bool = False, scale: float | None = None, window: tuple[int, int] | None = None) -> torch.Tensor:
    """Attention of q[B,Sq,H,D] over k and v[B,Skv,Hkv,D], all float8_e4m3fn, H a multiple of Hkv. Returns [B,Sq,H,D] bfloat16, contiguous.

    q_scale[H], k_scale[Hkv], v_scale[Hkv]: float32, positive, what a head's 8-bit values are multiplied by. causal, scale and window are
    those of `attention`. On Hopper up to head_dim 128 products are taken in 8 bits, at a relative error of about 0.03 beside that of
    quantising q, k and v, and are added in 14 bits: a column of v that is all of one sign loses up to a fifth over 16384 keys that share
    the weight. Elsewhere in 16. Any strides. Raises ValueError.
    """
    op = "attention_fp8"
    check_beside(op, getattr(q, "device", None), q=q, k=k, v=v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    shape, keys = q.shape, k.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype is not E4M3 or tensor.dim() != 4:
            raise invalid(op, name, f"{tensor.dtype} of {tensor.dim()} dimensions", "float8_e4m3fn of 4, batch, sequence, heads, head_dim")
    if v.shape != keys:
        raise invalid(op, "v.shape", tuple(v.shape), f"k's, {tuple(keys)}")
    if keys[0] != shape[0] or keys[3] != shape[3]:
        raise invalid(op, "k.shape", tuple(keys), f"[{shape[0]}, Skv, Hkv, {shape[3]}], q's batch size and head_dim")
    if not 0 < shape[3] <= MAX_HEAD_DIM:
        raise invalid(op, "head_dim", shape[3], f"1 to {MAX_HEAD_DIM}")
    if not keys[2] or shape[2] % keys[2]:
        raise invalid(op, "q's heads", shape[2], f"a multiple of the {keys[2]} kv heads")
    for name, tensor, heads in (("q_scale", q_scale, shape[2]), ("k_scale", k_scale, keys[2]), ("v_scale", v_scale, keys[2])):
        if tensor.dtype is not torch.float32 or tensor.shape != (heads,):
            raise invalid(op, name, f"{tensor.dtype} {tuple(tensor.shape)}", f"float32 ({heads},)")
    left, right = check_window(op, window)
    return _attention_fp8(q, k, v, q_scale, k_scale, v_scale, causal, shape[3] ** -0.5 if scale is None else scale, left, right)


def quantise_heads(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(t[B,S,H,D] in e4m3, scales[H] float32), the highest of a head at 448."""
    scale = t.float().abs().amax((0, 1, 3)).clamp(min=1e-12) / 448 if t.numel() else t.new_ones(t.shape[2], dtype=torch.float32)
    return (t.float() / scale.unsqueeze(-1)).to(E4M3), scale


def _sample(device: torch.device, *, batch: int = 2, sq: int = 97, skv: int = 97, heads: int = 4, kv_heads: int = 4, head_dim: int = 128,
            **options: object) -> tuple[tuple, dict]:
    quantised = [quantise_heads(randn((batch, length, count, head_dim), device, torch.float32))
                 for length, count in ((sq, heads), (skv, kv_heads), (skv, kv_heads))]
    return (*(values for values, _ in quantised), *(scale for _, scale in quantised)), options


def cases() -> Iterator[Case]:
    samples = {
        "full": {"sq": 257, "skv": 257}, "causal": {"sq": 130, "skv": 130, "causal": True}, "one_query": {"sq": 1, "skv": 200},
        "bottom_right": {"sq": 33, "skv": 200, "causal": True}, "more_queries": {"sq": 200, "skv": 33, "causal": True},
        "gqa": {"heads": 8, "kv_heads": 2, "causal": True}, "window": {"sq": 300, "skv": 300, "window": (64, 0)},
        "window_both": {"sq": 300, "skv": 300, "window": (10, 20)}, "scale": {"scale": 0.2}, "d64": {"head_dim": 64, "causal": True},
        "d59": {"head_dim": 59}, "d256": {"head_dim": 256}, "long": {"sq": 1023, "skv": 1025, "heads": 2, "kv_heads": 1, "causal": True},
        "empty_batch": {"batch": 0}, "no_queries": {"sq": 0}, "no_keys": {"skv": 0},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, **options), dtypes=(torch.bfloat16,))

    def strided(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """q, k, v as [B,H,S,D] in memory, and rows of k that do not begin on 16 bytes."""
        (q, k, v, *scales), options = _sample(device, sq=70, skv=70, causal=True)
        q, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, v))
        k = torch.cat([k.view(torch.int8), k.view(torch.int8)[..., :3]], -1)[..., :128].view(E4M3)
        return (q, k, v, *scales), options

    yield Case("strided", strided, dtypes=(torch.bfloat16,))
