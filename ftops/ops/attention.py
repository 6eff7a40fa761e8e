"""Fused attention of whole sequences: softmax(scale q k^T + ...) v without the scores ever in memory.

Dao et al., "FlashAttention", 2022, and Dao, "FlashAttention-2", 2023. The formula with every option is in `ftops/formula.py`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ftops.formula import attention_formula, visible_keys
from ftops.op import Case, check_beside, check_tensors, invalid, register, straight
from ftops.samples import integers, randn

MAX_HEAD_DIM = 256
DIMENSIONS = {3: "tokens, heads, head_dim", 4: "batch, sequence, heads, head_dim"}


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, window_left: int, window_right: int,
              softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None,
              kv_lengths: torch.Tensor | None) -> torch.Tensor:
    positions = torch.arange(q.shape[1], device=q.device).unsqueeze(0) + (k.shape[1] - q.shape[1])
    return attention_formula(q, k, v, positions, causal=causal, scale=scale, window=(window_left, window_right), softcap=softcap,
                             bias=bias, alibi_slopes=alibi_slopes, kv_lengths=kv_lengths)


def _cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, window_left: int, window_right: int,
         softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None, kv_lengths: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's own CPU attention, causal and window put into its mask; the formula for what no mask can say."""
    queries, keys = q.shape[1], k.shape[1]
    if softcap or alibi_slopes is not None or kv_lengths is not None or keys == 0:
        return reference(q, k, v, causal, scale, window_left, window_right, softcap, bias, alibi_slopes, kv_lengths)
    causal = causal and queries > 1  # the last query sees every key
    if window_left >= 0 or window_right >= 0 or (causal and (bias is not None or queries != keys)):
        positions = torch.arange(keys - queries, keys, device=q.device).unsqueeze(0)
        visible = visible_keys(positions, keys, causal, (window_left, window_right), None).unsqueeze(1)
        bias, causal = visible if bias is None else bias.masked_fill(~visible, float("-inf")), False
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, is_causal=causal,
                                         scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2).contiguous()


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.attention import launch
    return launch


ATTENTION = register(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, int window_left, int window_right, float softcap, "
    "Tensor? bias, Tensor? alibi_slopes, Tensor? kv_lengths) -> Tensor",
    cpu=_cpu, cuda=_cuda, fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device))
_attention = straight(ATTENTION)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None,
              window: tuple[int, int] | None = None, softcap: float = 0.0, bias: torch.Tensor | None = None,
              alibi_slopes: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of q[B,Sq,H,D] over k and v[B,Skv,Hkv,D]; H is a multiple of Hkv (GQA, MQA). Returns [B,Sq,H,D], contiguous.

    causal is aligned to the bottom right: query i sits at key Skv - Sq + i. scale defaults to D ** -0.5. window = (left, right) in
    tokens around that place, -1 is unbounded. softcap c > 0 turns scores into c tanh(score / c). bias, in q's dtype or float32,
    broadcasts to [B,H,Sq,Skv] and is added; -inf hides a key. alibi_slopes[H] float32 subtract slope * distance.
    kv_lengths[B] int32 hides keys at and beyond it. A row with nothing to attend to gives 0.
    float32, float16 or bfloat16 (softmax and sums in float32), any strides. Raises ValueError.
    On a GPU, in 16 bits, a sequence's result has the same bits in any batch of the same Sq and Skv, except where few queries meet many
    keys on Hopper: there the size of the batch says into how many parts the keys are split, and `attention_varlen` splits none.
    """
    check_heads("attention", q, k, v, 4)
    check_beside("attention", q.device, bias=bias, alibi_slopes=alibi_slopes, kv_lengths=kv_lengths)
    batch, queries, heads, head_dim = q.shape
    if k.shape[0] != batch:
        raise invalid("attention", "k.shape", tuple(k.shape), f"[{batch}, Skv, Hkv, {head_dim}], q's batch size")
    left, right = check_window("attention", window)
    check_options("attention", heads, softcap, alibi_slopes)
    if bias is not None:
        bias = check_bias("attention", bias, q, (batch, heads, queries, k.shape[1]))
    if kv_lengths is not None and (kv_lengths.shape != (batch,) or kv_lengths.dtype is not torch.int32):
        raise invalid("attention", "kv_lengths", f"{kv_lengths.dtype} {tuple(kv_lengths.shape)}", f"int32 ({batch},)")
    return _attention(q, k, v, causal, head_dim ** -0.5 if scale is None else scale, left, right, softcap, bias, alibi_slopes, kv_lengths)


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dims: int) -> None:
    """q, k, v of `dims` dimensions: one dtype and head_dim, k and v alike, and query heads a multiple of the kv heads."""
    check_tensors(op, q=q, k=k, v=v)
    shape, keys = q.shape, k.shape
    if len(shape) != dims or len(keys) != dims:
        raise invalid(op, "q.shape, k.shape", (tuple(shape), tuple(keys)), f"{dims} dimensions, {DIMENSIONS[dims]}")
    if v.shape != keys:
        raise invalid(op, "v.shape", tuple(v.shape), f"k's, {tuple(keys)}")
    if keys[-1] != shape[-1]:
        raise invalid(op, "k's head_dim", keys[-1], f"q's, {shape[-1]}")
    if not 0 < shape[-1] <= MAX_HEAD_DIM:
        raise invalid(op, "head_dim", shape[-1], f"1 to {MAX_HEAD_DIM}")
    if not keys[-2] or shape[-2] % keys[-2]:
        raise invalid(op, "q's heads", shape[-2], f"a multiple of the {keys[-2]} kv heads")


def check_window(op: str, window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2 or window[0] < -1 or window[1] < -1:
        raise invalid(op, "window", window, "(left, right) in tokens, each -1 (unbounded) or more")
    return window[0], window[1]


def check_bias(op: str, bias: torch.Tensor, q: torch.Tensor, full: tuple[int, ...]) -> torch.Tensor:
    """bias, in q's dtype or float32, broadcast to `full`."""
    if bias.dtype is not q.dtype and bias.dtype is not torch.float32:
        raise invalid(op, "bias.dtype", bias.dtype, f"{q.dtype} or torch.float32")
    shape = bias.shape
    if shape == full:
        return bias
    if len(shape) > 4 or any(have != 1 and have != want for have, want in zip(reversed(shape), reversed(full), strict=False)):
        raise invalid(op, "bias.shape", tuple(shape), f"broadcastable to {tuple(full)}")
    return bias.expand(full)


def check_options(op: str, heads: int, softcap: float, alibi_slopes: torch.Tensor | None) -> None:
    if softcap < 0:
        raise invalid(op, "softcap", softcap, "0 (off) or more")
    if alibi_slopes is not None and (alibi_slopes.shape != (heads,) or alibi_slopes.dtype is not torch.float32):
        raise invalid(op, "alibi_slopes", f"{alibi_slopes.dtype} {tuple(alibi_slopes.shape)}", f"float32 ({heads},)")


def _sample(device: torch.device, dtype: torch.dtype, *, batch: int = 2, sq: int = 97, skv: int = 97, heads: int = 4, kv_heads: int = 4,
            head_dim: int = 64, bias: tuple[int, ...] | None = None, bias_dtype: torch.dtype | None = None, masked: bool = False,
            alibi: bool = False, lengths: tuple[int, ...] | None = None, **options: object) -> tuple[tuple, dict]:
    q = randn((batch, sq, heads, head_dim), device, dtype)
    k, v = (randn((batch, skv, kv_heads, head_dim), device, dtype) for _ in range(2))
    if bias is not None:
        options["bias"] = randn(bias, device, bias_dtype or dtype)
        if masked:
            options["bias"] = options["bias"].masked_fill(torch.rand(bias).to(device) < 0.3, float("-inf"))
            options["bias"][..., :1, :] = float("-inf")
    if alibi:
        options["alibi_slopes"] = (2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)).to(device)
    if lengths is not None:
        options["kv_lengths"] = integers(lengths, device)
        for row, length in enumerate(lengths):
            k[row, length:], v[row, length:] = float("nan"), float("nan")
    return (q, k, v), options


def cases() -> Iterator[Case]:
    samples = {f"d{d}": {"head_dim": d, "sq": 130, "skv": 130, "causal": True}
               for d in (8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)}
    gqa = {"heads": 8, "kv_heads": 2, "head_dim": 128}
    samples |= {
        "full": {"sq": 257, "skv": 257}, "one_query": {"sq": 1, "skv": 200, "causal": True}, "one_key": {"sq": 5, "skv": 1},
        "bottom_right": {"sq": 33, "skv": 200, "causal": True}, "more_queries": {"sq": 200, "skv": 33, "causal": True},
        "gqa": gqa | {"causal": True}, "mqa": {"heads": 8, "kv_heads": 1, "causal": True}, "three_heads": {"heads": 9, "kv_heads": 3},
        "window": {"sq": 300, "skv": 300, "window": (64, 0)}, "window_both": {"sq": 300, "skv": 300, "window": (10, 20)},
        "window_causal": {"sq": 300, "skv": 300, "causal": True, "window": (64, -1)},
        "window_self": {"window": (0, 0)}, "window_shifted": {"sq": 33, "skv": 300, "causal": True, "window": (40, -1)},
        "window_query": {"sq": 1, "skv": 300, "causal": True, "window": (40, -1)},
        "softcap": {"softcap": 5.0, "causal": True}, "alibi": {"alibi": True, "causal": True}, "alibi_both": {"alibi": True, "sq": 33},
        "bias": {"bias": (1, 4, 97, 97)}, "bias_float32": {"bias": (1, 4, 97, 97), "bias_dtype": torch.float32, "causal": True},
        "bias_2d": {"bias": (33, 97), "sq": 33}, "bias_query": {"sq": 1, "bias": (2, 1, 1, 97), "causal": True},
        "bias_row": {"bias": (2, 4, 97, 97), "masked": True}, "bias_masked": {"bias": (2, 1, 97, 97), "masked": True, "causal": True},
        "bias_window": {"bias": (2, 1, 97, 97), "window": (30, 5)},
        "bias_key": {"bias": (2, 1, 1, 97)}, "bias_key_float32": {"bias": (1, 4, 1, 97), "bias_dtype": torch.float32, "causal": True},
        "bias_long": {"bias": (1, 2, 300, 700), "sq": 300, "skv": 700, "heads": 2, "kv_heads": 1, "head_dim": 128},
        "lengths": {"lengths": (50, 97)}, "lengths_zero": {"lengths": (0, 1), "causal": True}, "scale": {"scale": 1.0, "head_dim": 32},
        "everything": gqa | {"sq": 70, "causal": True, "window": (50, -1), "softcap": 5.0, "bias": (1, 8, 70, 97), "alibi": True,
                             "lengths": (97, 41), "scale": 0.2},
        "empty_batch": {"batch": 0}, "no_queries": {"sq": 0}, "no_keys": {"skv": 0},
        "long": {"sq": 1023, "skv": 1025, "heads": 2, "kv_heads": 1, "causal": True},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, dtype, **options))

    def strided(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """q, k, v as Hugging Face holds them: [B,H,S,D] in memory; v with a strided head_dim."""
        q, k = (randn((2, 4, 70, 64), device, dtype).transpose(1, 2) for _ in range(2))
        return (q, k, randn((2, 70, 4, 128), device, dtype)[..., ::2]), {"causal": True}

    def fused(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        qkv = randn((2, 70, 8, 80), device, dtype)
        return (qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]), {"causal": True}

    def bias_strided(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """A bias whose keys are not adjacent in memory, as a relative-position table permuted to heads first."""
        arguments, options = _sample(device, dtype, sq=33)
        return arguments, options | {"bias": randn((1, 97, 33, 4), device, dtype).permute(0, 3, 2, 1)}

    yield Case("strided", strided)
    yield Case("bias_strided", bias_strided)
    yield Case("fused", fused)
