"""Block shapes of the linear for many rows on Hopper, and what they put where in shared memory."""
from __future__ import annotations

import functools
from dataclasses import dataclass

FEATURES = 128  # of the product, rows of W, a tile: 64 for each of two warpgroups
ROW_BYTES = 128  # of x in shared memory, the widest rows that TMA and wgmma swizzle
GROUP = 16  # tiles of features that are walked before the next rows of x: 132 tiles at a time then read the least of both
SPLITS = (8, 4, 2, 1)  # blocks of a cluster that share the k of a tile
_SHARED = 227 * 1024 - 1008  # of a block, with 1008 bytes to align the base: dynamic shared memory begins on 16 bytes

BITS = {"16-bit": 16, "int8": 8, "e4m3": 8, "int4": 4, "int8_int8": 8, "e4m3_e4m3": 8}  # of a value of W, by kind
NARROW = {"int8_int8": "int8", "e4m3_e4m3": "float8_e4m3fn"}  # kinds whose x has 8 bits too, and its dtype
COLUMNS = {"16-bit": (64, 128, 256), "int8": (64, 256), "e4m3": (64,), "int4": (64, 256), "int8_int8": (128, 256), "e4m3_e4m3": (128, 192)}


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

    # Offsets from a base of 1024-byte alignment: the stages at 0, then their barriers, 8 bytes each.

    @property
    def full_at(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def empty_at(self) -> int:
        return self.full_at + 8 * self.stages

    @property
    def shared_bytes(self) -> int:
        return self.empty_at + 8 * self.stages + 1008


# Rows of x from which the op takes this kernel: none, until it has been measured beside the library's.
FROM_ROWS = dict.fromkeys(BITS, 1 << 31)
# Predicted, in clocks (docs/tuning/linear_sm90.md): a tile's start and end; for a value of k, what a scheduler's two warps issue beside
# wgmma, of which each instruction costs the tensor cores a clock.
_AROUND, _ISSUED = 4000, {"16-bit": 1.3, "int8": 3.9, "e4m3": 3.9, "int4": 5.5, "int8_int8": 0.7, "e4m3_e4m3": 0.7}
_L2_BYTES = 38  # a clock and multiprocessor: what 750 TFLOP/s take with tiles of 128 x 256
_MEMORY_BYTES = 2600  # a clock of all multiprocessors, 4.5 TB/s at 1.73 GHz


def pick(kind: str, dtype: str, rows: int, features: int, depth: int, multiprocessors: int) -> Config:
    """The tile with the least predicted time for x[rows, depth], W[features, depth]."""
    return min((Config(kind, dtype, columns) for columns in COLUMNS[kind]),
               key=lambda config: clocks(config, rows, features, depth, multiprocessors))


def tiles_of(config: Config, rows: int, features: int) -> tuple[int, int]:
    """(tiles of features, tiles of rows)."""
    return -(-features // FEATURES), -(-rows // config.columns)


@functools.lru_cache(maxsize=4096)
def splits_of(config: Config, rows: int, features: int, depth: int, multiprocessors: int) -> int:
    """Blocks that share a tile's k: as many as find a multiprocessor, with four stages each at least."""
    of_features, of_rows = tiles_of(config, rows, features)
    steps = -(-depth // config.depth)
    return next((splits for splits in SPLITS if splits * of_features * of_rows <= multiprocessors and 4 * splits <= steps
                 and not config.columns // 8 % splits), 1)


def clocks(config: Config, rows: int, features: int, depth: int, multiprocessors: int) -> float:
    """Predicted time."""
    of_features, of_rows = tiles_of(config, rows, features)
    splits = splits_of(config, rows, features, depth, multiprocessors)
    # Of one value of k, as are the next two.
    multiply = FEATURES * config.columns / (4096 if config.narrow else 2048) + _ISSUED[config.kind]
    if config.kind == "e4m3_e4m3":
        multiply += config.columns / 128  # the sums are added up every 128 values of k
    bring = (FEATURES * config.bits / 8 + config.x_item * config.columns) / _L2_BYTES
    rounds = -(-of_features * of_rows * splits // multiprocessors)
    in_tiles = rounds * (max(multiply, bring) * depth / splits + _AROUND)
    once = features * depth * config.bits / 8 + config.x_item * rows * depth + 2 * rows * features
    return max(in_tiles, once / _MEMORY_BYTES + _AROUND)
