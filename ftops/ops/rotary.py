"""Rotary position embedding of queries and keys.

    half-split:   (x[i], x[i + R/2]) is rotated by angle[i];     interleaved:   (x[2 i], x[2 i + 1]) is;     i < R/2

for the first R = rotary_dim dimensions of each head; the rest is passed on. Su et al., "RoFormer", 2021; the half-split order is
GPT-NeoX's and Llama's, the interleaved one GPT-J's.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ftops.op import Case, register, require, require_device, require_dtype, require_no_grad
from ftops.samples import randn


def _angles(positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None,
            wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token, [B or 1, S, 1, R/2]."""
    if sin is None:
        angle = positions.to(wide).unsqueeze(-1) * cos.to(wide)
        cos, sin = angle.cos(), angle.sin()
    elif positions is not None:
        cos, sin = cos[positions], sin[positions]
    return cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, rotary_dim: int) -> torch.Tensor:
    turned = x[..., :rotary_dim].to(cos.dtype)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)


def reference(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None,
              interleaved: bool, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = _angles(positions, cos, sin, torch.promote_types(q.dtype, torch.float32))
    return _rotate(q, cos, sin, interleaved, rotary_dim), _rotate(k, cos, sin, interleaved, rotary_dim)


def _cuda(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None,
          interleaved: bool, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    from ftops.numba_kernels.rotary import launch
    return launch(q, k, positions, cos, sin, interleaved, rotary_dim)


def _fake(q: torch.Tensor, k: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


ROTARY = register("rotary(Tensor q, Tensor k, Tensor? positions, Tensor cos, Tensor? sin, bool interleaved, int rotary_dim) -> (Tensor, Tensor)",
                  cpu=lambda *args: tuple(t.contiguous() for t in reference(*args)), cuda=_cuda, fake=_fake)


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, freqs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *,
           interleaved: bool = False, rotary_dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the first rotary_dim (default: all) dimensions of every head of q[B,S,H,D] and k[B,S,Hkv,D]; returns the two.

    freqs is either inv_freq[R/2], float32, whose angles are positions[B,S] * inv_freq; or (cos, sin) in float32 or q's dtype:
    tables [P, R/2] that positions[B,S] (int32 or int64, below P) index, or, with positions None, one row a token,
    [B or 1, S, R/2]. Hugging Face's cos and sin, R wide with every angle twice, are taken as well.
    float32, float16 or bfloat16 (arithmetic in float32), any strides; results are contiguous. Raises ValueError.
    """
    require_no_grad("rotary", q, k)
    require_dtype("rotary", q=q, k=k)
    require(q.dim() == 4 and k.dim() == 4, "rotary", "q.dim(), k.dim()", (q.dim(), k.dim()), "4: batch, sequence, heads, head_dim")
    require(k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3], "rotary", "k.shape", tuple(k.shape), f"[{q.shape[0]}, {q.shape[1]}, Hkv, {q.shape[3]}]")
    size = q.shape[3] if rotary_dim is None else rotary_dim
    require(size % 2 == 0 and 0 <= size <= q.shape[3], "rotary", "rotary_dim", size, f"even, 0 to head_dim ({q.shape[3]})")
    cos, sin = freqs if isinstance(freqs, tuple) else (freqs, None)
    require_device("rotary", q=q, k=k, positions=positions, cos=cos, sin=sin)
    if positions is not None:
        require(positions.shape == q.shape[:2] and positions.dtype in (torch.int32, torch.int64), "rotary", "positions",
                f"{positions.dtype} {tuple(positions.shape)}", f"int32 or int64 {tuple(q.shape[:2])}")
    if sin is None:
        require(positions is not None, "rotary", "positions", None, "positions[B,S] when freqs is inv_freq")
        require(cos.shape == (size // 2,) and cos.dtype is torch.float32, "rotary", "freqs", f"{cos.dtype} {tuple(cos.shape)}", f"float32 ({size // 2},)")
    else:
        require(cos.shape == sin.shape and cos.dtype is sin.dtype and cos.dtype in (torch.float32, q.dtype), "rotary", "freqs",
                f"{cos.dtype} {tuple(cos.shape)}, {sin.dtype} {tuple(sin.shape)}", f"two alike, float32 or {q.dtype}")
        if cos.shape[-1] == size and size:
            cos, sin = (cos[..., ::2], sin[..., ::2]) if interleaved else (cos[..., : size // 2], sin[..., : size // 2])
        lead = "[P, R/2]" if positions is not None else f"[{q.shape[0]} or 1, {q.shape[1]}, R/2]"
        fits = cos.dim() == 2 if positions is not None else cos.dim() == 3 and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[1]
        require(fits and cos.shape[-1] == size // 2, "rotary", "cos.shape", tuple(cos.shape), f"{lead} with R = {size}")
    return ROTARY(q, k, positions, cos, sin, interleaved, size)


def _sample(device: torch.device, dtype: torch.dtype, *, shape: tuple[int, ...] = (2, 9, 4, 64), kv_heads: int = 2, form: str = "token",
            repeated: bool = False, interleaved: bool = False, rotary_dim: int | None = None) -> tuple[tuple, dict]:
    batch, length, _, head_dim = shape
    half = (rotary_dim or head_dim) // 2
    q, k = randn(shape, device, dtype), randn((batch, length, kv_heads, head_dim), device, dtype)
    inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    positions = torch.randint(0, 500, (batch, length))
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim}
    if form == "inv_freq":
        return (q, k, positions.to(device), inv_freq.to(device)), options
    angle = torch.arange(500).unsqueeze(-1) * inv_freq if form == "table" else positions.unsqueeze(-1) * inv_freq
    if repeated:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    freqs = tuple(t.to(device=device, dtype=torch.float32 if form == "table" else dtype) for t in (angle.cos(), angle.sin()))
    return (q, k, positions.to(device) if form == "table" else None, freqs), options


def cases() -> Iterator[Case]:
    samples = {
        "token": {}, "repeated": {"repeated": True}, "inv_freq": {"form": "inv_freq"}, "table": {"form": "table"},
        "interleaved": {"interleaved": True, "form": "table"}, "interleaved_repeated": {"interleaved": True, "repeated": True},
        "gptj": {"shape": (2, 7, 16, 256), "kv_heads": 16, "interleaved": True, "rotary_dim": 64, "form": "table"},
        "partial": {"shape": (1, 5, 8, 96), "rotary_dim": 24, "repeated": True}, "decode": {"shape": (3, 1, 32, 128), "kv_heads": 8},
        "odd": {"shape": (2, 3, 5, 70), "kv_heads": 1}, "empty": {"shape": (0, 4, 2, 32)}, "no_tokens": {"shape": (2, 0, 2, 32)},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, dtype, **options))

    def fused(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """q and k as views of one QKV buffer, the way a fused projection leaves them."""
        (_, _, positions, freqs), options = _sample(device, dtype)
        qkv = randn((2, 9, 8, 64), device, dtype)
        return (qkv[:, :, :4], qkv[:, :, 4:6], positions, freqs), options

    yield Case("fused", fused)
