"""What follows the product of the linear on Hopper: scales, bias, activation, gate, residual, and the rows of out.

A thread holds rows g and g + 8 of its warp's 16 of W, rows 8 j + 2 t, + 1 of x, for every j: registers 4 j .. 4 j + 3, lane = 4 g + t.
Gated, the former is one of gate and the latter the same of up.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.activation import make_activate
from ftops.numba_kernels.linear_sm90_config import Config


def make_weigh(config: Config) -> tuple[Callable, Callable, Callable]:
    """(of_features, of_row, weighed). of_features(first, features, half, scale_gl, bias_gl): scales of a thread's two rows of W, then their
    biases. of_row(x_scale_gl, row, rows): the scale of a row of x. weighed(sum, scale of x, scale of W, bias)."""
    scaled, narrow, low = config.bits == 8, config.narrow, ptx.LOW[config.dtype]

    @cuda.jit(device=True, forceinline=True)
    def of_features(first, features, half, scale_gl, bias_gl):
        thread = np.uint32(cuda.threadIdx.x)
        g = np.int32((thread & np.uint32(31)) >> np.uint32(2))
        first, last = np.int32(first + np.int32((thread >> np.uint32(5)) * np.uint32(16))), np.int32(features - np.int32(1))
        upper, lower = min(np.int32(first + g), last), min(np.int32(first + g + np.int32(8)), last)
        if half != np.int32(0):
            upper = min(np.int32((first >> np.int32(1)) + g), np.int32(half - np.int32(1)))
            lower = np.int32(upper + half)
        upper_at, lower_at = np.uint64(np.uint32(upper)), np.uint64(np.uint32(lower))
        scale_0, scale_1, bias_0, bias_1 = np.float32(1), np.float32(1), np.float32(0), np.float32(0)
        if scaled:
            scale_0 = ptx.ld_written_f32(scale_gl + np.uint64(4) * upper_at)
            scale_1 = ptx.ld_written_f32(scale_gl + np.uint64(4) * lower_at)
        if bias_gl != np.uint64(0):
            bias_0 = low(ptx.ld_written_16(bias_gl + np.uint64(2) * upper_at))
            bias_1 = low(ptx.ld_written_16(bias_gl + np.uint64(2) * lower_at))
        return scale_0, scale_1, bias_0, bias_1

    @cuda.jit(device=True, forceinline=True)
    def of_row(x_scale_gl, row, rows):
        return ptx.ld_written_f32_if(x_scale_gl + np.uint64(4) * np.uint64(np.uint32(row)), np.uint32(row < rows), np.float32(0))

    @cuda.jit(device=True, forceinline=True)
    def weighed(value, x_scale, scale, bias):
        if narrow:
            return ptx.fma(value * x_scale, scale, bias)
        return ptx.fma(value, scale, bias) if scaled else value + bias

    return of_features, of_row, weighed


def make_finish(config: Config) -> Callable:
    """end_shared(acc, base, block, blocks, ...): out[first_row : first_row + columns, first : first + 64, gated 32] from the sums of a
    warpgroup of all blocks of a cluster, to rows and features that exist.

    Through the shared memory of their stages, which no more is in use: each block (of 2, 4 or 8) does its share of the columns and adds
    pairs, pairs of pairs. A fragment, rows g and g + 8 of W times 8 of x, is rounded and traded twice between lanes, until four of them
    have 16 neighbouring features of a row of x, 32 bytes, a whole sector. What is added last comes the same way back. Gated, a fragment
    has 8 features, and lanes whose bit 3 is set have nothing.

    first, half: in rows of W; half: of gate, 0 where there is none. given: addresses of scales of W and of x, bias, residual, elements
    between its rows, address of out. wide: whether all rows of out and of the residual begin on 8 bytes. act: the activation.
    """
    tiles, narrow, dtype, (of_features, of_row, weighed) = config.columns // 8, config.narrow, config.dtype, make_weigh(config)
    low, high, pair, across_4, across_8 = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.PAIR[dtype], ptx.shuffle_xor[4], ptx.shuffle_xor[8]
    lows, highs = np.uint32(0x5410), np.uint32(0x7632)  # of two words, for permute
    activate, consumers, own_bytes = make_activate(16), np.uint32(256), np.uint32(16 * 256)

    @cuda.jit(device=True, forceinline=True)
    def traded_4(word):
        return ptx.f32_bits(across_4(ptx.bits_f32(word)))

    @cuda.jit(device=True, forceinline=True)
    def traded_8(word):
        return ptx.f32_bits(across_8(ptx.bits_f32(word)))

    @cuda.jit(device=True, forceinline=True)
    def fetch(at, here, left):
        """Four neighbouring values of 16 bits, as two words, of which `left` are there."""
        first = ptx.ld_written_16_if(at, here)
        second = ptx.ld_written_16_if(at + np.uint64(2), np.uint32(here != np.uint32(0) and left > np.int32(1)))
        third = ptx.ld_written_16_if(at + np.uint64(4), np.uint32(here != np.uint32(0) and left > np.int32(2)))
        fourth = ptx.ld_written_16_if(at + np.uint64(6), np.uint32(here != np.uint32(0) and left > np.int32(3)))
        return np.uint32(first | second << np.uint32(16)), np.uint32(third | fourth << np.uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def put(at, first, second, here, left):
        ptx.st_global_16_if(at, first, here)
        ptx.st_global_16_if(at + np.uint64(2), first >> np.uint32(16), np.uint32(here != np.uint32(0) and left > np.int32(1)))
        ptx.st_global_16_if(at + np.uint64(4), second, np.uint32(here != np.uint32(0) and left > np.int32(2)))
        ptx.st_global_16_if(at + np.uint64(6), second >> np.uint32(16), np.uint32(here != np.uint32(0) and left > np.int32(3)))

    @cuda.jit(device=True, forceinline=True)
    def emit(v, count, residual_at, residual_step, out_at, out_step, row, row_step, rows, wide, left):
        """The first `count` of four times 2 + 2 values of a thread, each of the halves of what is put together, to rows row_step apart.

        Step by step for all four: a warp waits for each kind of instruction once.
        """
        lane = np.uint32(cuda.threadIdx.x)
        odd, second_half = lane & np.uint32(4) != np.uint32(0), lane & np.uint32(8) != np.uint32(0)
        first = cuda.local.array(4, np.uint32)
        second = cuda.local.array(4, np.uint32)
        given = cuda.local.array(4, np.uint32)
        here = cuda.local.array(4, np.uint32)
        for i in range(4):
            here[i] = np.uint32(np.int32(row + np.int32(i) * row_step) < rows and left > np.int32(0) and np.uint32(i) < count)
        if residual_at != np.uint64(0):
            if wide:
                for i in range(4):
                    first[i], second[i] = hopper.ld_written_64_if(residual_at + np.uint64(i) * residual_step, here[i])
            else:
                for i in range(4):
                    first[i], second[i] = fetch(residual_at + np.uint64(i) * residual_step, here[i], left)
            # The trades below in reverse.
            for i in range(4):
                given[i] = traded_8(first[i] if second_half else second[i])
            for i in range(4):
                own, other = second[i] if second_half else first[i], given[i]
                first[i], second[i] = other if second_half else own, own if second_half else other
            for i in range(4):
                low_word, high_word = ptx.permute(first[i], second[i], lows), ptx.permute(first[i], second[i], highs)
                first[i], given[i] = high_word if odd else low_word, low_word if odd else high_word
            for i in range(4):
                given[i] = traded_4(given[i])
            for i in range(4):
                even_row, odd_row = given[i] if odd else first[i], first[i] if odd else given[i]
                v[4 * i], v[4 * i + 1] = v[4 * i] + low(even_row), v[4 * i + 1] + low(odd_row)
                v[4 * i + 2], v[4 * i + 3] = v[4 * i + 2] + high(even_row), v[4 * i + 3] + high(odd_row)
        # A lane has two rows of x of one feature of each half: it keeps one row, and has two neighbouring features of each half ...
        for i in range(4):
            even_row, odd_row = pair(v[4 * i], v[4 * i + 2]), pair(v[4 * i + 1], v[4 * i + 3])
            first[i], given[i] = odd_row if odd else even_row, even_row if odd else odd_row
        for i in range(4):
            given[i] = traded_4(given[i])
        for i in range(4):
            before, behind = given[i] if odd else first[i], first[i] if odd else given[i]
            first[i], second[i] = ptx.permute(before, behind, lows), ptx.permute(before, behind, highs)
        # ... and then four of one.
        for i in range(4):
            given[i] = traded_8(first[i] if second_half else second[i])
        for i in range(4):
            own = second[i] if second_half else first[i]
            first[i], second[i] = given[i] if second_half else own, own if second_half else given[i]
        if wide:
            for i in range(4):
                ptx.st_global_64_if(out_at + np.uint64(i) * out_step, first[i], second[i], here[i])
        else:
            for i in range(4):
                put(out_at + np.uint64(i) * out_step, first[i], second[i], here[i], left)

    @cuda.jit(device=True, forceinline=True)
    def locate(first, first_row, features, half, given):
        """Where a thread's part of the first fragment is in the residual and in out, and bytes from there to the next 8 rows; its row
        there, and how many features are left from its first on."""
        _, _, _, residual_gl, residual_stride, out_gl = given
        thread = np.uint32(cuda.threadIdx.x)
        lane = thread & np.uint32(31)
        second_half, quad = (lane >> np.uint32(3)) & np.uint32(1), np.uint32(4) * (lane >> np.uint32(4))
        own_row = np.int32(np.uint32(2) * (lane & np.uint32(3)) + ((lane >> np.uint32(2)) & np.uint32(1)))
        first = np.int32(first + np.int32((thread >> np.uint32(5)) * np.uint32(16)))
        row, width, feature = np.int32(first_row + own_row), features, np.int32(first + np.int32(np.uint32(8) * second_half + quad))
        if half != np.int32(0):
            row, width = np.int32(row + np.int32(np.uint32(8) * second_half)), half
            feature = np.int32((first >> np.int32(1)) + np.int32(quad))
        along, whole_row = np.uint64(2) * np.uint64(np.uint32(feature)), np.uint64(np.uint32(row))
        residual_at, residual_step = np.uint64(0), np.uint64(0)
        if residual_gl != np.uint64(0):
            residual_at = residual_gl + np.uint64(2) * whole_row * np.uint64(residual_stride) + along
            residual_step = np.uint64(16) * np.uint64(residual_stride)
        out_at = out_gl + np.uint64(2) * whole_row * np.uint64(np.uint32(width)) + along
        return residual_at, residual_step, out_at, np.uint64(16) * np.uint64(np.uint32(width)), row, np.int32(width - feature)

    @cuda.jit(device=True, forceinline=True)
    def end_shared(acc, base, block, blocks, first, first_row, rows, features, half, given, wide, act):
        mine = np.uint32(base + np.uint32(16) * np.uint32(cuda.threadIdx.x))
        hopper.bar_sync(np.uint32(1), consumers)  # the other warpgroup's products have read the stages, too
        for j in range(tiles):
            first_two = ptx.f32_bits(np.float32(acc[4 * j])), ptx.f32_bits(np.float32(acc[4 * j + 1]))
            others = ptx.f32_bits(np.float32(acc[4 * j + 2])), ptx.f32_bits(np.float32(acc[4 * j + 3]))
            ptx.st_shared_128(mine + np.uint32(j) * own_bytes, first_two[0], first_two[1], others[0], others[1])
        hopper.cluster_arrive()
        hopper.cluster_wait()
        shift = np.uint32(np.uint32(blocks >> np.uint32(1)) - np.uint32(blocks >> np.uint32(3)))  # logarithm
        j = np.uint32(block * np.uint32(np.uint32(tiles) >> shift))
        own_first = np.int32(first_row + np.int32(np.uint32(8) * j))
        residual_at, residual_step, out_at, out_step, row, left = locate(first, own_first, features, half, given)
        scale_0, scale_1, bias_0, bias_1 = of_features(first, features, half, given[0], given[2])
        form, linear, cubic = act
        gated, lane = half != np.int32(0), np.uint32(cuda.threadIdx.x) & np.uint32(3)
        own_row, last, eight_rows = np.int32(own_first + np.int32(np.uint32(2) * lane)), rows, np.int32(8)
        if gated and np.uint32(cuda.threadIdx.x) & np.uint32(8) != np.uint32(0):
            last = np.int32(0)
        part = cuda.local.array(32, np.float32)
        v = cuda.local.array(16, np.float32)
        each = np.uint32(np.uint32(8) >> shift)  # fragments of which all parts are on their way at once
        for _ in range(tiles // 8):
            for i in range(8):
                fragment, other = np.uint32(np.uint32(i) >> shift), np.uint32(i) & np.uint32(blocks - np.uint32(1))
                more = hopper.ld_cluster_f32x4(np.uint32(mine + np.uint32(j + fragment) * own_bytes), other)
                for r in range(4):
                    part[4 * i + r] = more[r]
            for i in range(4):
                for r in range(4):
                    part[4 * i + r] = part[8 * i + r] + part[8 * i + 4 + r]
            if each < np.uint32(4):
                for i in range(2):
                    for r in range(4):
                        part[4 * i + r] = part[8 * i + r] + part[8 * i + 4 + r]
            if each == np.uint32(1):
                for r in range(4):
                    part[r] = part[r] + part[4 + r]
            for i in range(4):
                x_0, x_1 = np.float32(1), np.float32(1)
                if narrow:
                    own = np.int32(own_row + np.int32(8 * i))
                    x_0, x_1 = of_row(given[1], own, rows), of_row(given[1], np.int32(own + np.int32(1)), rows)
                v[4 * i], v[4 * i + 1] = weighed(part[4 * i], x_0, scale_0, bias_0), weighed(part[4 * i + 1], x_1, scale_0, bias_0)
                v[4 * i + 2], v[4 * i + 3] = weighed(part[4 * i + 2], x_0, scale_1, bias_1), weighed(part[4 * i + 3], x_1, scale_1, bias_1)
            for i in range(16):
                part[i] = v[i]
            if form >= 0:
                activate(v, form, linear, cubic)
            if gated:
                for i in range(4):
                    v[4 * i], v[4 * i + 1] = v[4 * i] * part[4 * i + 2], v[4 * i + 1] * part[4 * i + 3]
            emit(v, each, residual_at, residual_step, out_at, out_step, row, eight_rows, last, wide, left)
            here = np.uint64(each)
            residual_at, out_at = residual_at + here * residual_step, out_at + here * out_step
            move = np.int32(np.uint32(8) * each)
            row, own_row, j = np.int32(row + move), np.int32(own_row + move), np.uint32(j + each)
        hopper.cluster_arrive_relaxed()  # the loads are done; to release what was written to out would wait for memory
        hopper.cluster_wait()  # the others have read what this block holds

    return end_shared
