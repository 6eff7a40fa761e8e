"""decode_attention on the GPU: which kernel, how many splits of the keys, and the launch. The splits' results meet in a second kernel.

The lengths stay on the device, so the choice rests on the capacity alone, and each block finds its own range of keys.
"""
from __future__ import annotations

import functools

import torch

from ftops.numba_kernels import decode_combine, decode_mma, decode_plain
from ftops.numba_kernels.decode_common import LOG2E
from ftops.numba_kernels.launch import Kernel, load, multiprocessors

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: "int8",
         torch.float8_e4m3fn: "float8_e4m3fn"}
MAX_SPLITS = 512
# In times that a multiprocessor takes to read one tile: a block's start and end; the combining kernel, and a split more in it; and how
# much of the bandwidth's share one block alone leaves unused.
BLOCK_COST, COMBINE_COST, SPLIT_COST, ALONE = 1.0, 2.5, 0.02, 1.5


def pick_splits(blocks: int, tiles: int, processors: int) -> int:
    """How many blocks share the keys of one (sequence, kv head, row tile), of which there are `blocks`, each with up to `tiles` tiles.

    The multiprocessor with the most blocks ends last; it takes blocks x (tiles of a block + a block's cost).
    """
    def cost(splits: int) -> float:
        share = -(-blocks * splits // processors)
        return (ALONE if share == 1 else share) * (-(-tiles // splits) + BLOCK_COST) + (COMBINE_COST + SPLIT_COST * splits if splits > 1 else 0)

    return min(range(1, min(tiles, MAX_SPLITS, max(1, 4 * processors // blocks)) + 1), key=cost, default=1)


@functools.cache
def _plan(dtype: torch.dtype, cache: torch.dtype, head_dim: int, rows: int, sequences: int, keys: int, fits: bool,
          device: int) -> tuple[Kernel, Kernel, int, int, int]:
    """(kernel, combining kernel, row tiles, splits, log2 of the combining threads a split) for `keys` keys, rounded up to 64."""
    if fits:
        config = decode_mma.pick(NAMES[dtype], "16-bit" if cache is dtype else NAMES[cache], head_dim, rows)
        spec, row_tiles, tile = decode_mma.spec(config), -(-rows // config.rows), decode_mma.KEYS * config.warps
    else:
        spec, row_tiles, tile = decode_plain.spec(decode_plain.Config(NAMES[cache])), rows, decode_plain.KEYS * decode_plain.WARPS
    splits = pick_splits(sequences * row_tiles, -(-keys // tile), multiprocessors(device))
    combine = load(decode_combine.spec(decode_combine.Config()), device)
    return load(spec, device), combine, row_tiles, splits, max(3, (-(-head_dim // 4) - 1).bit_length())


def launch(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor | None, scale: float,
           window: int, softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None, k_scale: torch.Tensor | None,
           v_scale: torch.Tensor | None) -> torch.Tensor:
    shape, dtype, cache = q.shape, q.dtype, k_cache.dtype
    batch, new, heads, head_dim = shape
    pages, page_size, kv_heads, _ = k_cache.shape
    capacity = page_size if page_table is None else page_size * page_table.shape[1]
    out = torch.empty(shape, dtype=dtype, device=q.device)
    if batch * new * heads == 0:
        return out
    if capacity == 0 or pages == 0:
        return out.zero_()

    (k_page, k_slot, k_head, k_dense), (v_page, v_slot, v_head, v_dense) = k_cache.stride(), v_cache.stride()
    if (k_dense != 1 or v_dense != 1) and head_dim > 1:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
        k_page, k_slot, k_head, v_page, v_slot, v_head = *k_cache.stride()[:3], *v_cache.stride()[:3]
    q_batch, q_new, q_head, q_dense = q.stride()
    q_at, k_at, v_at = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    unit = 16 // k_cache.element_size()
    fits = dtype is not torch.float32 and not (head_dim | k_page | k_slot | k_head | v_page | v_slot | v_head) % unit and not (k_at | v_at) & 15
    if q_dense != 1 or (fits and (q_at & 15 or (q_batch | q_new | q_head) & 7)):
        q = q.clone(memory_format=torch.contiguous_format)
        q_batch, q_new, q_head, _ = q.stride()
        q_at = q.data_ptr()
    if fits:
        k_page, k_slot, k_head, v_page, v_slot, v_head = (
            k_page // unit, k_slot // unit, k_head // unit, v_page // unit, v_slot // unit, v_head // unit)

    if lengths.stride(0) != 1:
        lengths = lengths.contiguous()
    table_at = table_row = 0
    if page_table is not None:
        if page_table.stride(1) != 1:
            page_table = page_table.contiguous()
        table_at, table_row = page_table.data_ptr(), page_table.stride(0)
    kinds = KINDS[dtype] << 2
    bias_at = bias_batch = bias_head = bias_new = bias_key = 0
    if bias is not None:
        bias_at, (bias_batch, bias_head, bias_new, bias_key) = bias.data_ptr(), bias.stride()
        kinds |= KINDS[bias.dtype]
    slopes_at = k_scale_at = v_scale_at = 0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
        slopes_at = alibi_slopes.data_ptr()
    if k_scale is not None:
        k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
        k_scale_at, v_scale_at = k_scale.data_ptr(), v_scale.data_ptr()
    scale, cap = (2 * LOG2E * scale / softcap, softcap * LOG2E) if softcap else (LOG2E * scale, 0.0)

    keys = capacity if window < 0 else min(capacity, window + new)
    group = heads // kv_heads
    kernel, combine, row_tiles, splits, shift = _plan(dtype, cache, head_dim, new * group, batch * kv_heads, (keys + 63) & -64, fits,
                                                      q.device.index)
    rows, out_at = batch * new * heads, out.data_ptr()
    partial_at = lse_at = 0
    if splits > 1:
        width = (head_dim + 3) & -4
        workspace = torch.empty(rows * splits * (width + 1), dtype=torch.float32, device=q.device)
        partial_at = workspace.data_ptr()
        lse_at = partial_at + 4 * rows * splits * width
    kernel(batch * row_tiles, kv_heads, splits, q_at, k_at, v_at, lengths.data_ptr(), table_at, bias_at, slopes_at, k_scale_at, v_scale_at, out_at,
           partial_at, lse_at, q_batch, bias_batch, bias_head, bias_new, bias_key, table_row, q_new, q_head, k_page, k_slot, k_head, v_page,
           v_slot, v_head, new, group, head_dim, capacity, pages, page_size, row_tiles, splits, window, kinds, scale, cap)
    if splits > 1:
        combine(rows, 1, 1, partial_at, lse_at, out_at, splits, head_dim, shift, kinds >> 2)
    return out
