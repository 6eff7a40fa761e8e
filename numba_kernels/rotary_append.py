"""rotary_append and append_kv on the GPU: q and k normed and rotated, q returned, k and v written to their places in the cache, one launch.

A team of 2 ** shift threads owns one or several heads of a token, all of q, of k or of v, whose cosines and place it finds once; the next
head is on its way while one is worked on. A thread owns one unit of a head, two accesses of `vec` elements: the pairs of `vec` angles, or
beyond rotary_dim two accesses to pass on; four units where an access is one element. Between reads and writes everything is float32.
Floor: (reads of q, k and v + writes of q and of places in the cache) / copy bandwidth; of a few tokens, the latency of a launch.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.angles import cos_sin, make_table, table_layout
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.division import divide, inverse
from ftops.numba_kernels.launch import Kernel, capability, empty_like, load
from ftops.numba_kernels.narrow import LARGEST, SMALLEST, make_narrow, scaled_down
from ftops.numba_kernels.rows import DTYPE_NAME, DTYPES, ITEM, make_convert, make_io, rsqrt, words_of

SIGNATURE = "p" * 15 + "l" * 29 + "i" * 19 + "fff"
THREADS = 128
SAME, INT8, FP8 = range(3)  # how the cache keeps its elements
CACHE_KIND = {torch.int8: INT8, torch.float8_e4m3fn: FP8}
# Up to here a team takes one head, so that more multiprocessors take part and a thread has less to do; beyond, several are on their way.
FEW_HEADS, HEADS = 8192, 4


@dataclass(frozen=True)
class Config:
    """dtype of q, k and v; vec: elements an access, 16 bytes of them or one; token_scales: an 8-bit cache has a scale a token and head,
    which is measured and written here."""

    dtype: str
    vec: int
    token_scales: bool = False


def make(config: Config) -> Callable:
    vec, item, each, units_n = config.vec, ITEM[config.dtype], words_of(config.dtype, config.vec), 1 if config.vec > 1 else 4
    n_words, n_angles, n_values, n_pair = 2 * each * units_n, vec * units_n, 2 * vec * units_n, 2 * vec
    _, store = make_io(config.dtype, vec)
    unpack, pack = make_convert(config.dtype, vec)
    table = make_table(config.dtype, vec)
    narrow_int8, narrow_fp8 = make_narrow("int8", vec), make_narrow("float8_e4m3fn", vec)
    x1, x2, x4, x8, x16 = (ptx.shuffle_xor[n] for n in (1, 2, 4, 8, 16))
    zero, one, smallest, largest_int8, largest_fp8 = (np.float32(c) for c in (0, 1, SMALLEST, LARGEST["int8"], LARGEST["float8_e4m3fn"]))
    token_scales = config.token_scales

    if vec > 1:
        @cuda.jit(device=True, forceinline=True)
        def fetch(address, live, words, at):
            words[at], words[at + 1], words[at + 2], words[at + 3] = ptx.ld_written_128_if(address, live)
    else:
        @cuda.jit(device=True, forceinline=True)
        def fetch(address, live, words, at):
            words[at] = np.uint32(0)
            if live:
                words[at] = ptx.ld_written_32(address) if item == 4 else ptx.ld_written_16(address)

    @cuda.jit(device=True, forceinline=True)
    def ends(unit, half, units, interleaved):
        """Elements at which the two accesses of a unit begin. Neighbouring threads' first accesses are neighbours, except of interleaved
        pairs, whose angles are neighbours."""
        first = np.int32(unit * vec)
        second = np.int32(first + half)
        if first >= half:
            first, second = second, np.int32(second + units * vec - half)
        elif interleaved != 0:
            first = np.int32(2 * first)
            second = np.int32(first + vec)
        return first, second

    @cuda.jit(device=True, forceinline=True)
    def gather(address, live, lane, half, units, head_dim, interleaved, words):
        """The thread's accesses of the head at `address`; zeros where there is nothing."""
        for j in range(units_n):
            unit = np.int32(lane + 32 * j)
            first, second = ends(unit, half, units, interleaved)
            here = live and unit < units
            fetch(address + item * np.int64(first), here, words, 2 * each * j)
            fetch(address + item * np.int64(second), here and second < head_dim, words, 2 * each * j + each)

    @cuda.jit(device=True, forceinline=True)
    def add(x, y):
        return x + y

    def make_over_team(merge):
        @cuda.jit(device=True, forceinline=True)
        def over_team(x, shift):
            """The sum, or what else `merge` makes, of x over a team's threads."""
            if shift > 4:
                x = merge(x, x16(x))
            if shift > 3:
                x = merge(x, x8(x))
            if shift > 2:
                x = merge(x, x4(x))
            if shift > 1:
                x = merge(x, x2(x))
            if shift > 0:
                x = merge(x, x1(x))
            return x

        return over_team

    sum_over_team, largest_over_team = make_over_team(add), make_over_team(ptx.maximum)

    @cuda.jit(device=True, forceinline=True)
    def turn(values, at, cos, sin, angle, interleaved):
        """The pairs of one unit, values[at : at + 2 vec], in place."""
        if interleaved != 0:
            for i in range(vec):
                x0, x1 = values[at + 2 * i], values[at + 2 * i + 1]
                values[at + 2 * i] = ptx.fma(x0, cos[angle + i], -(x1 * sin[angle + i]))
                values[at + 2 * i + 1] = ptx.fma(x1, cos[angle + i], x0 * sin[angle + i])
        else:
            for i in range(vec):
                x0, x1 = values[at + i], values[at + vec + i]
                values[at + i] = ptx.fma(x0, cos[angle + i], -(x1 * sin[angle + i]))
                values[at + vec + i] = ptx.fma(x1, cos[angle + i], x0 * sin[angle + i])

    def rotary_append(q_gl, k_gl, v_gl, q_out_gl, k_cache_gl, v_cache_gl, positions_gl, angles_gl, cos_gl, sin_gl, q_norm_gl, k_norm_gl,
                      pages_gl, k_scale_gl, v_scale_gl,
                      q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, k_page, k_slot, k_place_head, k_dense,
                      v_page, v_slot, v_place_head, v_dense, positions_batch, positions_token, angles_batch, angles_token, table_batch,
                      table_token, table_position, pages_row, capacity, per_group, per_token, per_page,
                      pages, page_size, wide_positions, table_rows, table_step, layout, interleaved, cache_kind,
                      tokens, length, heads, kv_heads, head_dim, half, units, shift, heads_a_team, q_groups, kv_groups,
                      over_dim, eps, offset):
        thread = np.int32(cuda.threadIdx.x)
        team = np.uint32(np.int64(cuda.blockIdx.x) * (THREADS >> shift) + (thread >> shift))
        lane = np.int32(thread & ((1 << shift) - 1))
        token = np.int64(divide(team, per_group))
        group = np.int32(np.int64(team) - token * (q_groups + 2 * kv_groups))
        batch = np.int64(divide(token, per_token))
        step = token - batch * length
        live, of_q, of_v = token < tokens, group < q_groups, group >= np.int32(q_groups + kv_groups)
        x_gl, weight_gl, scale_gl, to_gl = np.int64(k_gl), np.int64(k_norm_gl), np.int64(k_scale_gl), np.int64(k_cache_gl)
        x_batch, x_token, x_head = k_batch, k_token, k_head
        to_page, to_slot, to_head, to_dense = k_page, k_slot, k_place_head, k_dense
        first_group, count = q_groups, kv_heads
        if of_q:
            x_gl, weight_gl, first_group, count = np.int64(q_gl), np.int64(q_norm_gl), np.int32(0), heads
            x_batch, x_token, x_head = q_batch, q_token, q_head
        if of_v:
            x_gl, weight_gl, scale_gl, to_gl = np.int64(v_gl), np.int64(0), np.int64(v_scale_gl), np.int64(v_cache_gl)
            x_batch, x_token, x_head = v_batch, v_token, v_head
            to_page, to_slot, to_head, to_dense = v_page, v_slot, v_place_head, v_dense
            first_group = np.int32(q_groups + kv_groups)
        head = np.int32((group - first_group) * heads_a_team)
        count = min(np.int32(count - head), heads_a_team) if live else np.int32(0)
        x_gl, x_head = x_gl + item * (batch * x_batch + step * x_token + head * x_head), item * x_head

        ptx.wait_for_primary()
        ptx.launch_dependents()
        ahead = cuda.local.array(n_words, np.uint32)
        words = cuda.local.array(n_words, np.uint32)
        weights = cuda.local.array(n_words, np.uint32)
        gather(x_gl, count > 0, lane, half, units, head_dim, interleaved, ahead)

        position, place, slot = np.int64(0), np.int64(0), np.int64(-1)
        if live and not of_q:
            at = batch * positions_batch + step * positions_token
            if wide_positions != 0:
                slot = np.int64(ptx.ld_global_u64(np.int64(positions_gl) + 8 * at))
            else:
                slot = np.int64(np.int32(ptx.ld_written_32(np.int64(positions_gl) + 4 * at)))
            place = batch
            if slot >= capacity:
                slot = np.int64(-1)
            if pages_gl != 0 and slot >= 0:
                index = np.int64(divide(slot, per_page))
                place = np.int64(ptx.ld_written_32(np.int64(pages_gl) + 4 * (batch * pages_row + index)))
                slot -= index * page_size
            if place >= pages:  # unsigned: a page below 0 is far above
                slot = np.int64(-1)
        if live and angles_gl != 0 and not of_v:  # the low word of int32 or int64
            position = np.int64(np.int32(ptx.ld_written_32(np.int64(angles_gl) + batch * angles_batch + step * angles_token)))
            if sin_gl != 0:
                position = min(max(position, np.int64(0)), np.int64(table_rows - 1))
        to_item = np.int64(item if cache_kind == SAME else 1)
        to_gl += to_item * (place * to_page + slot * to_slot + head * to_head)
        to_head, to_dense = to_item * to_head, to_item * to_dense
        if of_q:
            to_gl, slot = np.int64(q_out_gl) + item * ((token * heads + head) * head_dim), np.int64(0)
            to_head, to_dense = item * np.int64(head_dim), np.int64(item)
        width = np.int32(item if of_q or cache_kind == SAME else 1)
        cos = cuda.local.array(n_angles, np.float32)
        sin = cuda.local.array(n_angles, np.float32)
        for j in range(units_n):
            angle = np.int32(vec * (lane + 32 * j))
            if live and not of_v and angle < half:
                row = np.uint64(batch * table_batch + step * table_token + position * table_position + np.int64(angle) * table_step)
                unit_cos = cuda.local.array(vec, np.float32)
                unit_sin = cuda.local.array(vec, np.float32)
                table(cos_gl + row, layout, np.uint64(table_step), unit_cos)
                if sin_gl != 0:
                    table(sin_gl + row, layout, np.uint64(table_step), unit_sin)
                else:
                    for i in range(vec):
                        unit_cos[i], unit_sin[i] = cos_sin(np.float32(position) * unit_cos[i])
                for i in range(vec):
                    cos[vec * j + i], sin[vec * j + i] = unit_cos[i], unit_sin[i]
        gather(weight_gl, weight_gl != 0, lane, half, units, head_dim, interleaved, weights)

        values = cuda.local.array(n_values, np.float32)
        factors = cuda.local.array(n_pair, np.float32)
        done = np.int32(0)
        while done < heads_a_team:
            for j in range(n_words):
                words[j] = ahead[j]
            x_gl += x_head
            gather(x_gl, np.int32(done + 1) < count, lane, half, units, head_dim, interleaved, ahead)
            for j in range(units_n):
                unpack(words, 2 * each * j, values, 2 * vec * j)
                unpack(words, 2 * each * j + each, values, 2 * vec * j + vec)
            if (q_norm_gl | k_norm_gl) != 0:
                square = zero
                for j in range(n_values):
                    square = ptx.fma(values[j], values[j], square)
                norm = rsqrt(ptx.fma(sum_over_team(square, shift), over_dim, eps))
                if weight_gl != 0:
                    for j in range(units_n):
                        unpack(weights, 2 * each * j, factors, 0)
                        unpack(weights, 2 * each * j + each, factors, vec)
                        for n in range(2 * vec):
                            values[2 * vec * j + n] *= norm * (offset + factors[n])
            largest = smallest
            if token_scales:
                for j in range(units_n):
                    if np.int32(vec * (lane + 32 * j)) < half and not of_v:
                        turn(values, 2 * vec * j, cos, sin, vec * j, interleaved)
                    for n in range(2 * vec):
                        largest = ptx.maximum(largest, abs(values[2 * vec * j + n]))
                largest = largest_over_team(largest, shift)
            if done < count and slot >= 0:
                scale = inverse = one
                if cache_kind != SAME and not of_q:
                    if token_scales:
                        scale = ptx.divide_rn(largest, largest_int8 if cache_kind == INT8 else largest_fp8)
                        if lane == 0:
                            ptx.st_global_f32(scale_gl + 4 * ((place * page_size + slot) * kv_heads + np.int32(head + done)), scale)
                    else:
                        scale = ptx.ld_written_f32(scale_gl + 4 * np.int64(head + done))
                    inverse = ptx.divide_rn(one, scale)
                for j in range(units_n):
                    unit = np.int32(lane + 32 * j)
                    first, second = ends(unit, half, units, interleaved)
                    if not token_scales and np.int32(unit * vec) < half and not of_v:
                        turn(values, 2 * vec * j, cos, sin, vec * j, interleaved)
                    if vec > 1:
                        first_at, second_at = to_gl + np.int32(first * width), to_gl + np.int32(second * width)
                    else:
                        first_at, second_at = to_gl + first * to_dense, to_gl + second * to_dense
                    if of_q or cache_kind == SAME:
                        pack(values, 2 * vec * j, words, 0)
                        store(first_at, unit < units, words, 0)
                        pack(values, 2 * vec * j + vec, words, 0)
                        store(second_at, unit < units and second < head_dim, words, 0)
                    elif unit < units:
                        for n in range(2 * vec):
                            values[2 * vec * j + n] = scaled_down(values[2 * vec * j + n], scale, inverse)
                        if cache_kind == INT8:
                            narrow_int8(first_at, values, 2 * vec * j)
                            if second < head_dim:
                                narrow_int8(second_at, values, 2 * vec * j + vec)
                        else:
                            narrow_fp8(first_at, values, 2 * vec * j)
                            if second < head_dim:
                                narrow_fp8(second_at, values, 2 * vec * j + vec)
            to_gl += to_head
            done = np.int32(done + 1)

    return rotary_append


def spec(config: Config, dependent: bool = False) -> Spec:
    min_blocks = (5 if config.token_scales else 6) if config.vec > 1 else 2
    return Spec(make, config, SIGNATURE, THREADS, min_blocks=min_blocks, dependent=dependent, halves=True)


def variants() -> Iterator[Spec]:
    """Every variant that `launch` can ask for."""
    for dtype in DTYPES:
        yield from (spec(Config(dtype, vec, tokens)) for vec in (16 // ITEM[dtype], 1) for tokens in (False, True))


@functools.cache
def _kernel(dtype: torch.dtype, vec: int, token_scales: bool, device: int) -> Kernel:
    return load(spec(Config(DTYPE_NAME[dtype], vec, token_scales), capability(device) >= (9, 0)), device)


def append(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
           page_table: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """append_kv: no q, and k as it is."""
    _launch(None, None, k, v, k_cache, v_cache, positions, None, None, None, None, None, 0.0, 0.0, False, 0, page_table, k_scale, v_scale)


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
           rotary_positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor | None, q_norm: torch.Tensor | None,
           k_norm: torch.Tensor | None, eps: float, norm_offset: float, interleaved: bool, rotary_dim: int,
           page_table: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> torch.Tensor:
    out = empty_like(q)
    _launch(q, out, k, v, k_cache, v_cache, positions, rotary_positions, cos, sin, q_norm, k_norm,
            eps, norm_offset, interleaved, rotary_dim, page_table, k_scale, v_scale)
    return out


def _launch(q: torch.Tensor | None, out: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor,
            v_cache: torch.Tensor, positions: torch.Tensor, rotary_positions: torch.Tensor | None, cos: torch.Tensor | None,
            sin: torch.Tensor | None, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, offset: float,
            interleaved: bool, rotary_dim: int, page_table: torch.Tensor | None, k_scale: torch.Tensor | None,
            v_scale: torch.Tensor | None) -> None:
    batch, new, kv_heads, head_dim = k.shape
    pages, page_size, _, _ = k_cache.shape
    tokens, item, half = batch * new, k.element_size(), rotary_dim // 2
    if tokens * head_dim == 0 or (q is None and pages * page_size == 0):
        return
    k_strides, v_strides, k_places, v_places = k.stride(), v.stride(), k_cache.stride(), v_cache.stride()
    if k_strides[3] != 1 or v_strides[3] != 1:
        k, v = k.contiguous(), v.contiguous()
        k_strides, v_strides = k.stride(), v.stride()
    k_at, v_at, k_cache_at, v_cache_at = k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    heads = q_at = out_at = 0
    q_strides = (0, 0, 0, 1)
    if q is not None:
        heads, q_strides, out_at = q.shape[2], q.stride(), out.data_ptr()
        if q_strides[3] != 1:
            q = q.contiguous()
            q_strides = q.stride()
        q_at = q.data_ptr()
    q_norm_at = k_norm_at = 0
    if q_norm is not None:
        q_norm = q_norm.contiguous()
        q_norm_at = q_norm.data_ptr()
    if k_norm is not None:
        k_norm = k_norm.contiguous()
        k_norm_at = k_norm.data_ptr()
    k_scale_at = v_scale_at = 0
    if k_scale is not None:
        k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
        k_scale_at, v_scale_at = k_scale.data_ptr(), v_scale.data_ptr()
    capacity, table_at, table_row = page_size, 0, 0
    if page_table is not None:
        if page_table.stride(1) != 1:
            page_table = page_table.contiguous()
        capacity, table_at, table_row = page_size * page_table.shape[1], page_table.data_ptr(), page_table.stride(0)

    unit = 16 // item  # elements; as many in the cache are an access there
    steps = head_dim | half | (0 if k_places[3] == v_places[3] == 1 else 1)
    for first, second, third, _ in (q_strides, k_strides, v_strides, k_places, v_places):
        steps |= first | second | third
    wide = not (steps % unit or (q_at | k_at | v_at | q_norm_at | k_norm_at) & 15
                or (k_cache_at | v_cache_at) % (unit * k_cache.element_size()))
    vec = unit if wide else 1
    cos_at = sin_at = table_rows = angles_at = angles_batch = angles_token = 0
    layout = step = batch_step = token_step = position_step = 0
    if half:
        if sin is not None:
            if sin.stride() != cos.stride():
                cos, sin = cos.contiguous(), sin.contiguous()
            sin_at, table_rows = sin.data_ptr(), cos.shape[0]
        cos_at = cos.data_ptr()
        layout, step, batch_step, token_step, position_step = table_layout(cos, cos_at | sin_at, vec)
        if rotary_positions is not None:
            angles_at, width = rotary_positions.data_ptr(), rotary_positions.element_size()
            angles_batch, angles_token = (width * stride for stride in rotary_positions.stride())

    units = -(-head_dim // (2 * vec))
    shift = min(5, (units - 1).bit_length())
    heads_a_team = 1 if tokens * (heads + 2 * kv_heads) <= FEW_HEADS else HEADS
    q_groups, kv_groups = -(-heads // heads_a_team), -(-kv_heads // heads_a_team)
    groups = q_groups + 2 * kv_groups
    _kernel(k.dtype, vec, k_scale is not None and k_scale.dim() == 3, k.device.index)(
        -(-tokens * groups // (THREADS >> shift)), 1, 1, q_at, k_at, v_at, out_at, k_cache_at, v_cache_at,
        positions.data_ptr(), angles_at, cos_at, sin_at, q_norm_at, k_norm_at, table_at, k_scale_at, v_scale_at, *q_strides[:3],
        *k_strides[:3], *v_strides[:3], *k_places, *v_places, *positions.stride(), angles_batch, angles_token, batch_step, token_step,
        position_step, table_row, capacity, inverse(groups), inverse(new), inverse(page_size or 1), pages, page_size,
        positions.element_size() == 8, table_rows, step, layout, interleaved, CACHE_KIND.get(k_cache.dtype, SAME), tokens, new, heads,
        kv_heads, head_dim, half, units, shift, heads_a_team, q_groups, kv_groups, 1 / head_dim, eps, offset)
