"""linear on the GPU for few rows of x and four-bit weights: out = act(x W^T + bias) + residual with W = (q - zero) * scale. sm_80 and up.

q in 0 .. 15, a scale (and zero point; without one, 8) a row and group of 32, 64 or 128 values of k. The weights lie as ftops/packing.py
says, so that what a lane loads are its fragments. A block takes 32 rows of W and `batch` rows of x, and splits K over its warps (see
linear_tile.py); a group's sums are scaled in float32. Gated, W is gate and up, one behind the other, and out = act(gate) * up + residual:
behind each tile of gate a block takes the one of up that belongs to it. Normed, x is first normalised by its root mean square, as in
linear.py. Floor: bytes of weights and scales / read bandwidth.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx, tuned
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, load
from ftops.numba_kernels.linear_dequantise import ONE, ZERO, make_int4, subtracts
from ftops.numba_kernels.linear_tile import X_ROW_BYTES, added, aligned_x, form_of, make_finish, make_norm, make_x, norm_address, spread
from ftops.numba_kernels.rows import DTYPE_NAME

TILE_ROWS, PIECE_K, PIECES = 32, 32, 4  # rows of W a block; values of k a piece, pieces a stage of a warp: four accesses of a lane
GATED_ROWS = 2 * TILE_ROWS  # gate and up together are a multiple of this
WEIGHT_BYTES = 2048  # of a stage
NORM_ROWS = 8  # of x that may be normalised here: with more the products alone take longer than the weights
BATCHES = (8, 16, 32)
RESIDENT_WARPS = 16  # of a multiprocessor, by registers
TUNED = (8, 2), (8, 3), (4, 2), (4, 3), (2, 2), (2, 4)  # warps and stages that `ftops tune` measures where a block has the memory


@dataclass(frozen=True)
class Config:
    """dtype of x; batch: rows of x a block; records of scales a stage: 1, of 128 values of k, or 4; warps of a block, stages of a warp's
    ring; normed: with an RMS norm of x, in bfloat16 alone (see `normalises`)."""

    dtype: str
    batch: int
    records: int = 1
    warps: int = 8
    stages: int = 2
    normed: bool = False

    @property
    def x_offset(self) -> int:
        """In a stage, behind weights and scales."""
        return WEIGHT_BYTES + 512 * self.records

    @property
    def norm_offset(self) -> int:
        """In a stage, behind x."""
        return self.x_offset + X_ROW_BYTES * self.batch

    @property
    def stage_bytes(self) -> int:
        return self.norm_offset + X_ROW_BYTES * self.normed

    @property
    def sums_offset(self) -> int:
        return self.warps * self.stages * self.stage_bytes

    @property
    def sums_bytes(self) -> int:
        return self.warps * 4 * (TILE_ROWS + self.normed) * self.batch

    @property
    def shared_bytes(self) -> int:
        return self.sums_offset + 2 * self.sums_bytes


def pick(dtype: str, rows: int, group_size: int) -> Config:
    """The smallest batch that holds the rows; more rows than the largest are further blocks, which find the weights in L2.

    As many warps as leave a block 99 KiB at most, all that some GPUs have.
    """
    batch = next((batch for batch in BATCHES if batch >= rows), BATCHES[-1])
    records = 4 if group_size < 128 else 1
    return Config(dtype, batch, records, {8: 8 if records == 1 else 4, 16: 4, 32: 2}[batch])


def candidates(dtype: str, rows: int, group_size: int) -> dict[str, Config]:
    """What `ftops tune` measures, by name: first what `pick` takes, then the same with other warps and stages."""
    first = pick(dtype, rows, group_size)
    others = (replace(first, warps=warps, stages=stages) for warps, stages in TUNED)
    return {tuned.name_of("linear_w4a16", config): config for config in (first, *others)}


def make_piece(config: Config) -> Callable:
    """multiply(piece, stage_sh, record, x_at, ...): one piece's products to part, a whole group's to acc."""
    batch_tiles, records, subtract = config.batch // 8, config.records, subtracts(config.dtype, config.batch)
    mma, low, high, zero = ptx.MMA[config.dtype], ptx.LOW[config.dtype], ptx.HIGH[config.dtype], np.float32(0)
    ones, symmetric, magic = np.uint32(ONE[config.dtype]), np.float32(ZERO), np.float32(128)
    dequantise, minus_of = make_int4(config.dtype, subtract)
    normed = config.normed
    square, weigh, _ = make_norm(config.dtype, config.batch, 4, TILE_ROWS) if normed else (None, None, None)

    @cuda.jit(device=True, forceinline=True)
    def load_record(record_sh, record, scale, minus, off):
        """The scales of a lane's four rows, and their zero points as what is taken off."""
        if record == 16:
            words = ptx.ld_shared_128(record_sh)
            for r in range(4):
                scale[r], off[r] = low(words[r]), high(words[r])
        else:
            first, second = ptx.ld_shared_64(record_sh)
            scale[0], scale[1], scale[2], scale[3] = low(first), high(first), low(second), high(second)
            for r in range(4):
                off[r] = symmetric
        if subtract:
            minus[0], minus[1] = minus_of(off[0], off[1])
            minus[2], minus[3] = minus_of(off[2], off[3])

    @cuda.jit(device=True, forceinline=True)
    def add_scaled(acc, part, sums, scale, off):
        for i in range(2):
            for j in range(batch_tiles):
                at = 4 * (i * batch_tiles + j)
                for r in range(4):
                    row = 2 * i + (r >> 1)
                    if not subtract:
                        part[at + r] = ptx.fma(-(magic + off[row]), sums[4 * j + r], part[at + r])
                    acc[at + r] = ptx.fma(part[at + r], scale[row], acc[at + r])
                    part[at + r] = zero
        if not subtract:
            for i in range(4 * batch_tiles):
                sums[i] = zero

    @cuda.jit(device=True, forceinline=True)
    def add(acc, start, s, a0, a1, a2, a3, x):
        """Products of a fragment with all of x; written out, since LLVM for sm_100 keeps such a loop, and acc in local memory with it."""
        mma(acc, start, a0, a1, a2, a3, x[2 * s], x[2 * s + 1])
        if batch_tiles > 1:
            mma(acc, start + 4, a0, a1, a2, a3, x[4 + 2 * s], x[5 + 2 * s])
        if batch_tiles > 2:
            mma(acc, start + 8, a0, a1, a2, a3, x[8 + 2 * s], x[9 + 2 * s])
            mma(acc, start + 12, a0, a1, a2, a3, x[12 + 2 * s], x[13 + 2 * s])

    @cuda.jit(device=True, forceinline=True)
    def multiply(piece, stage_sh, record, x_at, norm_sh, x, acc, part, sums, squares, scale, minus, off):
        if piece * records % 4 == 0:
            load_record(stage_sh + WEIGHT_BYTES + 512 * (piece * records // 4), record, scale, minus, off)
        words = ptx.ld_shared_128(stage_sh + 512 * piece)
        for j in range(batch_tiles):
            x_sh = np.int32(x_at[2 * j + (piece & 1)] + 2 * PIECE_K * piece)
            x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3] = ptx.ld_shared_128(x_sh)
        if normed:
            square(0, x, squares)
            square(1, x, squares)
            weigh(0, ptx.ld_shared_128(np.int32(norm_sh + 2 * PIECE_K * piece)), x)
        for s in range(2):
            for i in range(2):
                a = dequantise(words[2 * i + s], minus[2 * i], minus[2 * i + 1])
                add(part, 4 * batch_tiles * i, s, a[0], a[1], a[2], a[3], x)
            if not subtract:
                add(sums, 0, s, ones, ones, ones, ones, x)
        if (piece + 1) * records % 4 == 0:
            add_scaled(acc, part, sums, scale, off)

    return multiply


def make(config: Config) -> Callable:
    warps, stages, records, batch, stage_bytes = config.warps, config.stages, config.records, config.batch, config.stage_bytes
    batch_tiles, last_stage, x_offset, sums_offset = batch // 8, config.stages - 1, config.x_offset, config.sums_offset
    warp_bytes, step_pieces, piece_bytes = stages * stage_bytes, PIECES * warps, WEIGHT_BYTES // PIECES
    step_shift, step_bytes, x_step = step_pieces.bit_length() - 1, WEIGHT_BYTES * warps, X_ROW_BYTES * warps
    sums_bytes, last_sh, normed, norm_offset = config.sums_bytes, last_stage * stage_bytes, config.normed, config.norm_offset
    n_acc, n_sums, n_x_at, n_squares = 8 * batch_tiles, 4 * batch_tiles, 2 * batch_tiles, 8 * batch_tiles if normed else 1
    zero, nothing, start = np.float32(0), np.uint32(0), np.int32(0)
    wait_for_oldest, (keep, finish) = ptx.CP_ASYNC_WAIT[last_stage], make_finish(config.dtype, batch, TILE_ROWS, warps, normed)
    across = TILE_ROWS.bit_length() - 1
    multiply, (copy_x, place_x) = make_piece(config), make_x(batch, 2 * PIECE_K)
    keep_squares = make_norm(config.dtype, batch, 4, TILE_ROWS)[2] if normed else None

    @cuda.jit(device=True, forceinline=True)
    def copy(stage_sh, w_gl, scale_gl, left, group_pieces, record):
        """The stage at w_gl, of which `left` pieces exist, and the records of its groups from scale_gl on; zeros elsewhere."""
        for i in range(PIECES):
            ptx.cp_async_16(np.int32(stage_sh + 512 * i), w_gl + 512 * i, np.uint32(16 if left > i else 0))
        for i in range(records):
            record_sh, live = np.int32(stage_sh + WEIGHT_BYTES + 512 * i), np.uint32(record if left > i else 0)
            group_gl = scale_gl + 8 * record * (i >> (group_pieces - 1))
            if record == 16:
                ptx.cp_async_16(record_sh, group_gl, live)
            else:
                ptx.cp_async_8(record_sh, group_gl, live)

    def linear_w4a16(x_gl, w_gl, scale_gl, norm_gl, bias_gl, residual_gl, out_gl, x_stride, residual_stride, rows, N, K, tiles, half,
                     count, group_pieces, record, form, linear, cubic, over_length, eps):
        shared_sh = np.int32(ptx.shared_address(cuda.shared.array(0, np.uint8)))
        thread = np.int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        tile, apart, first_x = np.int32(cuda.blockIdx.y), np.int32(cuda.gridDim.y), np.int32(batch * np.int32(cuda.blockIdx.x))
        tile_bytes, scale_bytes = np.int32(count * piece_bytes), np.int32(8 * record * (count // group_pieces))
        scale_step = np.int32(8 * record * (step_pieces // group_pieces))
        w_gl, scale_gl = np.int64(w_gl) + np.int64(tile) * tile_bytes, np.int64(scale_gl) + np.int64(tile) * scale_bytes
        early = np.int32(warp * (stages * WEIGHT_BYTES))
        if lane == 0 and early < tile_bytes:
            ptx.prefetch_l2_bulk(w_gl + early, min(np.int32(stages * WEIGHT_BYTES), np.int32(tile_bytes - early)))
        if thread == 1:
            ptx.prefetch_l2_bulk(scale_gl, scale_bytes)
        own_pieces = np.int32(count - PIECES * warp)
        steps = np.int32((own_pieces + (step_pieces - 1)) >> step_shift)
        w_gl += WEIGHT_BYTES * warp + 16 * lane
        scale_gl += record * g + warp * (scale_step // warps)
        # From the end of the warp's stages of one tile to their start of the block's next; of gate, to those of up, `half` tiles behind.
        gated = np.int32(half > 0)
        w_up, scale_up = np.int64(half) * tile_bytes, np.int64(half) * scale_bytes
        w_read, scale_read = np.int64(steps) * step_bytes, np.int64(steps) * scale_step
        w_jump, scale_jump = np.int64(apart) * tile_bytes - w_read - w_up, np.int64(apart) * scale_bytes - scale_read - scale_up
        w_up, scale_up, tiles = w_up - w_read, scale_up - scale_read, half if half > 0 else tiles
        ring_sh, x_count = np.int32(shared_sh + warp * warp_bytes), np.int32(min(batch, rows - first_x))
        copy_sh, odd = np.int32(ring_sh + 16 * lane), lane >> 4
        copy_x_sh = np.int32(ring_sh + x_offset + X_ROW_BYTES * odd + (16 * (lane & 15) ^ 2 * PIECE_K * odd))
        k = np.int32(PIECE_K * PIECES * warp + 8 * (lane & 15))
        x_begin = np.int64(x_gl) + 2 * (x_stride * (first_x + odd) + k)
        x_jump, own_k = 4 * x_stride, np.int32(K - k)
        x_gl, left, left_k = x_begin, own_pieces, own_k
        norm_behind = np.int64(norm_gl) + 2 * k - x_begin  # x, where the lanes of an even row are
        x_at = cuda.local.array(n_x_at, np.int32)
        x = cuda.local.array(n_sums, np.uint32)
        acc = cuda.local.array(n_acc, np.float32)
        part = cuda.local.array(n_acc, np.float32)
        sums = cuda.local.array(n_sums, np.float32)
        squares = cuda.local.array(n_squares, np.float32)
        scale = cuda.local.array(4, np.float32)
        off = cuda.local.array(4, np.float32)
        minus = cuda.local.array(4, np.uint32)
        for i in range(n_acc):
            acc[i], part[i] = zero, zero
        for i in range(n_sums):
            sums[i] = zero
        for i in range(n_squares):
            squares[i] = zero
        for i in range(4):
            minus[i] = nothing
        ptx.wait_for_primary()
        ptx.launch_dependents()
        # Stages to be copied, in all and of this tile; whether this is a tile of up, for what is copied and what is multiplied.
        waiting, ahead, copies_up, takes_up = np.int32(steps * ((tiles - tile + apart - 1) // apart) << gated), steps, start, start
        filling, using, parity, begin = start, start, start, np.int32(-last_stage)  # steps below 0 only copy
        while tile < tiles:
            for step in range(begin, steps):
                ptx.warp_sync()  # every lane has read the stage that is filled now
                if waiting > 0:
                    copy(np.int32(copy_sh + filling), w_gl, scale_gl, left, group_pieces, record)
                    copy_x(np.int32(copy_x_sh + filling), x_gl, x_jump, x_count, np.int32(x_count - odd), left_k)
                    if normed and odd == 0:
                        norm_sh = np.int32(copy_x_sh + norm_offset - x_offset + filling)
                        ptx.cp_async_16_l1(norm_sh, x_gl + norm_behind, np.uint32(16 if left_k > 0 else 0))
                    w_gl, scale_gl, x_gl = w_gl + step_bytes, scale_gl + scale_step, x_gl + x_step
                    left, left_k = np.int32(left - step_pieces), np.int32(left_k - PIECE_K * step_pieces)
                    filling = start if filling == last_sh else np.int32(filling + stage_bytes)
                    waiting, ahead = np.int32(waiting - 1), np.int32(ahead - 1)
                    if ahead == 0:
                        onward = copies_up == gated
                        w_gl, scale_gl = w_gl + (w_jump if onward else w_up), scale_gl + (scale_jump if onward else scale_up)
                        x_gl, left, left_k, ahead, copies_up = x_begin, own_pieces, own_k, steps, np.int32(gated - copies_up)
                ptx.cp_async_commit()
                if step < 0:
                    continue
                wait_for_oldest()
                ptx.warp_sync()
                stage_sh = np.int32(copy_sh + using)
                for j in range(batch_tiles):
                    even, swapped = place_x(min(g + 8 * j, x_count - 1), 16 * t)
                    x_sh = np.int32(ring_sh + x_offset + using)
                    x_at[2 * j], x_at[2 * j + 1] = np.int32(x_sh + even), np.int32(x_sh + swapped)
                norm_sh = np.int32(ring_sh + norm_offset + 16 * t + using)
                using = start if using == last_sh else np.int32(using + stage_bytes)
                # Written out: LLVM keeps such a loop as one.
                multiply(0, stage_sh, record, x_at, norm_sh, x, acc, part, sums, squares, scale, minus, off)
                multiply(1, stage_sh, record, x_at, norm_sh, x, acc, part, sums, squares, scale, minus, off)
                multiply(2, stage_sh, record, x_at, norm_sh, x, acc, part, sums, squares, scale, minus, off)
                multiply(3, stage_sh, record, x_at, norm_sh, x, acc, part, sums, squares, scale, minus, off)
            sums_sh = np.int32(shared_sh + sums_offset + parity)
            if takes_up == gated:
                keep(acc, sums_sh, thread)
                if normed:
                    keep_squares(squares, sums_sh, thread)
                cuda.syncthreads()
                finish(np.int32(sums_sh - sums_bytes * gated), sums_bytes, across, thread, np.int32(TILE_ROWS * tile), first_x, rows,
                       np.int32(N >> gated), np.int32(TILE_ROWS * half), np.int64(bias_gl), np.int64(residual_gl), residual_stride,
                       np.int64(out_gl), form, linear, cubic, over_length,
                       eps)
                tile = np.int32(tile + apart)
            else:
                cuda.syncthreads()  # what lies here has been read
                keep(acc, sums_sh, thread)
                if normed:
                    keep_squares(squares, sums_sh, thread)
            parity, takes_up, begin = np.int32(sums_bytes - parity), np.int32(gated - takes_up), start
            for i in range(n_acc):
                acc[i] = zero
            for i in range(n_squares):
                squares[i] = zero

    return linear_w4a16


def spec(config: Config, shared_bytes: int = 0) -> Spec:
    """shared_bytes above what is needed keep further blocks from a multiprocessor."""
    # Normed it would take a few registers more than two blocks of eight warps have on sm_100.
    return Spec(make, config, "ppppppplliiiiiiiiiffff", threads=32 * config.warps, shared_bytes=max(shared_bytes, config.shared_bytes),
                min_blocks=RESIDENT_WARPS // config.warps if config.normed else 1, dependent=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype in ("float16", "bfloat16"):
        for rows in BATCHES:
            for group_size in (64, 128):
                yield spec(pick(dtype, rows, group_size))
                if dtype == "bfloat16" and rows <= NORM_ROWS:
                    yield spec(replace(pick(dtype, rows, group_size), normed=True))


def serves(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, max_rows: int) -> bool:
    """Whether this kernel is taken for x[..., K] of 16 bits: it was the fastest, or, unmeasured, up to max_rows rows."""
    values, K, device = x.numel(), x.shape[-1], x.device.index
    if device in tuned.UNTUNED:
        return 0 < values <= max_rows * K
    return values > 0 and _takes(PIECE_K * packed.shape[1] // scales.shape[1], x.dtype, features, K, values // K, max_rows, device)


@functools.lru_cache(maxsize=1 << 14)
def _takes(group_size: int, dtype: torch.dtype, features: int, K: int, rows: int, max_rows: int, device: int) -> bool:
    return tuned.takes("linear_w4a16", tuned.problem(tuned.op_of("int4", group_size), dtype, features, K), rows, rows <= max_rows, device)


@functools.cache
def _kernel(dtype: torch.dtype, rows: int, features: int, K: int, group_size: int, device: int,
            config: Config | None = None, normed: bool = False) -> tuple[Kernel, int, int]:
    """(kernel, blocks for x, blocks for W)."""
    tiles = -(-features // TILE_ROWS)
    if config is None:
        config = tuned.chosen(tuned.problem(tuned.op_of("int4", group_size), dtype, features, K), rows, device,
                              candidates(DTYPE_NAME[dtype], rows, group_size))
    config, blocks_x = replace(config, normed=normed), -(-rows // config.batch)
    blocks, shared_bytes = spread(tiles, blocks_x, config.shared_bytes, RESIDENT_WARPS // config.warps, device)
    return load(spec(config, shared_bytes), device), blocks_x, blocks


def launch(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, bias: torch.Tensor | None, activation: str | None,
           residual: torch.Tensor | None, gated: bool = False, config: Config | None = None, norm: torch.Tensor | None = None,
           eps: float = 0.0) -> torch.Tensor:
    """packed [tiles, pieces, 32, 4]; scales [tiles, groups, 8, 4], or [..., 2] with zero points. config: in place of what is picked.

    gated: features a multiple of GATED_ROWS, and the result half of them. norm: x is first normalised by its root mean square and
    multiplied by norm[K], where `normalises`.
    """
    columns, (tiles, count) = x.shape[-1], packed.shape[:2]
    rows = x.numel() // columns
    half = tiles // 2 if gated else 0
    out = x.new_empty((*x.shape[:-1], features // 2 if gated else features))
    x, x_stride, K = aligned_x(x, rows)
    (norm_at, _norm), (bias_at, residual_at, residual_stride, _held) = norm_address(norm), added(bias, residual)
    group_pieces = count // scales.shape[1]
    kernel, blocks_x, blocks = _kernel(x.dtype, rows, features, columns, PIECE_K * group_pieces, x.device.index, config,
                                       norm is not None)
    kernel(blocks_x, blocks, 1, x.data_ptr(), packed.data_ptr(), scales.data_ptr(), norm_at, bias_at, residual_at, out.data_ptr(),
           x_stride, residual_stride, rows, features, K, tiles, half, count, group_pieces, 8 if scales.dim() == 4 else 16,
           *form_of(activation), 1 / columns, eps)
    return out
