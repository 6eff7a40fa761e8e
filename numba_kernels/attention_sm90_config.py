"""Block shapes of attention on Hopper, and what they put where in shared memory."""
from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PART_HEAD_DIMS = (64, 128, 256)  # of variants for keys that are split: others are filled up, a variant costs three seconds of compiling
ROW_BYTES = 128  # of a tile in shared memory, the widest that TMA and wgmma swizzle
NARROW, NARROW_HEAD_DIM = "float8_e4m3fn", 128  # smaller ones are filled with zeros on the way to shared memory
INFO_BYTES, INFO_SLOTS = 48, 2


@dataclass(frozen=True)
class Config:
    """head_dim: padded; extras: softcap, bias, ALiBi or a scale that is not positive; consumers: warpgroups of 64 query rows; keys: rows
    of a K or V tile; stages: K and V tiles in shared memory, of each; q_registers: Q is copied to registers, which leaves room for that
    of the next tile at once, and takes no bandwidth of shared memory; turns: consumers take turns at the tensor cores; parts: rows of a
    tile are query rows x the heads that share keys, which are split, and what is stored are parts of the result for decode_combine.
    """

    dtype: str
    head_dim: int
    extras: bool
    consumers: int
    keys: int
    stages: int
    q_registers: bool
    turns: bool
    parts: bool = False

    @property
    def rows(self) -> int:
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def narrow(self) -> bool:
        """8-bit: wgmma takes V only if the keys of a column are adjacent, so warps beside the producer turn each tile."""
        return self.dtype == NARROW

    @property
    def out_dtype(self) -> str:
        return "bfloat16" if self.narrow else self.dtype

    @property
    def chunk(self) -> int:
        """Columns of head_dim in a row of shared memory."""
        return ROW_BYTES // (1 if self.narrow else 2)

    @property
    def chunks(self) -> int:
        return -(-self.head_dim // self.chunk)

    @property
    def q_bytes(self) -> int:
        return self.chunks * 128 * self.rows

    @property
    def tile_bytes(self) -> int:
        return self.chunks * 128 * self.keys

    @property
    def v_columns(self) -> int:
        """Of V as it is multiplied: in 8 bits, eight of ones follow it, whose products are the sums of P."""
        return self.head_dim + 8 * self.narrow

    @property
    def v_chunk_bytes(self) -> int:
        """V turned: a row of 128 keys for each column."""
        return 128 * self.v_columns

    @property
    def v_bytes(self) -> int:
        """A tile of V as it is multiplied."""
        return self.v_chunk_bytes * -(-self.keys // 128) if self.narrow else self.tile_bytes

    # Offsets from a base of 1024-byte alignment: Q at 0, then K, V, the barriers (8 bytes each) and what the producer says of a tile, which
    # is read until the tile is stored, when the producer may be one tile ahead.

    @property
    def k_at(self) -> int:
        return self.q_bytes

    @property
    def v_at(self) -> int:
        return self.k_at + self.stages * self.tile_bytes

    @property
    def raw_at(self) -> int:
        """V as TMA brings it."""
        return self.v_at + self.narrow * self.stages * self.v_bytes

    @property
    def q_full(self) -> int:
        return self.raw_at + self.stages * self.tile_bytes

    @property
    def q_empty(self) -> int:
        return self.q_full + 8

    @property
    def k_full(self) -> int:
        return self.q_empty + 8

    @property
    def k_empty(self) -> int:
        return self.k_full + 8 * self.stages

    @property
    def v_full(self) -> int:
        return self.k_empty + 8 * self.stages

    @property
    def v_empty(self) -> int:
        return self.v_full + 8 * self.stages

    @property
    def raw_full(self) -> int:
        return self.v_full + self.narrow * 16 * self.stages

    @property
    def raw_empty(self) -> int:
        return self.raw_full + 8 * self.stages

    @property
    def info_at(self) -> int:
        return -(-(self.raw_empty + 8 * self.stages) // 16) * 16

    @property
    def sums_at(self) -> int:
        """In 8 bits, the sums of P of a consumer thread's two rows."""
        return self.info_at + INFO_BYTES * INFO_SLOTS

    @property
    def shared_bytes(self) -> int:
        """With 1008 bytes to align the base: dynamic shared memory begins on 16 bytes."""
        return self.sums_at + self.narrow * 1024 * self.consumers + 1008


def pick_parts(dtype: str, head_dim: int) -> Config:
    """For keys that are split; head_dim <= PART_HEAD_DIMS[-1]."""
    head_dim = next(d for d in PART_HEAD_DIMS if d >= head_dim)
    return Config(dtype, head_dim, False, *(_SHORT_TILES if head_dim == 64 else _TILES)[head_dim], parts=True)


def pick(dtype: str, head_dim: int, extras: bool, short: bool = False) -> Config:
    """short: as `is_short` says of the problem."""
    tiles = _NARROW_TILES if dtype == NARROW else _EXTRA_TILES if extras else _TILES | _SHORT_TILES if short else _TILES
    return Config(dtype, head_dim, extras, *tiles[head_dim])


def configs() -> Iterator[Config]:
    """Every one that `pick` and `pick_parts` can give."""
    picked = (pick(dtype, head_dim, extras, short) for dtype in ("float16", "bfloat16") for head_dim in HEAD_DIMS
              for extras in (False, True) for short in (False, True))
    yield from dict.fromkeys(picked)
    yield from (pick_parts(dtype, head_dim) for dtype in ("float16", "bfloat16") for head_dim in PART_HEAD_DIMS)
    yield pick(NARROW, NARROW_HEAD_DIM, False)


# consumers, keys, stages, q_registers, turns: the fastest measured over the rows of docs/tuning/attention_sm90.md. Keys are released after
# the softmax, so that two stages are few; at 192 and 256 no more have room. Seven at 64 hold the keys of the next head while a short
# sequence finishes this one.
_TILES = {
    64: (3, 96, 7, True, True),
    80: (2, 128, 3, True, True),
    96: (2, 128, 3, True, True),
    128: (2, 128, 3, True, True),
    192: (2, 112, 2, False, False),
    256: (2, 80, 2, False, True),
}
_NARROW_TILES = {NARROW_HEAD_DIM: (2, 128, 3, True, True)}
# At 80 to 128 smaller tiles waste less under a causal mask, and more of them are on their way: 128, 256, 512 keys of 32 heads over 8: 16.5,
# 35.0, 50.4 us; with the tiles above 18.3, 36.9, 51.7; at 2048 68.5 and 63.8.
_SHORT_TILES = {64: (2, 128, 5, True, False)} | {head_dim: (2, 64, 6, True, False) for head_dim in (80, 96, 128)}
_SHORT_KEYS = 512
_SPEED_64 = 0.85  # of the short tiles at 64, where neither they nor the others are wasted on rows or keys that do not exist


@functools.lru_cache(maxsize=4096)
def is_short(head_dim: int, queries: int, keys: int) -> bool:
    """Whether the short tiles are faster for sequences of `queries` and `keys`. Not asked of their number: a sequence gets the same bits in
    any batch."""
    if head_dim == 64:
        return _work(_SHORT_TILES[64], queries, keys) < _SPEED_64 * _work(_TILES[64], queries, keys)
    return head_dim in _SHORT_TILES and keys <= _SHORT_KEYS


def _work(tiles: tuple[int, ...], queries: int, keys: int) -> int:
    """Scores computed for a head, those of rows and keys past the end included."""
    rows = 64 * tiles[0]
    return -(-queries // rows) * rows * -(-keys // tiles[1]) * tiles[1]


# Fitted to what an H100 took for 100 problems of 1 to 384 queries and 512 to 65536 keys (docs/tuning/attention_sm90.md). us of a tile of
# PART_KEYS keys at head_dim 128, with one warpgroup at work and with two, of a tile's beginning and end, and of a call; bytes of keys and
# values a us, and how many times its share of that a multiprocessor can take; us of the merge, of a row in it and of each part of a row. At
# other head dims a tile takes its _SHARE.
PART_ROWS = PART_KEYS = 128
HALF_TILE_US, TILE_US, ENDS_US, CALL_US, BYTES_US, MOST_SHARES = 1.09, 1.45, 2.0, 4.0, 3.1e6, 1.3
MERGE_US, ROW_US, PART_US = 2.0, 0.1e-3, 0.38e-3
FEWEST_TILES = 4  # of keys: fewer were not measured
_SHARE = {64: 0.8, 80: 0.85, 96: 0.9, 128: 1.0, 192: 1.5, 256: 2.0}
_WORTH = 0.9  # of the time of heads apart and keys whole, which give a sequence the same bits in any batch


@functools.lru_cache(maxsize=4096)
def key_parts(batch: int, queries: int, key_tiles: int, heads: int, kv_heads: int, head_dim: int, processors: int) -> int:
    """How many parts keys are best split into where the heads of a group share tiles, 0 where heads apart and keys whole are as fast.

    key_tiles: times PART_KEYS keys that a query sees. What few queries leave empty of tiles, and few tiles of the multiprocessors, is what
    can be gained, until the keys' bytes take as long.
    """
    group = heads // kv_heads
    bytes_us = 4 * batch * kv_heads * PART_KEYS * key_tiles * head_dim / BYTES_US
    readers = processors / MOST_SHARES

    def time(tiles: int, rows: int, dims: tuple[int, ...], parts: int) -> float:
        tile = (HALF_TILE_US if rows <= PART_ROWS // 2 else TILE_US) * _SHARE[next(d for d in dims if d >= head_dim)]
        work = -(-tiles * parts // processors) * (-(-key_tiles // parts) * tile + ENDS_US)
        merge = MERGE_US + batch * queries * heads * (ROW_US + PART_US * parts) if parts > 1 else 0
        return CALL_US + max(work, bytes_us * max(1.0, readers / (tiles * parts))) + merge

    if group > PART_ROWS // 2 or key_tiles < FEWEST_TILES:
        return 0
    apart = time(batch * heads * -(-queries // PART_ROWS), queries, HEAD_DIMS, 1)
    tiles = batch * kv_heads * -(-queries // (PART_ROWS // group))
    fastest, parts = min((time(tiles, queries * group, PART_HEAD_DIMS, parts), parts)
                         for parts in range(1, min(key_tiles, max(1, 4 * processors // tiles)) + 1))
    return parts if fastest < _WORTH * apart else 0


# The most keys whose scores and bias fit the registers.
_EXTRA_TILES = {head_dim: (2, 64, 2, False, head_dim <= 128) for head_dim in HEAD_DIMS[:-1]} | {256: (2, 48, 2, False, False)}
