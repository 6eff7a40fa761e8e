"""linear on the GPU for few rows of x: out = act(x W^T + bias) + residual, one pass over the weights W[N, K] as they lie. sm_80 and up.

Gated, W is gate and up, one behind the other, and out = act(gate) * up + residual: a tile is then 8 rows of each, so that both sums of a
result meet in one block.

W is 16 bits, or int8 or float8 e4m3 with a scale a row. A block takes 16 rows of W and `batch` of x at a time, and splits K over its warps
(see linear_tile.py); a warp copies 128 or 256 neighbouring bytes of a row at once, which the memory serves a sixth faster than 64. On
sm_90 the first bytes are asked into L2 while the kernel before still runs; the copies themselves wait for its end, so that weights which
that kernel writes are read as they should be. Floor: bytes of the weights / read bandwidth.

Normed, x is first normalised by its root mean square: the norm's weight comes through the ring as one more row of x (see `make_norm`).
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
from ftops.numba_kernels.linear_dequantise import make_rows
from ftops.numba_kernels.linear_tile import (
    STAGE_K,
    X_ROW_BYTES,
    added,
    aligned_x,
    form_of,
    kind_of,
    make_finish,
    make_norm,
    make_x,
    norm_address,
    spread,
)
from ftops.numba_kernels.rows import DTYPE_NAME

TILE_ROWS = 16  # of W a block takes at a time
GATED_ROWS = 16  # gate and up together are a multiple of this
PIECE_BYTES = 64  # of a row that the four lanes t of a fragment load at once
RESIDENT_WARPS = 16  # of a multiprocessor, by registers
NORM_ROWS = 16  # of x that may be normalised here: registers for the squares of more would keep blocks away
BATCHES = {"16-bit": (8, 16), "int8": (8, 16, 32), "e4m3": (8, 16, 32)}
TUNED = (4, 2), (4, 3), (4, 4), (8, 2), (2, 4), (2, 6)  # warps and stages that `ftops tune` measures where a block has the memory


@dataclass(frozen=True)
class Config:
    """kind of W: 16-bit, int8 or e4m3; dtype of x; batch: rows of x a block; warps of a block, stages of a warp's ring;
    normed: with an RMS norm of x, in bfloat16 alone (see `normalises`)."""

    kind: str
    dtype: str
    batch: int
    warps: int = 4
    stages: int = 2
    normed: bool = False

    @property
    def item(self) -> int:
        return 2 if self.kind == "16-bit" else 1

    @property
    def x_offset(self) -> int:
        """In a stage, behind the weights."""
        return TILE_ROWS * STAGE_K * self.item

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


def pick(kind: str, dtype: str, rows: int) -> Config:
    """The smallest batch that holds the rows; more rows than the largest are further blocks, which find the weights in L2.

    Stages of 8-bit weights are half as large, so there are three, and four of two warps where two thirds of a stage are x: more bytes of
    weights are then under way (4096 x 14336 at 16 rows 25.3 us after 27.8 on an H100). A block takes no more than 99 KiB, all that some
    GPUs have.
    """
    batch = next((batch for batch in BATCHES[kind] if batch >= rows), BATCHES[kind][-1])
    warps, stages = {8: (4, 3), 16: (2, 4)}.get(batch, (4, 2)) if kind != "16-bit" else (4, 2)
    return Config(kind, dtype, batch, warps, stages)


def candidates(kind: str, dtype: str, rows: int) -> dict[str, Config]:
    """What `ftops tune` measures, by name: first what `pick` takes, then the same with other warps and stages."""
    first = pick(kind, dtype, rows)
    others = (replace(first, warps=warps, stages=stages) for warps, stages in TUNED)
    return {tuned.name_of("linear", config): config for config in (first, *others)}


def make(config: Config) -> Callable:
    item, warps, stages, batch, stage_bytes = config.item, config.warps, config.stages, config.batch, config.stage_bytes
    batch_tiles, warp_bytes, last_stage, row_bytes, step_k = batch // 8, stages * stage_bytes, stages - 1, STAGE_K * item, STAGE_K * warps
    lanes_a_row, lane_k, step_bytes, x_step, x_words = row_bytes // 16, 16 // item, row_bytes * warps, X_ROW_BYTES * warps, 8 // item
    rows_at_once, pieces, step_shift = 32 // lanes_a_row, row_bytes // PIECE_BYTES, step_k.bit_length() - 1
    x_offset, sums_offset, last_sh, normed = config.x_offset, config.sums_offset, last_stage * stage_bytes, config.normed
    n_acc, n_x, n_x_at, second = 8 * batch_tiles, x_words * batch_tiles, 2 * batch_tiles, 4 * batch_tiles
    n_squares, norm_offset, sums_bytes = 8 * batch_tiles if normed else 1, config.norm_offset, config.sums_bytes
    mma, wait_for_oldest, zero, start = ptx.MMA[config.dtype], ptx.CP_ASYNC_WAIT[last_stage], np.float32(0), np.int32(0)
    scaled, products, unit = item == 1, x_words // 2, 64 if item == 2 else 16  # of x: bytes between a lane's accesses
    fragment, (copy_x, place_x) = make_rows(config.kind, config.dtype), make_x(batch, unit)
    keep, finish = make_finish(config.dtype, batch, TILE_ROWS, warps, normed)
    square, weigh, keep_squares = make_norm(config.dtype, batch, x_words, TILE_ROWS) if normed else (None, None, None)
    across, up_offset = TILE_ROWS.bit_length() - 1, 4 * batch * (TILE_ROWS // 2)

    @cuda.jit(device=True, forceinline=True)
    def copy(stage_sh, w_gl, jump, to_up, below, left):
        """STAGE_K values of k of the tile's rows; zeros beyond K. Rows past the last, `below`, are its copies and not stored.

        to_up: bytes between the tile's first half and its second, beyond those of neighbours.
        """
        size = np.uint32(16 if left > 0 else 0)
        for i in range(TILE_ROWS // rows_at_once):
            ptx.cp_async_16(np.int32(stage_sh + rows_at_once * row_bytes * i), w_gl, size)
            if rows_at_once * (i + 1) <= below:
                w_gl += jump
            if rows_at_once * (i + 1) == TILE_ROWS // 2:
                w_gl += to_up

    @cuda.jit(device=True, forceinline=True)
    def load_x(p, x_at, x):
        """A piece's fragments."""
        for j in range(batch_tiles):
            for a in range(x_words // 4):
                number, at = p if item == 2 else a, x_words * j + 4 * a
                x_sh = np.int32(x_at[2 * j + (number & 1)] + unit * number + (0 if item == 2 else 2 * PIECE_BYTES * p))
                x[at], x[at + 1], x[at + 2], x[at + 3] = ptx.ld_shared_128(x_sh)

    @cuda.jit(device=True, forceinline=True)
    def norm_x(p, norm_sh, x, squares):
        """x of a piece times the norm's weight, and its squares."""
        square(0, x, squares)
        square(1, x, squares)
        if products == 4:
            square(2, x, squares)
            square(3, x, squares)
        for a in range(x_words // 4):
            weigh(4 * a, ptx.ld_shared_128(np.int32(norm_sh + (unit * p if item == 2 else 2 * PIECE_BYTES * p + unit * a))), x)

    @cuda.jit(device=True, forceinline=True)
    def multiply(s, low, high, x, acc):
        """Product s of a piece, to one of two sums, so that a product waits for less. Written out, since LLVM for sm_100 keeps such loops,
        and acc in local memory with them."""
        a, at, place = fragment(low, high, s), 2 * s, second * (s & 1)
        mma(acc, place, a[0], a[1], a[2], a[3], x[at], x[at + 1])
        if batch_tiles > 1:
            mma(acc, place + 4, a[0], a[1], a[2], a[3], x[at + x_words], x[at + x_words + 1])
        if batch_tiles > 2:
            mma(acc, place + 8, a[0], a[1], a[2], a[3], x[at + 2 * x_words], x[at + 2 * x_words + 1])
            mma(acc, place + 12, a[0], a[1], a[2], a[3], x[at + 3 * x_words], x[at + 3 * x_words + 1])

    def linear(x_gl, w_gl, scale_gl, norm_gl, bias_gl, residual_gl, out_gl, x_stride, w_stride, residual_stride, rows, N, K, width, half,
               form, linear, cubic, over_length, eps):
        shared_sh = np.int32(ptx.shared_address(cuda.shared.array(0, np.uint8)))
        thread = np.int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        g, t, row, column = lane >> 2, lane & 3, lane // lanes_a_row, lane % lanes_a_row
        first, apart = np.int32(TILE_ROWS * np.int32(cuda.blockIdx.y)), np.int32(TILE_ROWS * np.int32(cuda.gridDim.y))
        first_x, w_row = np.int32(batch * np.int32(cuda.blockIdx.x)), np.int64(w_stride * item)
        # Of a gated tile, rows 8 to 15 are those of up, `half` rows of W behind the gate's.
        w_gl, gated, apart_rows = np.int64(w_gl), np.int32(half > 0), np.int32(max(half - TILE_ROWS // 2, start))
        to_up = w_row * apart_rows
        if thread < TILE_ROWS and first + thread < N:
            behind = to_up if thread >= TILE_ROWS // 2 else np.int64(0)
            ptx.prefetch_l2_bulk(w_gl + w_row * ((first >> gated) + thread) + behind, min(width * item, stages * step_bytes))
        steps, jump = np.int32((width - STAGE_K * warp + step_k - 1) >> step_shift), rows_at_once * w_row
        own_left = np.int32(width - STAGE_K * warp - lane_k * column)
        w_begin = w_gl + row_bytes * warp + 16 * column  # of row 0
        ring_sh, x_count, odd = np.int32(shared_sh + warp * warp_bytes), np.int32(min(batch, rows - first_x)), lane >> 4
        # Odd rows have the halves of 128 bytes swapped: a quarter of a warp reads 64 bytes of two rows, which then lie in all banks.
        copy_sh = np.int32(ring_sh + row_bytes * row + (16 * column ^ (row & 1) << 6))
        even_sh = np.int32(ring_sh + row_bytes * g + 16 * t + 64 * (g & 1))
        odd_sh = np.int32(even_sh - 128 * (g & 1))
        copy_x_sh = np.int32(ring_sh + x_offset + X_ROW_BYTES * odd + (16 * (lane & 15) ^ unit * odd))
        k = np.int32(STAGE_K * warp + 8 * (lane & 15))
        x_begin, x_jump, own_k = np.int64(x_gl) + 2 * (x_stride * (first_x + odd) + k), 4 * x_stride, np.int32(K - k)
        norm_behind = np.int64(norm_gl) + 2 * k - x_begin  # x, where the lanes of an even row are
        x_at = cuda.local.array(n_x_at, np.int32)
        x = cuda.local.array(n_x, np.uint32)
        acc = cuda.local.array(n_acc, np.float32)
        squares = cuda.local.array(n_squares, np.float32)
        for i in range(n_acc):
            acc[i] = zero
        for i in range(n_squares):
            squares[i] = zero
        # What is copied next: its tile, stages of it that are left, and where.
        copied, waiting, below = first, max(steps, start), np.int32(N - 1 - first - row)
        w_gl, x_gl, left, left_k = w_begin + w_row * min((first >> gated) + row, N - 1), x_begin, own_left, own_k
        ptx.wait_for_primary()
        ptx.launch_dependents()
        filling, using, parity, begin = start, start, start, np.int32(-last_stage)  # steps below 0 only copy
        while first < N:
            for step in range(begin, steps):
                ptx.warp_sync()  # every lane has read the stage that is filled now
                if waiting > 0:
                    copy(np.int32(copy_sh + filling), w_gl, jump, to_up, below, left)
                    copy_x(np.int32(copy_x_sh + filling), x_gl, x_jump, x_count, np.int32(x_count - odd), left_k)
                    if normed and odd == 0:
                        norm_sh = np.int32(copy_x_sh + norm_offset - x_offset + filling)
                        ptx.cp_async_16_l1(norm_sh, x_gl + norm_behind, np.uint32(16 if left_k > 0 else 0))
                    w_gl, x_gl, left, left_k = w_gl + step_bytes, x_gl + x_step, np.int32(left - step_k), np.int32(left_k - step_k)
                    filling, waiting = start if filling == last_sh else np.int32(filling + stage_bytes), np.int32(waiting - 1)
                    if waiting == 0:
                        copied = np.int32(copied + apart)
                        waiting, below = steps if copied < N else start, np.int32(N - 1 - copied - row)
                        w_gl, x_gl, left, left_k = w_begin + w_row * min((copied >> gated) + row, N - 1), x_begin, own_left, own_k
                ptx.cp_async_commit()
                if step < 0:
                    continue
                wait_for_oldest()
                ptx.warp_sync()
                for j in range(batch_tiles):
                    even, swapped = place_x(min(g + 8 * j, x_count - 1), 2 * lane_k * t)
                    x_sh = np.int32(ring_sh + x_offset + using)
                    x_at[2 * j], x_at[2 * j + 1] = np.int32(x_sh + even), np.int32(x_sh + swapped)
                for p in range(pieces):
                    piece_sh = np.int32((odd_sh if p & 1 else even_sh) + using + PIECE_BYTES * p)
                    low, high = ptx.ld_shared_128(piece_sh), ptx.ld_shared_128(np.int32(piece_sh + 8 * row_bytes))
                    load_x(p, x_at, x)
                    if normed:
                        norm_x(p, np.int32(ring_sh + norm_offset + 2 * lane_k * t + using), x, squares)
                    multiply(0, low, high, x, acc)
                    multiply(1, low, high, x, acc)
                    if products == 4:
                        multiply(2, low, high, x, acc)
                        multiply(3, low, high, x, acc)
                using = start if using == last_sh else np.int32(using + stage_bytes)
            for j in range(batch_tiles):
                for r in range(4):
                    acc[4 * j + r] += acc[second + 4 * j + r]
            if scaled:
                upper = ptx.ld_written_f32(np.int64(scale_gl) + 4 * min((first >> gated) + g, N - 1))
                lower = ptx.ld_written_f32(np.int64(scale_gl) + 4 * min((first >> gated) + g + 8 + apart_rows, N - 1))
                for j in range(batch_tiles):
                    acc[4 * j], acc[4 * j + 1] = acc[4 * j] * upper, acc[4 * j + 1] * upper
                    acc[4 * j + 2], acc[4 * j + 3] = acc[4 * j + 2] * lower, acc[4 * j + 3] * lower
            sums_sh = np.int32(shared_sh + sums_offset + parity)
            keep(acc, sums_sh, thread)
            if normed:
                keep_squares(squares, sums_sh, thread)
                for i in range(n_squares):
                    squares[i] = zero
            cuda.syncthreads()
            finish(sums_sh, up_offset, np.int32(across - gated), thread, np.int32(first >> gated), first_x, rows, np.int32(N >> gated),
                   half, np.int64(bias_gl), np.int64(residual_gl), residual_stride, np.int64(out_gl), form, linear, cubic,
                   over_length, eps)
            parity = np.int32(sums_bytes - parity)
            for i in range(n_acc):
                acc[i] = zero
            first, begin = np.int32(first + apart), start

    return linear


def spec(config: Config, shared_bytes: int = 0) -> Spec:
    """shared_bytes above what is needed keep further blocks from a multiprocessor."""
    return Spec(make, config, "pppppppllliiiiiiffff", threads=32 * config.warps,
                shared_bytes=max(shared_bytes, config.shared_bytes), dependent=True, halves=config.kind == "16-bit")


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for kind, batches in BATCHES.items():
        for dtype in ("float16", "bfloat16"):
            for rows in batches:
                yield spec(pick(kind, dtype, rows))
                if dtype == "bfloat16" and rows <= NORM_ROWS:
                    yield spec(replace(pick(kind, dtype, rows), normed=True))


def serves(x: torch.Tensor, weight: torch.Tensor, max_rows: int | None) -> bool:
    """Whether this kernel is taken for x[..., K] and weight[N, width]: it was the fastest, or, unmeasured, up to max_rows rows.

    None: whether it can, with x of 16 bits, and rows of the weight that are whole 16-byte accesses.
    """
    width, values = weight.shape[1], x.numel()
    stride, dense = weight.stride()
    able = (values > 0 and x.dtype is not torch.float32 and dense == 1 and weight.shape[0] > 0
            and not ((width | stride) * weight.element_size() | weight.data_ptr()) & 15)
    if not able or max_rows is None:
        return able
    K, device = x.shape[-1], x.device.index
    if device in tuned.UNTUNED:
        return values <= max_rows * K
    return _takes(weight.dtype, x.dtype, weight.shape, values // K, max_rows, device)


@functools.lru_cache(maxsize=1 << 14)
def _takes(kind: torch.dtype, dtype: torch.dtype, shape: tuple[int, int], rows: int, max_rows: int, device: int) -> bool:
    problem = tuned.problem(tuned.op_of(kind_of(kind)), dtype, *shape)
    return tuned.takes("linear", problem, rows, rows <= max_rows, device)


@functools.cache
def _kernel(kind: str, dtype: torch.dtype, rows: int, N: int, width: int, device: int,
            config: Config | None = None, normed: bool = False) -> tuple[Kernel, int, int]:
    """(kernel, blocks for x, blocks for W)."""
    if config is None:
        config = tuned.chosen(tuned.problem(tuned.op_of(kind), dtype, N, width), rows, device, candidates(kind, DTYPE_NAME[dtype], rows))
    config, blocks_x = replace(config, normed=normed), -(-rows // config.batch)
    blocks, shared_bytes = spread(-(-N // TILE_ROWS), blocks_x, config.shared_bytes, RESIDENT_WARPS // config.warps, device)
    return load(spec(config, shared_bytes), device), blocks_x, blocks


def launch(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, activation: str | None,
           residual: torch.Tensor | None, gated: bool = False, config: Config | None = None, norm: torch.Tensor | None = None,
           eps: float = 0.0) -> torch.Tensor:
    """weight[N, width], width K or, in 8 bits, more: zeros to whole accesses; then scales[N], float32. gated: N a multiple of 16.
    config: in place of what is picked. norm: x is first normalised by its root mean square, where `normalises`, and multiplied by norm[K].
    """
    (N, width), rows, over_length = weight.shape, x.numel() // x.shape[-1], 1 / x.shape[-1]
    half = N // 2 if gated else 0
    out = x.new_empty((*x.shape[:-1], half or N))
    x, x_stride, K = aligned_x(x, rows)
    scale_at, (norm_at, _norm) = 0 if scales is None else scales.data_ptr(), norm_address(norm)
    bias_at, residual_at, residual_stride, _held = added(bias, residual)
    kernel, blocks_x, blocks = _kernel(kind_of(weight.dtype), x.dtype, rows, N, width, x.device.index, config,
                                       norm is not None)
    kernel(blocks_x, blocks, 1, x.data_ptr(), weight.data_ptr(), scale_at, norm_at, bias_at, residual_at, out.data_ptr(), x_stride,
           weight.stride(0), residual_stride, rows, N, K, width, half, *form_of(activation), over_length, eps)
    return out
