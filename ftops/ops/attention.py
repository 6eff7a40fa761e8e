"""Fused attention of whole sequences: softmax(scale q k^T + ...) v without the scores ever in memory.

Dao et al., "FlashAttention", 2022, and Dao, "FlashAttention-2", 2023. The formula with every option is in `ftops/formula.py`.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ftops.formula import attention_formula, visible_keys
from ftops.op import Case, register, require, require_device, require_dtype, require_no_grad
from ftops.samples import integers, randn


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, window_left: int, window_right: int,
              softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None, kv_lengths: torch.Tensor | None) -> torch.Tensor:
    positions = torch.arange(q.shape[1], device=q.device).unsqueeze(0) + (k.shape[1] - q.shape[1])
    return attention_formula(q, k, v, positions, causal=causal, scale=scale, window=(window_left, window_right), softcap=softcap,
                             bias=bias, alibi_slopes=alibi_slopes, kv_lengths=kv_lengths)


def _cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, window_left: int, window_right: int,
         softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None, kv_lengths: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's own CPU attention where it gives the same answer, otherwise the formula."""
    square = q.shape[1] == k.shape[1] or (q.shape[1] == 1 and bias is None)
    plain = not softcap and alibi_slopes is None and kv_lengths is None and window_left < 0 and window_right < 0
    if not plain or (causal and not square) or (causal and bias is not None) or k.shape[1] == 0:
        if softcap or alibi_slopes is not None or kv_lengths is not None or k.shape[1] == 0:
            return reference(q, k, v, causal, scale, window_left, window_right, softcap, bias, alibi_slopes, kv_lengths)
        positions = torch.arange(q.shape[1], device=q.device).unsqueeze(0) + (k.shape[1] - q.shape[1])
        visible = visible_keys(positions, k.shape[1], causal, (window_left, window_right), None).unsqueeze(1)
        bias = visible if bias is None else bias.masked_fill(~visible, float("-inf"))
        causal = False
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias,
                                         is_causal=causal and q.shape[1] > 1, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2).contiguous()


def _cuda(q: torch.Tensor, *args: object) -> torch.Tensor:
    from ftops.numba_kernels.attention import launch
    return launch(q, *args)


ATTENTION = register(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, int window_left, int window_right, float softcap, "
    "Tensor? bias, Tensor? alibi_slopes, Tensor? kv_lengths) -> Tensor",
    cpu=_cpu, cuda=_cuda, fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None,
              window: tuple[int, int] | None = None, softcap: float = 0.0, bias: torch.Tensor | None = None,
              alibi_slopes: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of q[B,Sq,H,D] over k and v[B,Skv,Hkv,D]; H is a multiple of Hkv (GQA, MQA). Returns [B,Sq,H,D], contiguous.

    causal is aligned to the bottom right: query i sits at key Skv - Sq + i. scale defaults to D ** -0.5. window = (left, right) in
    tokens around that place, -1 is unbounded. softcap c > 0 turns scores into c tanh(score / c). bias, in q's dtype or float32,
    broadcasts to [B,H,Sq,Skv] and is added; -inf hides a key. alibi_slopes[H] float32 subtract slope * distance.
    kv_lengths[B] int32 hides keys at and beyond it. A row with nothing to attend to gives 0.
    float32, float16 or bfloat16 (softmax and sums in float32), any strides. Raises ValueError.
    """
    require_no_grad("attention", q, k, v, bias)
    check_heads("attention", q, k, v)
    require(q.dim() == 4 and k.shape[0] == q.shape[0], "attention", "q.shape, k.shape", (tuple(q.shape), tuple(k.shape)), "[B,Sq,H,D] and [B,Skv,Hkv,D] with one B")
    left, right = check_window("attention", window)
    require_device("attention", q=q, k=k, v=v, bias=bias, alibi_slopes=alibi_slopes, kv_lengths=kv_lengths)
    check_options("attention", q, softcap, alibi_slopes)
    if bias is not None:
        check_bias("attention", bias, q, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        bias = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if kv_lengths is not None:
        require(kv_lengths.shape == q.shape[:1] and kv_lengths.dtype is torch.int32, "attention", "kv_lengths",
                f"{kv_lengths.dtype} {tuple(kv_lengths.shape)}", f"int32 ({q.shape[0]},)")
    return ATTENTION(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale, left, right, softcap, bias, alibi_slopes, kv_lengths)


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q, k, v: one dtype, one head_dim, k and v alike, and query heads a multiple of the kv heads."""
    require_dtype(op, q=q, k=k, v=v)
    require(k.dim() == q.dim() and v.shape == k.shape, op, "k.shape, v.shape", (tuple(k.shape), tuple(v.shape)), f"two alike, of {q.dim()} dimensions")
    require(k.shape[-1] == q.shape[-1], op, "k's head_dim", k.shape[-1], f"q's, {q.shape[-1]}")
    require(0 < q.shape[-1] <= 256, op, "head_dim", q.shape[-1], "1 to 256")
    require(k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0, op, "q's heads", q.shape[-2], f"a multiple of the {k.shape[-2]} kv heads")


def check_window(op: str, window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    require(len(window) == 2 and min(window) >= -1, op, "window", window, "(left, right) in tokens, each -1 (unbounded) or more")
    return window[0], window[1]


def check_bias(op: str, bias: torch.Tensor, q: torch.Tensor, shape: tuple[int, ...]) -> None:
    """bias: q's dtype or float32, broadcastable to `shape`."""
    require(bias.dtype in (q.dtype, torch.float32), op, "bias.dtype", bias.dtype, f"{q.dtype} or torch.float32")
    fits = bias.dim() <= 4 and all(b in (1, s) for b, s in zip(reversed(bias.shape), reversed(shape), strict=False))
    require(fits, op, "bias.shape", tuple(bias.shape), f"broadcastable to {shape}")


def check_options(op: str, q: torch.Tensor, softcap: float, alibi_slopes: torch.Tensor | None) -> None:
    require(softcap >= 0, op, "softcap", softcap, "0 (off) or more")
    if alibi_slopes is not None:
        require(alibi_slopes.shape == (q.shape[-2],) and alibi_slopes.dtype is torch.float32, op, "alibi_slopes",
                f"{alibi_slopes.dtype} {tuple(alibi_slopes.shape)}", f"float32 ({q.shape[-2]},)")


def _sample(device: torch.device, dtype: torch.dtype, *, batch: int = 2, sq: int = 97, skv: int = 97, heads: int = 4, kv_heads: int = 4,
            head_dim: int = 64, bias: tuple[int, ...] | None = None, masked: bool = False, alibi: bool = False,
            lengths: tuple[int, ...] | None = None, **options: object) -> tuple[tuple, dict]:
    q = randn((batch, sq, heads, head_dim), device, dtype)
    k, v = (randn((batch, skv, kv_heads, head_dim), device, dtype) for _ in range(2))
    if bias is not None:
        options["bias"] = randn(bias, device, dtype)
        if masked:
            options["bias"] = options["bias"].masked_fill(torch.rand(bias).to(device) < 0.3, float("-inf"))
    if alibi:
        options["alibi_slopes"] = (2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)).to(device)
    if lengths is not None:
        options["kv_lengths"] = integers(lengths, device)
        for row, length in enumerate(lengths):
            k[row, length:], v[row, length:] = float("nan"), float("nan")
    return (q, k, v), options


def cases() -> Iterator[Case]:
    samples = {f"d{d}": {"head_dim": d, "sq": 130, "skv": 130, "causal": True} for d in (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)}
    samples |= {
        "full": {"sq": 257, "skv": 257}, "one_query": {"sq": 1, "skv": 200, "causal": True}, "one_key": {"sq": 5, "skv": 1},
        "bottom_right": {"sq": 33, "skv": 200, "causal": True}, "more_queries": {"sq": 200, "skv": 33, "causal": True},
        "gqa": {"heads": 8, "kv_heads": 2, "head_dim": 128, "causal": True}, "mqa": {"heads": 8, "kv_heads": 1, "causal": True},
        "window": {"sq": 300, "skv": 300, "window": (64, 0)}, "window_both": {"sq": 300, "skv": 300, "window": (10, 20)},
        "window_causal": {"sq": 300, "skv": 300, "causal": True, "window": (64, -1)}, "softcap": {"softcap": 5.0, "causal": True},
        "alibi": {"alibi": True, "causal": True}, "bias": {"bias": (1, 4, 97, 97)}, "bias_row": {"bias": (2, 1, 1, 97), "masked": True},
        "bias_masked": {"bias": (2, 4, 97, 97), "masked": True, "causal": True}, "lengths": {"lengths": (50, 97)},
        "lengths_zero": {"lengths": (0, 1), "causal": True}, "scale": {"scale": 1.0, "head_dim": 32},
        "empty_batch": {"batch": 0}, "no_queries": {"sq": 0}, "no_keys": {"skv": 0}, "long": {"sq": 1023, "skv": 1025, "heads": 2, "kv_heads": 1, "causal": True},
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

    yield Case("strided", strided)
    yield Case("fused", fused)
