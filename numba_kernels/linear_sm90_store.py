"""The end of a tile of the linear on Hopper where one block has all of its sums: out by way of shared memory.

A fragment is rows g and g + 8 of W times 8 of x. Rounded, it is two matrices of 8 x 8, which `stmatrix` turns over, so that neighbouring
features lie beside one another; TMA writes 64 rows of x of a warpgroup's 64 features, gated 32, at a time, from two buffers in turn. A
residual comes to the same places before.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.activation import make_activate
from ftops.numba_kernels.linear_sm90_config import BUFFER_BYTES, BUFFER_ROWS, Config
from ftops.numba_kernels.linear_sm90_finish import make_weigh


def make_store(config: Config) -> tuple[Callable, Callable]:
    """(store, stored). store(acc, base, first, first_row, rows, features, half, given, out_tensor, wide, act): as `end_shared` has them;
    out_tensor: map of out, where wide: rows of out and of the residual begin on 16 bytes, and there is none of a gate. stored(): TMA has
    read all that it was given."""
    fragments, n_acc, narrow, passes = config.columns // 8, config.columns // 2, config.narrow, config.columns // BUFFER_ROWS
    of_features, of_row, weighed = make_weigh(config)
    lanes_rows, buffers_at, whole = config.columns // 32, np.uint32(config.buffers_at), config.kind == "int8_int8"
    low, high = ptx.LOW[config.dtype], ptx.HIGH[config.dtype]
    pair, of_group, activate = ptx.PAIR[config.dtype], np.uint32(128), make_activate(16)
    wait_first, wait_both = ptx.CP_ASYNC_WAIT[1], ptx.CP_ASYNC_WAIT[0]
    # Until a pass's buffer has been read, which the pass before the last had; with one pass a tile the last.
    wait_own, wait_all = hopper.BULK_WAIT_READ[0 if passes % 2 else 1], hopper.BULK_WAIT_READ[0]

    @cuda.jit(device=True, forceinline=True)
    def get(value):
        return ptx.bits_f32(np.uint32(value)) if whole else value

    @cuda.jit(device=True, forceinline=True)
    def put(value):
        return np.int32(ptx.f32_bits(value)) if whole else value

    @cuda.jit(device=True, forceinline=True)
    def weigh(acc, first_row, rows, of_two, x_scale_gl):
        """Sums times their scales, plus bias; of int8 the bits of that."""
        scale_0, scale_1, bias_0, bias_1 = of_two
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        x_scales = cuda.local.array(lanes_rows, np.float32)
        x_0, x_1 = np.float32(1), np.float32(1)
        if narrow:
            for i in range(lanes_rows):
                x_scales[i] = of_row(x_scale_gl, np.int32(first_row + np.int32(lane) + np.int32(32 * i)), rows)
        for j in range(fragments):
            if narrow:
                held = ptx.f32_bits(x_scales[j // 4])
                source = np.uint32(np.uint32(2) * (lane & np.uint32(3)) + np.uint32(8 * (j % 4)))
                x_0, x_1 = ptx.bits_f32(ptx.shuffle_index(held, source)), ptx.bits_f32(ptx.shuffle_index(held, source + np.uint32(1)))
            acc[4 * j] = put(weighed(np.float32(acc[4 * j]), x_0, scale_0, bias_0))
            acc[4 * j + 1] = put(weighed(np.float32(acc[4 * j + 1]), x_1, scale_0, bias_0))
            acc[4 * j + 2] = put(weighed(np.float32(acc[4 * j + 2]), x_0, scale_1, bias_1))
            acc[4 * j + 3] = put(weighed(np.float32(acc[4 * j + 3]), x_1, scale_1, bias_1))

    @cuda.jit(device=True, forceinline=True)
    def activate_all(acc, gated, act):
        """Eight fragments at a time, which then go to the end of the others: one piece of code for all."""
        form, linear, cubic = act
        upper = cuda.local.array(16, np.float32)
        lower = cuda.local.array(16, np.float32)
        waiting = ptx.here(np.uint32(fragments // 8))
        while waiting != np.uint32(0):
            for i in range(16):
                upper[i], lower[i] = get(acc[4 * (i // 2) + i % 2]), get(acc[4 * (i // 2) + 2 + i % 2])
            activate(upper, form, linear, cubic)
            if gated:
                for i in range(16):
                    upper[i] *= lower[i]
            else:
                activate(lower, form, linear, cubic)
            for i in range(n_acc - 32):
                acc[i] = acc[i + 32]
            for i in range(16):
                acc[n_acc - 32 + 4 * (i // 2) + i % 2], acc[n_acc - 30 + 4 * (i // 2) + i % 2] = put(upper[i]), put(lower[i])
            waiting = ptx.here(np.uint32(waiting - np.uint32(1)))

    @cuda.jit(device=True, forceinline=True)
    def word(acc, at):
        return pair(get(acc[at]), get(acc[at + 1]))

    @cuda.jit(device=True, forceinline=True)
    def fetch(buffer, residual_at, stride, first_row, rows, left):
        """A warp's two columns of 16 bytes of 64 rows of the residual, of which `left` features exist from the lane's on."""
        lane = np.uint32(cuda.threadIdx.x) & np.uint32(31)
        warp, row = (np.uint32(cuda.threadIdx.x) >> np.uint32(5)) & np.uint32(3), lane >> np.uint32(1)
        to = np.uint32(buffer + row * np.uint32(128)
                       + ((np.uint32(2) * warp + (lane & np.uint32(1)) ^ (row & np.uint32(7))) << np.uint32(4)))
        for i in range(BUFFER_ROWS // 16):
            here = np.int32(first_row + np.int32(row) + np.int32(16 * i))
            there = here < rows and left > np.int32(0)
            ptx.cp_async_16(to + np.uint32(2048 * i), residual_at + np.uint64(16 * i) * stride,
                            np.uint32(16) if there else np.uint32(0))
        ptx.cp_async_commit()

    @cuda.jit(device=True, forceinline=True)
    def sum_word(acc, at, other):
        return pair(get(acc[at]) + low(other), get(acc[at + 1]) + high(other))

    def make_put(p):
        """put_all(...): passes from p on, each written out, since LLVM would leave them as a loop, and with it acc in local memory."""
        if p == passes:
            @cuda.jit(device=True, forceinline=True)
            def put_all(acc, places, residual, out_tensor, column):
                return
            return put_all
        even, ahead, next_passes = p % 2 == 0, p % 2 == 0 and p + 1 < passes, make_put(p + 1)

        @cuda.jit(device=True, forceinline=True)
        def put_all(acc, places, residual, out_tensor, column):
            buffers, at, barrier, speaker, gated = places
            residual_at, stride, first_row, rows, left, added = residual
            buffer, row = np.uint32(buffers + np.uint32(p % 2 * BUFFER_BYTES)), np.int32(first_row + np.int32(p * BUFFER_ROWS))
            if added:
                if even:
                    if speaker:
                        wait_all()
                    hopper.bar_sync(barrier, of_group)
                    fetch(buffer, residual_at + np.uint64(p * BUFFER_ROWS) * stride, stride, row, rows, left)
                if ahead:
                    fetch(np.uint32(buffer + np.uint32(BUFFER_BYTES)), residual_at + np.uint64((p + 1) * BUFFER_ROWS) * stride, stride,
                          np.int32(row + np.int32(BUFFER_ROWS)), rows, left)
                    wait_first()
                else:
                    wait_both()
                ptx.warp_sync()
            else:
                if speaker:
                    wait_own()
                hopper.bar_sync(barrier, of_group)
            if gated:
                for q in range(2):
                    j = 32 * p + 16 * q
                    hopper.stmatrix_x4_trans(buffer + at + np.uint32(2048 * q), word(acc, j), word(acc, j + 4), word(acc, j + 8),
                                             word(acc, j + 12))
            else:
                for q in range(4):
                    j, here = 32 * p + 8 * q, np.uint32(buffer + at + np.uint32(2048 * q))
                    if added:
                        r = ptx.ldmatrix_x4_trans(here)
                        hopper.stmatrix_x4_trans(here, sum_word(acc, j, r[0]), sum_word(acc, j + 2, r[1]), sum_word(acc, j + 4, r[2]),
                                                 sum_word(acc, j + 6, r[3]))
                    else:
                        hopper.stmatrix_x4_trans(here, word(acc, j), word(acc, j + 2), word(acc, j + 4), word(acc, j + 6))
            hopper.fence_proxy_async()
            hopper.bar_sync(barrier, of_group)
            if speaker:
                hopper.tma_store_2d(out_tensor, buffer, column, np.uint32(row))
                hopper.bulk_commit()
            next_passes(acc, places, residual, out_tensor, column)
        return put_all

    put_all = make_put(0)

    @cuda.jit(device=True, forceinline=True)
    def scatter(acc, first, first_row, rows, features, half, given):
        """Value by value: where rows of out or of the residual are no whole 16 bytes apart."""
        thread = np.uint32(cuda.threadIdx.x)
        lane, gated = thread & np.uint32(31), half != np.int32(0)
        feature = np.int32(first + np.int32((thread >> np.uint32(5)) * np.uint32(16)))
        if gated:
            feature = np.int32(feature >> np.int32(1))
        feature, width = np.int32(feature + np.int32(lane >> np.uint32(2))), half if gated else features
        row = np.int32(first_row + np.int32(np.uint32(2) * (lane & np.uint32(3))))
        waiting = ptx.here(np.uint32(fragments))
        while waiting != np.uint32(0):
            for i in range(4):
                here, along = np.int32(row + np.int32(i % 2)), np.int32(feature + np.int32(i // 2 * 8))
                if here < rows and along < width and (i < 2 or not gated):
                    value, whole_row = get(acc[i]), np.uint64(np.uint32(here))
                    at = np.uint64(2) * np.uint64(np.uint32(along))
                    if given[3] != np.uint64(0):
                        value += low(ptx.ld_written_16(given[3] + np.uint64(2) * whole_row * np.uint64(given[4]) + at))
                    ptx.st_global_16(given[5] + np.uint64(2) * whole_row * np.uint64(np.uint32(width)) + at, pair(value, np.float32(0)))
            for i in range(n_acc - 4):
                acc[i] = acc[i + 4]
            row, waiting = np.int32(row + np.int32(8)), ptx.here(np.uint32(waiting - np.uint32(1)))

    @cuda.jit(device=True, forceinline=True)
    def store(acc, base, first, first_row, rows, features, half, given, out_tensor, wide, act):
        thread = np.uint32(cuda.threadIdx.x)
        weigh(acc, first_row, rows, of_features(first, features, half, given[0], given[2]), given[1])
        gated = half != np.int32(0)
        if act[0] >= 0:
            activate_all(acc, gated, act)
        if not wide:
            scatter(acc, first, first_row, rows, features, half, given)
            return
        group, warp, lane = thread >> np.uint32(7), (thread >> np.uint32(5)) & np.uint32(3), thread & np.uint32(31)
        matrix, row = lane >> np.uint32(3), lane & np.uint32(7)
        buffers = np.uint32(base + buffers_at + group * np.uint32(2 * BUFFER_BYTES))
        # Of the lane's 16 bytes of a matrix, swizzled as TMA has it: rows of 128 bytes, the warp's second 8 features behind its first, then
        # 8 rows of x further; gated rows of 64 bytes, each 8 rows of x further.
        at = np.uint32((np.uint32(8) * (matrix >> np.uint32(1)) + row) * np.uint32(128)
                       + ((np.uint32(2) * warp + (matrix & np.uint32(1)) ^ row) << np.uint32(4)))
        column = np.uint32(np.uint32(first) + np.uint32(64) * group)
        if gated:
            at = np.uint32((np.uint32(8) * matrix + row) * np.uint32(64) + ((warp ^ (row >> np.uint32(1))) << np.uint32(4)))
            column = np.uint32(column >> np.uint32(1))
        speaker, barrier = thread & np.uint32(127) == np.uint32(0), np.uint32(np.uint32(2) + group)
        residual_gl, stride = given[3], np.uint64(2) * np.uint64(given[4])
        added = residual_gl != np.uint64(0)
        of_lane = np.uint32(column + np.uint32(16) * warp + np.uint32(8) * (lane & np.uint32(1)))
        left = np.int32(features - np.int32(of_lane))
        residual_at = residual_gl + np.uint64(2) * np.uint64(of_lane) + np.uint64(np.uint32(first_row) + (lane >> np.uint32(1))) * stride
        put_all(acc, (buffers, at, barrier, speaker, gated), (residual_at, stride, first_row, rows, left, added), out_tensor, column)

    @cuda.jit(device=True, forceinline=True)
    def stored():
        if np.uint32(cuda.threadIdx.x) & np.uint32(127) == np.uint32(0):
            wait_all()

    return store, stored
