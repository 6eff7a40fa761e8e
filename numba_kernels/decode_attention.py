"""decode_attention on the GPU: which kernel, how many splits of the keys, and the launch; of two kernels where the splits' parts are many.

The lengths stay on the device, so the choice rests on the capacity alone, and each block finds its own range of keys.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ftops.numba_kernels import decode_combine, decode_mma, decode_plain
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.counters import counters, reserve
from ftops.numba_kernels.decode_common import GRID_Y, LOG2E
from ftops.numba_kernels.decode_parts import MOST_PARTS
from ftops.numba_kernels.division import inverse
from ftops.numba_kernels.launch import Kernel, capability, empty_like, load, multiprocessors
from ftops.numba_kernels.narrow import NARROW_NAME
from ftops.numba_kernels.rows import DTYPE_NAME

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAMES = DTYPE_NAME | NARROW_NAME
MAX_SPLITS = 512
# Measured on an H200. A multiprocessor's share of the bandwidth in bytes a us; in us, what a warp takes for 16 keys that are there already,
# the start and end of a block, the meeting of the splits, and each split in it.
SHARE, TILE_US, BLOCK_US, COMBINE_US, SPLIT_US = 34e3, 0.5, 1.0, 1.0, 0.022


def variants() -> Iterator[Spec]:
    """Every variant that `launch` can ask for."""
    yield from decode_mma.variants()
    yield from decode_plain.variants()
    yield from decode_combine.variants()


def pick_splits(blocks: int, tiles: int, tile_bytes: int, processors: int, resident: int) -> tuple[int, int]:
    """(splits, blocks that may reside on a multiprocessor, 2 to `resident`): how many blocks share the keys of one of `blocks`.

    Up to `tiles` tiles each. All wait for memory, so what counts is that the multiprocessors end together. Blocks that fit at once are
    kept from crowding on a few of them. More come in waves, and a last wave with few blocks leaves bandwidth unused, the more the fewer
    waves there are, since blocks then start and end in step; one resident fewer may make the waves come out even.
    """
    def cost(splits: int, places: int) -> float:
        each, lone = -(-tiles // splits) * tile_bytes / SHARE, -(-tiles // splits) * TILE_US
        waves, rest = divmod(blocks * splits, places * processors)
        time = COMBINE_US + SPLIT_US * splits if splits > 1 else 0
        if waves == 0:
            uneven = 1 - rest / (-(-rest // processors) * processors)
            return time + BLOCK_US + max(rest * each / processors * (1 + 0.15 * uneven), lone)
        time += waves * (places * each + BLOCK_US)
        if rest:
            shared = rest * each / processors
            time += BLOCK_US + (shared + each / 4 if waves > 3 else max(shared, 1.25 * each))
        return time * (1 if places == resident else 1.02)

    def places(splits: int) -> set[int]:
        fitting = max(2, -(-blocks * splits // processors))
        return {fitting} if fitting <= resident else {resident, max(resident - 1, min(2, resident))}

    most = min(tiles, MAX_SPLITS, max(1, 4 * processors // blocks))
    return min(((n, p) for n in range(1, most + 1) for p in places(n)), key=lambda choice: cost(*choice), default=(1, resident))


@functools.cache
def _plan(dtype: torch.dtype, cache: torch.dtype, head_dim: int, rows: int, pairs: int, keys: int, fits: bool, fixed_split: int,
          token_scales: bool, device: int) -> tuple[Kernel, Kernel | None, int, int, int, int]:
    """(kernel, combining kernel or None, blocks a split, row tiles, splits, tiles a split or 0) for `pairs` of a sequence and a kv head.

    With fixed_split, `pairs` and `keys` decide nothing on which bits of a result depend: splits without keys add exactly 0."""
    dependent = capability(device) >= (9, 0)
    if fits:
        config = decode_mma.pick(NAMES[dtype], "16-bit" if cache is dtype else NAMES[cache], head_dim, rows, token_scales)
        row_tiles, tile, row_bytes = -(-rows // config.rows), decode_mma.KEYS * config.warps, config.row_bytes
        processor_bytes = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
        space = config.shared()[-1] // (4 * min(rows, config.rows) * (config.head_dim + 1))
        resident = max(1, min(config.resident, processor_bytes // (config.shared()[-1] + 1024)))
    else:
        row_tiles, tile, row_bytes, resident = rows, decode_plain.KEYS * decode_plain.WARPS, head_dim * cache.itemsize, 4
        space = MOST_PARTS
    tiles, fixed = -(-keys // tile), -(-fixed_split // tile)
    if fixed:
        splits = -(-tiles // fixed)
        places = min(resident, max(2, -(-pairs * row_tiles * splits // multiprocessors(device))))
    else:
        # Row tiles read the same keys side by side, all but the first from L2, which is not faster without end.
        tile_bytes = 2 * tile * row_bytes // min(row_tiles, 2)
        splits, places = pick_splits(pairs * row_tiles, tiles, tile_bytes, multiprocessors(device), resident)
    if fits:
        spec = decode_mma.spec(config, 0 if places >= resident else processor_bytes // places - 1024, dependent)
    else:
        spec = decode_plain.spec(decode_plain.Config(NAMES[cache], token_scales))
    kernel, many = load(spec, device), splits > min(MOST_PARTS, space)
    combine = load(decode_combine.spec(decode_combine.Config(), dependent), device) if many and splits > 1 else None
    reserve(device)
    return kernel, combine, pairs * row_tiles, row_tiles, splits, fixed


def launch(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor | None,
           scale: float, window: int, softcap: float, bias: torch.Tensor | None, alibi_slopes: torch.Tensor | None,
           k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, fixed_split: int = 0) -> torch.Tensor:
    dtype, cache, device = q.dtype, k_cache.dtype, q.device
    batch, new, heads, head_dim = q.shape
    pages, page_size, kv_heads, _ = k_cache.shape
    capacity = page_size if page_table is None else page_size * page_table.shape[1]
    out = empty_like(q)
    lines = batch * new * heads
    if lines == 0:
        return out
    if capacity == 0 or pages == 0:
        return out.zero_()

    (k_page, k_slot, k_head, k_dense), (v_page, v_slot, v_head, v_dense) = k_cache.stride(), v_cache.stride()
    if (k_dense != 1 or v_dense != 1) and head_dim > 1:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
        k_page, k_slot, k_head, v_page, v_slot, v_head = *k_cache.stride()[:3], *v_cache.stride()[:3]
    q_batch, q_new, q_head, q_dense = q.stride()
    q_at, k_at, v_at = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    unit = 8 if cache is dtype else 16  # elements of 16 bytes
    steps = head_dim | k_page | k_slot | k_head | v_page | v_slot | v_head
    fits = not (steps % unit or (k_at | v_at) & 15) and dtype is not torch.float32
    fits = fits and max(pages * k_page + page_size * k_slot, pages * v_page + page_size * v_slot) // unit < 2 ** 32
    if (q_dense != 1 and head_dim > 1) or (fits and (q_at & 15 or (q_batch | q_new | q_head) & 7)):
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
    bias_at = bias_batch = bias_head = bias_new = bias_key = slopes_at = k_scale_at = v_scale_at = 0
    if bias is not None:
        bias_at, (bias_batch, bias_head, bias_new, bias_key) = bias.data_ptr(), bias.stride()
        kinds |= KINDS[bias.dtype]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
        slopes_at = alibi_slopes.data_ptr()
    if k_scale is not None:
        k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
        k_scale_at, v_scale_at = k_scale.data_ptr(), v_scale.data_ptr()
    scale, cap = (scale / softcap, softcap * LOG2E) if softcap else (LOG2E * scale, 0.0)

    keys = capacity if window < 0 else min(capacity, window + new)
    group, pairs = heads // kv_heads, batch * kv_heads
    kernel, combine, blocks, row_tiles, splits, fixed = _plan(
        dtype, cache, head_dim, new * group, pairs, (keys + 63) & -64, fits, fixed_split, k_scale is not None and k_scale.dim() == 3,
        device.index)
    out_at, partial_at, lse_at, counters_at = out.data_ptr(), 0, 0, 0
    if splits > 1:
        width = (head_dim + 3) & -4
        workspace = q.new_empty(lines * splits * (width + 1) * 4 // q.element_size())  # of bytes: naming a dtype costs the host 2 us
        partial_at = workspace.data_ptr()
        lse_at = partial_at + 4 * lines * splits * width
        counters_at = 0 if combine else counters(device.index, blocks)
    kernel(splits, min(blocks, GRID_Y), -(-blocks // GRID_Y), q_at, k_at, v_at, lengths.data_ptr(), table_at, bias_at, slopes_at,
           k_scale_at, v_scale_at, out_at, partial_at, lse_at, counters_at, q_batch, bias_batch, bias_head, bias_new, bias_key,
           table_row, q_new, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, new, group, head_dim, capacity, pages, page_size,
           row_tiles, kv_heads, blocks, window, kinds, fixed, inverse(page_size), inverse(row_tiles), inverse(kv_heads),
           inverse(group), scale, cap)
    if combine:
        decode_combine.start(combine, partial_at, lse_at, out_at, lines, splits, head_dim, kinds >> 2)
    return out
