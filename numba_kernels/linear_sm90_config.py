"""Block shapes of the linear for many rows on Hopper, and what they put where in shared memory."""
from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

FEATURES = 128  # of the product, rows of W, a tile: 64 for each of two warpgroups
ROW_BYTES = 128  # of x in shared memory, the widest rows that TMA and wgmma swizzle
GROUP = 16  # tiles of features that are walked before the next rows of x: 132 tiles at a time then read the least of both
SPLITS = (2, 4, 8)  # blocks of a cluster that share the k of a tile
BUFFER_ROWS = 64  # of x, that TMA writes to out at once of a warpgroup's features, from one of its two buffers
BUFFER_BYTES = BUFFER_ROWS * 2 * FEATURES // 2
BUFFERS = 4
_SHARED = 227 * 1024 - 1008 - BUFFERS * BUFFER_BYTES  # of a block, with 1008 bytes to align the base, which begins on 16

BITS = {"16-bit": 16, "int8": 8, "e4m3": 8, "int4": 4, "int8_int8": 8, "e4m3_e4m3": 8}  # of a value of W, by kind
NARROW = {"int8_int8": "int8", "e4m3_e4m3": "float8_e4m3fn"}  # kinds whose x has 8 bits too, and its dtype
COLUMNS = {"16-bit": (64, 128, 256), "int8": (64, 256), "e4m3": (64,), "int4": (64, 256), "int8_int8": (128, 256), "e4m3_e4m3": (128, 256)}


@dataclass(frozen=True)
class Config:
    """kind: of W, and where x has 8 bits of x too; dtype of out, and of x where it has 16 bits; columns: rows of x a tile, the columns of
    W x^T."""

    kind: str
    dtype: str
    columns: int

    @property
    def bits(self) -> int:
        """Of a value of W."""
        return BITS[self.kind]

    @property
    def narrow(self) -> bool:
        """Whether x has 8 bits, and a scale a row."""
        return self.kind in NARROW

    @property
    def chunk(self) -> int:
        """Values of k in a row of shared memory of x."""
        return ROW_BYTES // self.x_item

    @property
    def x_item(self) -> int:
        """Bytes of a value of x."""
        return 1 if self.narrow else 2

    @property
    def depth(self) -> int:
        """Values of k a stage: 128 bytes of a row of W, which memory serves best; half of that where x is most of the stage."""
        return 64 if self.bits == 16 or (self.columns == 256 and not self.narrow) else 128

    @property
    def pieces(self) -> int:
        """Of 32 values of k a stage: as int4 is stored."""
        return self.depth // 32

    @property
    def w_bytes(self) -> int:
        """In a stage, before x."""
        return FEATURES * self.depth * self.bits // 8

    @property
    def x_bytes(self) -> int:
        return self.columns * self.depth * self.x_item

    @property
    def scale_at(self) -> int:
        """In a stage, behind W and x: what int4's groups of k have, 32 rows of W at a time."""
        return self.w_bytes + self.x_bytes

    @property
    def stage_bytes(self) -> int:
        return self.scale_at + (FEATURES // 32 * self.pieces * 128 if self.kind == "int4" else 0)

    @property
    def stages(self) -> int:
        return _SHARED // (self.stage_bytes + 16)

    # Offsets from a base of 1024-byte alignment: the stages at 0, then the buffers, then barriers, 8 bytes each.

    @property
    def buffers_at(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def full_at(self) -> int:
        return self.buffers_at + BUFFERS * BUFFER_BYTES

    @property
    def empty_at(self) -> int:
        return self.full_at + 8 * self.stages

    @property
    def shared_bytes(self) -> int:
        return self.empty_at + 8 * self.stages + 1008


class Plan(NamedTuple):
    """splits: blocks of a cluster that share a tile's k, 1, 2, 4 or 8."""

    config: Config
    splits: int = 1


# Rows of x from which the op takes this kernel where nothing was measured on the GPU at hand, by what an H100 took for eight shapes at 32
# to 8192 rows (docs/tuning/linear_sm90.md): at 16 bits never, since cuBLAS is level or ahead; others from the first row that is not another
# kernel's, if `worthwhile`.
FROM_ROWS = {"16-bit": 1 << 31, "int8": 17, "e4m3": 17, "int4": 17, "int8_int8": 1, "e4m3_e4m3": 1}

# The model of the time, in us and ns, fitted to what an H100 took (docs/tuning/linear_sm90.md). A launch; a tile's start and end, and of
# those for each column, where a block has all of its sums and where those of a cluster do; what a cluster takes to meet.
_LAUNCH, _TILE, _COLUMN, _CLUSTER_TILE, _CLUSTER_COLUMN, _MEET = 1.2, 0.6, 0.018, 2.3, 0.024, 3.3
# For a value of k: wgmma for each column, with x of 16 and of 8 bits, and what is issued beside it.
_PRODUCT, _NARROW_PRODUCT = 0.0284, 0.0156
_ISSUED = {"16-bit": 0.64, "int8": 2.18, "e4m3": 2.89, "int4": 2.61, "int8_int8": 0.26, "e4m3_e4m3": 1.1}
_L2, _MEMORY = 11.0e6, 2.33e6  # bytes a us, to all multiprocessors


def pick(kind: str, dtype: str, rows: int, features: int, depth: int, multiprocessors: int) -> Plan:
    """What has the least predicted time for x[rows, depth], W[features, depth]."""
    return min(plans(kind, dtype, rows, features, depth, multiprocessors),
               key=lambda plan: microseconds(plan, rows, features, depth, multiprocessors))


def plans(kind: str, dtype: str, rows: int, features: int, depth: int, multiprocessors: int) -> Iterator[Plan]:
    """Those that may be the best: no tile of twice the rows there are. Blocks that share a k have four stages each at least, and run all at
    once.

    The blocks of a cluster are neighbours (of one GPC, which has 16 or 18 multiprocessors, or fewer): 32 clusters of four take two rounds
    on the 132 of an H100, 20 do not.
    """
    smallest = COLUMNS[kind][0]
    for config in (Config(kind, dtype, columns) for columns in COLUMNS[kind] if columns == smallest or columns < 2 * rows):
        of_features, of_rows = tiles_of(config, rows, features)
        yield Plan(config)
        for splits in SPLITS:
            most = multiprocessors if splits == 2 else 10 * multiprocessors // 11
            if splits * of_features * of_rows <= most and 4 * splits <= -(-depth // config.depth):
                yield Plan(config, splits)


def tiles_of(config: Config, rows: int, features: int) -> tuple[int, int]:
    """(tiles of features, tiles of rows)."""
    return -(-features // FEATURES), -(-rows // config.columns)


def microseconds(plan: Plan, rows: int, features: int, depth: int, multiprocessors: int) -> float:
    """Predicted time."""
    config, splits = plan
    of_features, of_rows = tiles_of(config, rows, features)
    blocks = of_features * of_rows * splits
    rounds, bits = -(-blocks // multiprocessors), 4.25 if config.kind == "int4" else config.bits
    multiply = config.columns * (_NARROW_PRODUCT if config.narrow else _PRODUCT) + _ISSUED[config.kind]
    bring = (FEATURES * bits / 8 + config.x_item * config.columns) * min(blocks, multiprocessors) / _L2 * 1e3
    tile, column, meet = (_TILE, _COLUMN, 0.0) if splits == 1 else (_CLUSTER_TILE, _CLUSTER_COLUMN, _MEET)
    in_tiles = rounds * (tile + column * config.columns + 1e-3 * max(multiply, bring) * depth / splits) + meet
    once = features * depth * bits / 8 + config.x_item * rows * depth + 2 * rows * features
    return _LAUNCH + max(in_tiles, once / _MEMORY) + 0.05 * min(in_tiles, once / _MEMORY)


@functools.lru_cache(maxsize=1 << 14)
def worthwhile(kind: str, rows: int, features: int, depth: int, multiprocessors: int, after: int = 0) -> bool:
    """Whether the kernel is predicted to take no longer than the library, for kinds of which now one, now the other was measured to be
    faster. after: bytes, for each value of the product, that are read and written behind the library's, and not behind the kernel's."""
    if kind == "int4" and rows > 64:
        # Written out in 16 bits: cuBLAS at 720 TFLOP/s or 2.5 TB/s, and 0.75 us for a million values of W.
        library = 4.0 + features * depth * (max(2 * rows / 720e6, 2 / 2.5e6) + 0.75e-6)
    elif kind == "e4m3_e4m3":
        # torch._scaled_mm with scales a row: tiles of 128 x 128, of which blocks do not share a k.
        library = 3.0 + -(-(-(-features // 128) * -(-rows // 128)) // multiprocessors) * (1.3 + 3.05e-3 * depth)
        library += (2.0 if after else 0.0) + after * rows * features / _MEMORY
    else:
        return True
    return microseconds(pick(kind, "bfloat16", rows, features, depth, multiprocessors), rows, features, depth, multiprocessors) <= library
