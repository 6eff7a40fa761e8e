"""The launch of attention on Hopper: which variant, tensor maps, the order of tiles, and the counters that blocks take them from."""
from __future__ import annotations

import functools

import torch

from ftops.numba_kernels import decode_combine
from ftops.numba_kernels.attention_common import NO_STRIDES, address
from ftops.numba_kernels.attention_sm90 import spec
from ftops.numba_kernels.attention_sm90_config import HEAD_DIMS, PART_KEYS, is_short, key_parts, pick, pick_parts
from ftops.numba_kernels.counters import counters, reserve
from ftops.numba_kernels.launch import Kernel, load, multiprocessors
from ftops.numba_kernels.tma import tiles as tiles_of

_SECTION_BYTES = 32 << 20  # keys and values that stay in an L2 of 50 MB while all their query rows pass
_PADDED = [next(d for d in HEAD_DIMS if d >= dim) for dim in range(HEAD_DIMS[-1] + 1)]


def kernel(dtype: torch.dtype, dim: int, extras: bool, queries: int, keys: int, packed: bool, device: int) -> Kernel:
    """Raises RuntimeError during graph capture, unless it was asked for before.

    packed: sequences lie end to end, and the bits of one must not depend on how long the others are."""
    head_dim = _PADDED[dim]
    return loaded(dtype, head_dim, extras, not extras and not packed and is_short(head_dim, queries, keys), device)


@functools.cache
def loaded(dtype: torch.dtype, head_dim: int, extras: bool, short: bool, device: int) -> Kernel:
    kernel = load(spec(pick(str(dtype).removeprefix("torch."), head_dim, extras, short)), device)
    reserve(device)
    return kernel


def parts_of(q: torch.Tensor, k: torch.Tensor, left: int, right: int) -> int:
    """How many parts `start_parts` is best asked for, 0 if it is not."""
    batch, queries, heads, dim = q.shape
    keys = min(k.shape[1], left + queries + right)
    return key_parts(batch, queries, -(-keys // PART_KEYS), heads, k.shape[2], dim, multiprocessors(q.device.index))


@functools.cache
def loaded_parts(dtype: torch.dtype, dim: int, device: int) -> tuple[Kernel, Kernel]:
    """(the kernel that stores `parts` of a result, the one that adds them up). Raises RuntimeError as `kernel` does."""
    kernel = load(spec(pick_parts(str(dtype).removeprefix("torch."), dim)), device)
    reserve(device)
    return kernel, load(decode_combine.spec(decode_combine.Config(), True), device)


def start_parts(parts: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float, left: int, right: int,
                lengths: torch.Tensor | None) -> None:
    """As `start` without options, by tiles that the heads of a group share, of keys in so many parts."""
    kernel, combine = loaded_parts(q.dtype, q.shape[3], q.device.index)
    batch, queries, heads, dim = q.shape
    lines, stored, lse_at = batch * queries * heads, out, 0
    if parts > 1:
        stored = q.new_empty(2 * lines * parts * (dim + 1))  # of float32
        lse_at = stored.data_ptr() + 4 * lines * parts * dim
    start(kernel, q, k, v, stored, batch, queries, k.shape[1], scale, left, right, 0.0, None, NO_STRIDES, None, lengths, None, None,
          parts=parts, lse_at=lse_at)
    if parts > 1:
        decode_combine.start(combine, stored.data_ptr(), lse_at, out.data_ptr(), lines, parts, dim, 1 if q.dtype is torch.float16 else 2)


def start(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, batch: int, queries: int, keys: int,
          scale: float, left: int, right: int, softcap: float, bias: torch.Tensor | None, bias_strides: tuple[int, ...],
          alibi_slopes: torch.Tensor | None, lengths: torch.Tensor | None, starts_q: torch.Tensor | None,
          starts_kv: torch.Tensor | None, scales: tuple[torch.Tensor | None, ...] = (None, None, None), parts: int = 1,
          lse_at: int = 0) -> None:
    """As attention.py has it: 16-byte aligned q, k, v[rows of batch, sequence, heads, dim], nothing empty, window ends <= UNBOUNDED."""
    config, device = kernel.spec.config, q.device.index
    # A dimension of a tensor map has a stride: what is broadcast is copied.
    q, k, v = (t.contiguous() if 0 in t.stride() else t for t in (q, k, v))
    _, _, heads, dim = q.shape
    group = heads // k.shape[2]
    shared = group if config.parts else 1  # heads of one tile
    heads, rows = heads // shared, config.rows // shared
    tiles, pairs = -(-queries // rows), batch * heads
    blocks = min(multiprocessors(device), tiles * pairs * parts)
    # In parts there are few queries, and as good as all see as many keys.
    alike = (right >= keys or tiles == 1 or config.parts) and lengths is None and starts_q is None
    section = group // shared * (1 if alike else max(1, _SECTION_BYTES // (2 * q.element_size() * keys * dim)))
    counted = 0 if alike or blocks == tiles * pairs * parts else counters(device, 2)
    kernel(blocks, 1, 1, _map(q, shared, rows, config.chunk), _map(k, 1, config.keys, config.chunk), _map(v, 1, config.keys, config.chunk),
           out.data_ptr(), address(bias), address(alibi_slopes), address(lengths), address(starts_q), address(starts_kv), counted,
           *map(address, scales), *bias_strides, queries, keys, heads, group, dim, batch, tiles,
           min(pairs, section), left, right, bias is not None and bias.dtype is torch.float32, scale, softcap, lse_at,
           parts)


def _map(t: torch.Tensor, beside: int, rows: int, columns: int) -> bytes:
    """Of boxes of `columns` of `rows` rows of `beside` heads."""
    batch, sequence, heads, dim = t.shape
    batch_step, row_step, head_step, _ = t.stride()
    return tiles_of(t.data_ptr(), t.dtype, (dim, heads, sequence, batch), (head_step, row_step, batch_step), (columns, beside, rows, 1))
