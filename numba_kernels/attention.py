"""attention and attention_varlen on the GPU: which kernel, copies of what it cannot read, and the launch.

    out_i = sum_j softmax_j(softcap(scale q_i . k_j) + bias_ij - slope |position_i - j|) v_j        position_i = Skv - Sq + i
"""
from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ftops.numba_kernels import attention_mma, attention_plain
from ftops.numba_kernels.attention_common import UNBOUNDED
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, load
from ftops.numba_kernels.rows import DTYPE_NAME

NO_BIAS = (0, 0, 0, 0)


def variants() -> Iterator[Spec]:
    """Every variant that `launch` can ask for."""
    yield from attention_mma.variants()
    yield from attention_plain.variants()


@functools.cache
def _kernel(dtype: torch.dtype, dim: int, extras: bool, device: int) -> tuple[Kernel, int]:
    """The kernel and how many query rows one of its blocks takes."""
    name = DTYPE_NAME[dtype]
    if name == "float32" or torch.cuda.get_device_capability(device) < (8, 0):
        return load(attention_plain.spec(attention_plain.pick(name, dim)), device), attention_plain.ROWS * attention_plain.WARPS
    config = attention_mma.pick(name, next(d for d in attention_mma.HEAD_DIMS if d >= dim), extras)
    return load(attention_mma.spec(config), device), config.rows


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, window_left: int, window_right: int, softcap: float,
           bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None, kv_lengths: torch.Tensor | None) -> torch.Tensor:
    bias_strides = NO_BIAS if bias is None else tuple(step * bias.element_size() for step in bias.stride())
    return _launch(q, k, v, q.shape[0], q.shape[1], k.shape[1], causal, scale, window_left, window_right, softcap, bias, bias_strides,
                   alibi_slopes, kv_lengths, None, None)


def launch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor,
                  max_seqlen_q: int, max_seqlen_kv: int, causal: bool, scale: float, window_left: int, window_right: int, softcap: float,
                  alibi_slopes: torch.Tensor | None) -> torch.Tensor:
    return _launch(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_kv, causal, scale,
                   window_left, window_right, softcap, None, NO_BIAS, alibi_slopes, None, cu_seqlens_q, cu_seqlens_kv).squeeze(0)


def _launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: int, queries: int, keys: int, causal: bool, scale: float, left: int,
            right: int, softcap: float, bias: torch.Tensor | None, bias_strides: tuple[int, ...], alibi_slopes: torch.Tensor | None,
            lengths: torch.Tensor | None, starts_q: torch.Tensor | None, starts_kv: torch.Tensor | None) -> torch.Tensor:
    """starts_q and starts_kv: `batch` sequences lie end to end in row 0 of q, k and v."""
    _, _, heads, dim = q.shape
    item = q.element_size()
    if dim * item % 16:
        q, k, v = (_padded(t, 16 // item) for t in (q, k, v))
        return _launch(q, k, v, batch, queries, keys, causal, scale, left, right, softcap, bias, bias_strides, alibi_slopes, lengths, starts_q,
                       starts_kv)[..., :dim].contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or batch == 0 or queries == 0:
        return out
    if k.numel() == 0:
        return out.zero_()
    q_batch, q_row, q_head, q_last = q.stride()
    k_batch, k_row, k_head, k_last = k.stride()
    v_batch, v_row, v_head, v_last = v.stride()
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if not (q_last == k_last == v_last == 1) or (
            (q_batch | q_row | q_head | k_batch | k_row | k_head | v_batch | v_row | v_head) * item | q_at | k_at | v_at) & 15:
        q, k, v = (_dense(t) for t in (q, k, v))
        return _launch(q, k, v, batch, queries, keys, causal, scale, left, right, softcap, bias, bias_strides, alibi_slopes, lengths, starts_q,
                       starts_kv)
    if starts_q is not None:
        q_batch = k_batch = v_batch = 0
    alibi_slopes, lengths, starts_q, starts_kv = _flat(alibi_slopes), _flat(lengths), _flat(starts_q), _flat(starts_kv)
    left = left if 0 <= left < UNBOUNDED else UNBOUNDED
    right = 0 if causal else right if 0 <= right < UNBOUNDED else UNBOUNDED
    extras = softcap > 0 or bias is not None or alibi_slopes is not None or scale <= 0
    kernel, rows = _kernel(q.dtype, dim, extras, q.device.index)
    tiles = -(-queries // rows)
    kernel(tiles * batch, heads, 1, q_at, k_at, v_at, out.data_ptr(), 0 if bias is None else bias.data_ptr(), _address(alibi_slopes),
           _address(lengths), _address(starts_q), _address(starts_kv), q_batch * item, q_row * item, q_head * item, k_batch * item, k_row * item,
           k_head * item, v_batch * item, v_row * item, v_head * item, *bias_strides, queries, keys, heads, heads // k.shape[2], dim, tiles,
           left, right, bias is not None and bias.dtype is torch.float32, scale, softcap)
    return out


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _flat(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _padded(t: torch.Tensor, unit: int) -> torch.Tensor:
    """A dense copy whose head_dim is filled with zeros up to whole 16 bytes, the kernels' unit."""
    dim = t.shape[3]
    copy = t.new_zeros((*t.shape[:3], -(-dim // unit) * unit))
    copy[..., :dim] = t
    return copy


def _dense(t: torch.Tensor) -> torch.Tensor:
    """t, or a dense copy of what the kernels' 16-byte reads cannot take: a strided head_dim, or rows that do not begin on 16 bytes."""
    batch, row, head, last = t.stride()
    item = t.element_size()
    if last == 1 and not ((batch | row | head) * item | t.data_ptr()) & 15:
        return t
    return t.clone(memory_format=torch.contiguous_format)
