"""attention, attention_varlen and attention_fp8 on the GPU: which kernel, copies of what it cannot read, and the launch.

    out_i = sum_j softmax_j(softcap(scale q_i . k_j) + bias_ij - slope |position_i - j|) v_j        position_i = Skv - Sq + i
"""
from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ftops.numba_kernels import attention_library, attention_mma, attention_plain, attention_sm90, attention_sm90_launch
from ftops.numba_kernels.attention_common import NO_STRIDES, UNBOUNDED, address
from ftops.numba_kernels.attention_sm90_config import NARROW_HEAD_DIM
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, architecture, empty_like, load
from ftops.numba_kernels.rows import DTYPE_NAME


def variants() -> Iterator[Spec]:
    """Every variant that `launch` can ask for."""
    yield from attention_sm90.variants()
    yield from attention_mma.variants()
    yield from attention_plain.variants()


@functools.cache
def _kernel(dtype: torch.dtype, dim: int, extras: bool, device: int) -> tuple[Kernel, int]:
    """The kernel and how many query rows one of its blocks takes."""
    if dtype is torch.float32:
        return load(attention_plain.spec(attention_plain.pick(dim)), device), attention_plain.ROWS * attention_plain.WARPS
    config = attention_mma.pick(DTYPE_NAME[dtype], next(d for d in attention_mma.HEAD_DIMS if d >= dim), extras)
    return load(attention_mma.spec(config), device), config.rows


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, window_left: int, window_right: int,
           softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None, kv_lengths: torch.Tensor | None) -> torch.Tensor:
    return _launch(q, k, v, q.shape[0], q.shape[1], k.shape[1], causal, scale, window_left, window_right, softcap, bias, alibi_slopes,
                   kv_lengths, None, None)


def launch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor,
                  max_seqlen_q: int, max_seqlen_kv: int, causal: bool, scale: float, window_left: int, window_right: int, softcap: float,
                  alibi_slopes: torch.Tensor | None) -> torch.Tensor:
    return _launch(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_kv, causal, scale,
                   window_left, window_right, softcap, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_kv).squeeze(0)


def _launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: int, queries: int, keys: int, causal: bool, scale: float, left: int,
            right: int, softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None, lengths: torch.Tensor | None,
            starts_q: torch.Tensor | None, starts_kv: torch.Tensor | None) -> torch.Tensor:
    """starts_q and starts_kv: `batch` sequences lie end to end in row 0 of q, k and v."""
    wanted_dim = q.shape[3]
    left, right = _window(causal, left, right)
    if q.dtype is torch.float32 and attention_library.serves(q, k, left, right, softcap, bias, alibi_slopes, lengths, starts_q):
        return attention_library.attention(q, k, v, right == 0, scale, bias)
    q, k, v = _readable(q), _readable(k), _readable(v)
    _, _, heads, dim = q.shape
    out = empty_like(q)
    if k.numel() == 0:
        out.zero_()
    elif out.numel() and batch and queries:
        extras = softcap > 0 or bias is not None or alibi_slopes is not None or scale <= 0
        alibi_slopes, lengths = _dense(alibi_slopes), _dense(lengths)
        starts_q, starts_kv = _dense(starts_q), _dense(starts_kv)
        packed = starts_q is not None
        bias = bias if bias is None else _readable_bias(bias)
        bias_strides = NO_STRIDES if bias is None else _byte_strides(bias, False)
        if q.dtype is not torch.float32 and architecture(q.device.index) == "sm_90a":
            parts = 0 if extras or packed else attention_sm90_launch.parts_of(q, k, left, right)
            if parts:
                attention_sm90_launch.start_parts(parts, q, k, v, out, scale, left, right, lengths)
            else:
                kernel = attention_sm90_launch.kernel(q.dtype, dim, extras, queries, keys, packed, q.device.index)
                attention_sm90_launch.start(kernel, q, k, v, out, batch, queries, keys, scale, left, right, softcap, bias, bias_strides,
                                            alibi_slopes, lengths, starts_q, starts_kv)
        else:
            kernel, rows = _kernel(q.dtype, dim, extras, q.device.index)
            tiles = -(-queries // rows)
            kernel(tiles * heads * batch, 1, 1, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), address(bias),
                   address(alibi_slopes), address(lengths), address(starts_q), address(starts_kv), *_byte_strides(q, packed),
                   *_byte_strides(k, packed), *_byte_strides(v, packed), *bias_strides, queries, keys, heads, heads // k.shape[2], dim,
                   tiles, left, right, bias is not None and bias.dtype is torch.float32, scale, softcap)
    return out if dim == wanted_dim else out[..., :wanted_dim].contiguous()


def launch_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_scale: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor,
               causal: bool, scale: float, window_left: int, window_right: int) -> torch.Tensor:
    """On Hopper up to head_dim 128 in 8 bits; elsewhere by the kernel for bfloat16, which holds every e4m3."""
    wanted_dim = q.shape[3]
    if architecture(q.device.index) != "sm_90a" or wanted_dim > NARROW_HEAD_DIM or scale <= 0:
        group = q.shape[2] // k.shape[2]
        of_scores = (q_scale * k_scale.repeat_interleave(group)).unsqueeze(-1)
        out = launch((q.float() * of_scores).bfloat16(), k.bfloat16(), v.bfloat16(), causal, scale, window_left, window_right, 0.0, None,
                     None, None)
        return (out.float() * v_scale.repeat_interleave(group).unsqueeze(-1)).bfloat16()
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    if k.numel() == 0:
        out.zero_()
    elif out.numel():
        kernel = attention_sm90_launch.loaded(q.dtype, NARROW_HEAD_DIM, False, False, q.device.index)
        attention_sm90_launch.start(kernel, q, k, v, out, q.shape[0], q.shape[1], k.shape[1], scale,
                                    *_window(causal, window_left, window_right), 0.0, None, NO_STRIDES, None, None, None, None,
                                    tuple(t.contiguous() for t in (q_scale, k_scale, v_scale)))
    return out if out.shape[3] == wanted_dim else out[..., :wanted_dim].contiguous()


def _window(causal: bool, left: int, right: int) -> tuple[int, int]:
    """As the kernels take it: causal is a right end, UNBOUNDED is none."""
    return left if 0 <= left < UNBOUNDED else UNBOUNDED, 0 if causal else right if 0 <= right < UNBOUNDED else UNBOUNDED


def _readable(t: torch.Tensor) -> torch.Tensor:
    """t[B,S,H,D] as the kernels' 16-byte reads can take it: copied where head_dim is strided or rows do not begin on 16 bytes, and
    filled with zeros to whole 16 bytes a row."""
    batch, row, head, last = t.stride()
    dim, unit = t.shape[3], 16 // t.element_size()
    if dim % unit:
        copy = t.new_zeros((*t.shape[:3], -(-dim // unit) * unit))
        copy[..., :dim] = t
        return copy
    if last == 1 and not (batch | row | head) % unit and not t.data_ptr() & 15:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _readable_bias(bias: torch.Tensor) -> torch.Tensor:
    """bias[B,H,Sq,Skv] as the kernels' reads of pairs can take it: copied, but not where it is broadcast, if the keys of a row are not
    adjacent or do not begin on 16 bytes."""
    unit = 16 // bias.element_size()
    batch, head, row, key = bias.stride()
    if key == 1 and not (batch | head | row) % unit and not bias.data_ptr() & 15:
        return bias
    once = bias[tuple(slice(0, 1) if step == 0 else slice(None) for step in (batch, head, row))]
    copy = once.new_empty((*once.shape[:3], -(-once.shape[3] // unit) * unit))[..., :once.shape[3]]
    return copy.copy_(once).expand(bias.shape)


def _byte_strides(t: torch.Tensor, packed: bool) -> tuple[int, int, int]:
    """Of the first three dimensions; sequences that lie end to end have no batch stride."""
    item = t.element_size()
    first, second, third, _ = t.stride()
    return 0 if packed else first * item, second * item, third * item


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None else t.contiguous()
