"""Rotary position embedding of queries and keys.

    half-split:   (x[i], x[i + R/2]) is rotated by angle[i];     interleaved:   (x[2 i], x[2 i + 1]) is;     i < R/2

for the first R = rotary_dim dimensions of each head; the rest is passed on. Su et al., "RoFormer", 2021; the half-split order is
GPT-NeoX's and Llama's, the interleaved one GPT-J's.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftops.op import Case, check_beside, check_tensors, invalid, register, straight
from ftops.samples import randn

INDEX_DTYPES = (torch.int32, torch.int64)


def angles(positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None, half: int,
            wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token, [B or 1, S, 1, R/2]. Half-split tables may come R wide: what follows R/2 is not read."""
    if sin is None:
        angle = positions.to(wide).unsqueeze(-1) * cos.to(wide)
        cos, sin = angle.cos(), angle.sin()
    elif positions is not None:
        cos, sin = cos[positions], sin[positions]
    return cos[..., :half].to(wide).unsqueeze(-2), sin[..., :half].to(wide).unsqueeze(-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, rotary_dim: int) -> torch.Tensor:
    turned = x[..., :rotary_dim].to(cos.dtype)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)


def reference(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None,
              interleaved: bool, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles(positions, cos, sin, rotary_dim // 2, torch.promote_types(q.dtype, torch.float32))
    return rotate(q, cos, sin, interleaved, rotary_dim), rotate(k, cos, sin, interleaved, rotary_dim)


def _cpu(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None,
         interleaved: bool, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What Hugging Face's Llama asks for with few temporaries: half of its time for a prompt of 256, and no more for one token."""
    if positions is not None or interleaved or cos.dtype is not q.dtype or not cos.shape[-1] == rotary_dim == q.shape[-1]:
        q, k = reference(q, k, positions, cos, sin, interleaved, rotary_dim)
        return q.contiguous(), k.contiguous()
    cos, sin = cos.unsqueeze(-2), sin[..., : rotary_dim // 2].unsqueeze(-2)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """addcmul_ works in float32 inside, so that 16-bit results are rounded twice; Hugging Face's are three times."""
    out = torch.mul(x, cos).contiguous()
    (first, second), (a, b) = out.chunk(2, -1), x.chunk(2, -1)
    first.addcmul_(b, sin, value=-1)
    second.addcmul_(a, sin)
    return out


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.rotary import launch
    return launch


def _fake(q: torch.Tensor, k: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


ROTARY = register("rotary(Tensor q, Tensor k, Tensor? positions, Tensor cos, Tensor? sin, bool interleaved, int rotary_dim) "
                  "-> (Tensor, Tensor)",
                  cpu=_cpu, cuda=_cuda, fake=_fake)
_rotary = straight(ROTARY)


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, freqs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *,
           interleaved: bool = False, rotary_dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the first rotary_dim (default: all) dimensions of every head of q[B,S,H,D] and k[B,S,Hkv,D]; returns the two.

    freqs is either inv_freq[R/2], float32, whose angles are positions[B,S] * inv_freq; or (cos, sin) in float32 or q's dtype:
    tables [P, R/2] that positions[B,S] (int32 or int64, below P) index, or, with positions None, one row a token,
    [B or 1, S, R/2]. Hugging Face's cos and sin, R wide with every angle twice, are taken as well.
    float32, float16 or bfloat16 (arithmetic in float32), any strides; results are contiguous. Raises ValueError.
    """
    check_tensors("rotary", q=q, k=k)
    shape, keys = q.shape, k.shape
    if len(shape) != 4 or len(keys) != 4:
        raise invalid("rotary", "q.shape, k.shape", (tuple(shape), tuple(keys)), "[B,S,H,D] and [B,S,Hkv,D]")
    batch, length, _, head_dim = shape
    if keys[0] != batch or keys[1] != length or keys[3] != head_dim:
        raise invalid("rotary", "k.shape", tuple(keys), f"[{batch}, {length}, Hkv, {head_dim}]")
    size = head_dim if rotary_dim is None else rotary_dim
    cos, sin = check_freqs("rotary", q, positions, freqs, interleaved, size)
    return _rotary(q, k, positions, cos, sin, interleaved, size)


def check_freqs(op: str, q: torch.Tensor, positions: torch.Tensor | None, freqs: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
                interleaved: bool, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(inv_freq, None) or (cos, sin), as handles take them, that fit q[B,S,H,D] of which `size` dimensions turn."""
    batch, length, _, head_dim = q.shape
    if size % 2 or not 0 <= size <= head_dim:
        raise invalid(op, "rotary_dim", size, f"even, 0 to head_dim ({head_dim})")
    cos, sin = freqs if isinstance(freqs, (tuple, list)) and len(freqs) == 2 else (freqs, None)
    check_beside(op, q.device, positions=positions, cos=cos, sin=sin)
    if positions is not None and (positions.shape != (batch, length) or positions.dtype not in INDEX_DTYPES):
        raise invalid(op, "positions", f"{positions.dtype} {tuple(positions.shape)}", f"int32 or int64 ({batch}, {length})")
    if sin is None:
        if positions is None:
            raise invalid(op, "positions", None, "positions[B,S] when freqs is inv_freq")
        if cos.shape != (size // 2,) or cos.dtype is not torch.float32:
            raise invalid(op, "freqs", f"{cos.dtype} {tuple(cos.shape)}", f"float32 ({size // 2},)")
        return cos, None
    table = cos.shape
    if sin.shape != table or sin.dtype is not cos.dtype or (cos.dtype is not torch.float32 and cos.dtype is not q.dtype):
        raise invalid(op, "freqs", f"{cos.dtype} {tuple(table)}, {sin.dtype} {tuple(sin.shape)}", f"two alike, float32 or {q.dtype}")
    if positions is not None:
        fits = len(table) == 2
    else:
        fits = len(table) == 3 and (table[0] == batch or table[0] == 1) and table[1] == length
    if not fits or (table[-1] != size // 2 and table[-1] != size):
        lead = "P" if positions is not None else f"{batch} or 1, {length}"
        raise invalid(op, "cos.shape", tuple(table), f"[{lead}, {size // 2} or {size}]")
    if interleaved and table[-1] == size:
        cos, sin = cos[..., ::2], sin[..., ::2]
    return cos, sin


def _sample(device: torch.device, dtype: torch.dtype, *, shape: tuple[int, ...] = (2, 9, 4, 64), kv_heads: int = 2, form: str = "token",
            repeated: bool = False, shared: bool = False, index: torch.dtype = torch.int64, interleaved: bool = False,
            rotary_dim: int | None = None) -> tuple[tuple, dict]:
    batch, length, _, head_dim = shape
    half = (head_dim if rotary_dim is None else rotary_dim) // 2
    q, k = randn(shape, device, dtype), randn((batch, length, kv_heads, head_dim), device, dtype)
    inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / max(half, 1))
    positions = torch.randint(0, 500, (1 if shared else batch, length))
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim}
    if form == "inv_freq":
        return (q, k, positions.to(device, index), inv_freq.to(device)), options
    angle = torch.arange(500).unsqueeze(-1) * inv_freq if form == "table" else positions.unsqueeze(-1) * inv_freq
    if repeated:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    freqs = tuple(t.to(device=device, dtype=torch.float32 if form == "table" else dtype) for t in (angle.cos(), angle.sin()))
    return (q, k, positions.to(device, index) if form == "table" else None, freqs), options


def cases() -> Iterator[Case]:
    samples = {
        "token": {}, "repeated": {"repeated": True}, "shared": {"shared": True, "repeated": True}, "inv_freq": {"form": "inv_freq"},
        "inv_freq_int32": {"form": "inv_freq", "index": torch.int32, "interleaved": True}, "table": {"form": "table"},
        "table_int32": {"form": "table", "index": torch.int32, "repeated": True},
        "interleaved": {"interleaved": True, "form": "table"}, "interleaved_repeated": {"interleaved": True, "repeated": True},
        "gptj": {"shape": (2, 7, 16, 256), "kv_heads": 16, "interleaved": True, "rotary_dim": 64, "form": "table"},
        "partial": {"shape": (1, 5, 8, 96), "rotary_dim": 24, "repeated": True}, "partial_inv_freq": {"rotary_dim": 16, "form": "inv_freq"},
        "none": {"rotary_dim": 0}, "decode": {"shape": (3, 1, 32, 128), "kv_heads": 8, "repeated": True},
        "odd": {"shape": (2, 3, 5, 70), "kv_heads": 1}, "empty": {"shape": (0, 4, 2, 32)}, "no_tokens": {"shape": (2, 0, 2, 32)},
    }
    for name, options in samples.items():
        yield Case(name, lambda device, dtype, options=options: _sample(device, dtype, **options))

    def fused(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """q and k as views of one QKV buffer, the way a fused projection leaves them."""
        (_, _, positions, freqs), options = _sample(device, dtype)
        qkv = randn((2, 9, 8, 64), device, dtype)
        return (qkv[:, :, :4], qkv[:, :, 4:6], positions, freqs), options

    def heads_first(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """q and k as Hugging Face rotates them, [B,H,S,D] in memory."""
        (_, _, positions, freqs), options = _sample(device, dtype, repeated=True)
        q, k = (randn((2, heads, 9, 64), device, dtype).transpose(1, 2) for heads in (4, 2))
        return (q, k, positions, freqs), options

    yield Case("fused", fused)
    yield Case("heads_first", heads_first)
