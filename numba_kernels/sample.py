"""sample on the GPU: one token of each row of x[rows, V], filtered and drawn as ftops/ops/sample.py defines. One block a row.

    read 1   greedy, or no filter: the largest x, or x / T + noise, is the token. Otherwise the largest x, each thread's own largest, and
             the sum of exp.
    bound    from below of the smallest kept x: top_k <= 1024: the k-th largest of the threads' largest, since so many are at least as
             large; more: the k-th largest itself, digit by digit, a read of the row and a count of each digit's values in shared memory
             each; top_p: what lies below m + T ln((1 - p) Z / V) has not 1 - p of the mass, whatever it is; min_p: its own threshold,
             where top_k does not need what is below.
    read 2   everything at or above the bound goes into a list in shared memory. Rows that have more of it than the list holds are read
             again for each step below.
    draw     the k-th largest of the list exactly, bit by bit; then the largest x / T + noise of what is left, until one has less than
             top_p of the mass above it: what does not was not to be drawn, and neither is anything below. The noise stays, so this ends
             with the same token as a sort would.

Mass is summed in integers, 2^-40 of the largest token's: the same in any order. Floor: one read of x / bandwidth; a lone row, what one
multiprocessor reads.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.launch import Kernel, load
from ftops.numba_kernels.rows import DTYPE_NAME, DTYPES, ITEM, make_convert, make_io, rows_of, widest, words_of

SIGNATURE = "pppppppplliiiiii"
THREADS, WARPS = 1024, 32
LISTED = 7680  # candidates of 8 bytes: with the sums below 64 KiB, which every GPU has
BITS = {"float32": 32, "float16": 19, "bfloat16": 16}  # of a float32 that came from this dtype, the rest being alike
DIGIT = 11  # bits: sign, exponent and two more, so that a row's values spread over many counts, which lie where the list will
GREEDY_BELOW = 1e-5
UNIT = float(2 ** 40)


@dataclass(frozen=True)
class Config:
    dtype: str
    vec: int


def make(config: Config) -> Callable:
    dtype, vec, item, bits = config.dtype, config.vec, ITEM[config.dtype], BITS[config.dtype]
    n_words = words_of(dtype, vec)
    low = ptx.LOW.get(dtype)
    fetch, _ = make_io(dtype, vec)
    unpack, _ = make_convert(dtype, vec)
    lowest, zero, one = np.float32(-np.inf), np.float32(0), np.float32(1)
    digits = -(-bits // DIGIT)
    log2_e, ln_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)

    @cuda.jit(device=True, forceinline=True)
    def rank(x):
        """Integers in the order of the floats; -0 is 0."""
        b = ptx.f32_bits(x + zero)
        return np.uint32(~b) if b >> np.uint32(31) != 0 else np.uint32(b | np.uint32(0x80000000))

    @cuda.jit(device=True, forceinline=True)
    def value(r):
        return ptx.bits_f32(np.uint32(r & np.uint32(0x7FFFFFFF))) if r >> np.uint32(31) != 0 else ptx.bits_f32(np.uint32(~r))

    @cuda.jit(device=True, forceinline=True)
    def philox(block, key_low, key_high, at_low, at_high):
        a, b, c, d = np.uint32(block), np.uint32(0), at_low, at_high
        for _ in range(10):
            first, second = np.uint64(a) * np.uint64(0xD2511F53), np.uint64(c) * np.uint64(0xCD9E8D57)
            a = np.uint32(np.uint32(second >> np.uint64(32)) ^ b ^ key_low)
            c = np.uint32(np.uint32(first >> np.uint64(32)) ^ d ^ key_high)
            b, d = np.uint32(second), np.uint32(first)
            key_low, key_high = np.uint32(key_low + np.uint32(0x9E3779B9)), np.uint32(key_high + np.uint32(0xBB67AE85))
        return a, b, c, d

    @cuda.jit(device=True, forceinline=True)
    def noise(word):
        """-log2(-ln(1 - u)); the logarithm of nearly 1 by its series, because small values of E decide."""
        u = (np.float32(word) + np.float32(0.5)) * np.float32(2.0 ** -32)
        series = u * ptx.fma(u, ptx.fma(u, ptx.fma(u, np.float32(0.25), np.float32(1 / 3)), np.float32(0.5)), one)
        wait = series if u < np.float32(1 / 64) else -ln_2 * ptx.log2(one - u)
        return -ptx.log2(wait)

    @cuda.jit(device=True, forceinline=True)
    def noise_of(index, key_low, key_high, at_low, at_high):
        a, b, c, d = philox(np.uint32(index) >> np.uint32(2), key_low, key_high, at_low, at_high)
        word = np.uint32(index) & np.uint32(3)
        return noise((a if word == 0 else b) if word < 2 else (c if word == 2 else d))

    @cuda.jit(device=True, forceinline=True)
    def of_lane(x, lane):
        upper, lower = ptx.shuffle_index(np.uint32(x >> np.uint64(32)), lane), ptx.shuffle_index(np.uint32(x), lane)
        return np.uint64(upper) << np.uint64(32) | np.uint64(lower)

    @cuda.jit(device=True, forceinline=True)
    def largest_of_warp(x, lane):
        for i in range(5):
            other = of_lane(x, lane ^ np.uint32(16 >> i))
            x = other if other > x else x
        return x

    @cuda.jit(device=True, forceinline=True)
    def sum_of_warp(x, lane):
        for i in range(5):
            x += of_lane(x, lane ^ np.uint32(16 >> i))
        return x

    def over_block(of_warp):
        """of_warp's result over all threads, given to all."""
        @cuda.jit(device=True)
        def of_block(x, partial):
            thread = np.uint32(cuda.threadIdx.x)
            lane = thread & np.uint32(31)
            x = of_warp(x, lane)
            cuda.syncthreads()
            if lane == 0:
                partial[thread >> np.uint32(5)] = x
            cuda.syncthreads()
            return of_warp(partial[lane], lane)
        return of_block

    largest, total = over_block(largest_of_warp), over_block(sum_of_warp)

    @cuda.jit(device=True, forceinline=True)
    def packed(score, index):
        """Orders by score, then by the lower index."""
        return np.uint64(rank(score)) << np.uint64(32) | np.uint64(np.uint32(~np.uint32(index)))

    @cuda.jit(device=True, forceinline=True)
    def element(x_at, index):
        at = x_at + np.uint64(index * item)
        return ptx.ld_global_f32(at) if item == 4 else low(ptx.ld_global_16(at))

    @cuda.jit(device=True, forceinline=True)
    def candidate(i, listed, list_sh, x_at):
        """(x, its index) of the list's or the row's entry i."""
        if listed:
            bits_and_index = ptx.ld_shared_64(np.uint32(list_sh + 8 * i))
            return ptx.bits_f32(bits_and_index[0]), np.int64(bits_and_index[1])
        return element(x_at, np.int64(i)), np.int64(i)

    @cuda.jit(device=True, forceinline=True)
    def mass_of(x, top, scale):
        return np.uint64(np.int64(ptx.exp2((x - top) * scale) * np.float32(UNIT)))

    @cuda.jit(device=True, forceinline=True)
    def kth_of_row(x_at, start, step, length, top_k, counts, partial):
        """The rank of the top_k-th largest x of the row, down to its lowest of `bits`; 0 if there are fewer."""
        words = cuda.local.array(n_words, np.uint32)
        values = cuda.local.array(vec, np.float32)
        thread, found, wanted = np.int64(cuda.threadIdx.x), np.uint32(0), top_k
        for digit in range(digits):
            above = 32 - DIGIT * digit
            shift = max(above - DIGIT, 0)
            for i in range(thread, 1 << DIGIT, THREADS):
                counts[i] = np.uint32(0)
            cuda.syncthreads()
            for index in range(start, length, step):
                fetch(x_at + np.uint64(index * item), np.uint32(1), words, 0)
                unpack(words, 0, values, 0)
                for i in range(vec):
                    place = rank(values[i])
                    if values[i] > lowest and (np.uint64(place ^ found) >> np.uint64(above)) == 0:
                        cuda.atomic.add(counts, np.int64(np.uint32(place >> np.uint32(shift)) & np.uint32((1 << DIGIT) - 1)), np.uint32(1))
            cuda.syncthreads()
            chosen, beyond = np.int64(0), np.int64(0)
            for bit in range(DIGIT):
                higher = chosen | (1 << (DIGIT - 1) >> bit)
                some = np.uint64(0)
                for i in range(thread, 1 << DIGIT, THREADS):
                    if i >= higher:
                        some += np.uint64(counts[i])
                there = np.int64(total(some, partial))
                if there >= wanted:
                    chosen = higher
                else:
                    beyond = there  # the last one is of the digit after the one that is chosen in the end
            wanted -= beyond
            found = np.uint32(found | np.uint32(chosen) << np.uint32(shift))
        return found

    def sample(x_gl, out_gl, temperature_gl, top_k_gl, top_p_gl, min_p_gl, seed_gl, offset_gl, stride, length, temperature_step, top_k_step,
               top_p_step, min_p_step, seed_step, offset_step):
        partial = cuda.shared.array(WARPS, np.uint64)
        taken = cuda.shared.array(1, np.uint32)
        counts = cuda.shared.array(0, np.uint32)
        list_sh = np.int64(ptx.shared_address(counts))
        thread, row = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        x_at = x_gl + np.uint64(row * stride * item)
        ptx.wait_for_primary()
        ptx.launch_dependents()
        temperature = ptx.ld_global_f32(temperature_gl + np.uint64(4 * row * temperature_step))
        top_k, top_p, min_p = length, one, zero
        if top_k_gl != np.uint64(0):
            top_k = min(length, max(np.int64(1), np.int64(ptx.ld_global_u64(top_k_gl + np.uint64(8 * row * top_k_step)))))
        if top_p_gl != np.uint64(0):
            top_p = ptx.ld_global_f32(top_p_gl + np.uint64(4 * row * top_p_step))
        if min_p_gl != np.uint64(0):
            min_p = ptx.ld_global_f32(min_p_gl + np.uint64(4 * row * min_p_step))
        seed = ptx.ld_global_u64(seed_gl + np.uint64(8 * row * seed_step))
        at = ptx.ld_global_u64(offset_gl + np.uint64(8 * row * offset_step))
        key_low, key_high = np.uint32(seed), np.uint32(seed >> np.uint64(32))
        at_low, at_high = np.uint32(at), np.uint32(at >> np.uint64(32))
        greedy = temperature < np.float32(GREEDY_BELOW) or top_k == 1
        filtered = not greedy and (top_k < length or top_p < one or min_p > zero)
        scale = one if greedy else ptx.divide_rn(log2_e, temperature)

        words = cuda.local.array(n_words, np.uint32)
        ahead = cuda.local.array(n_words, np.uint32)
        values = cuda.local.array(vec, np.float32)
        best, place, exps = lowest, np.int64(0), zero
        start, step = thread * vec, np.int64(THREADS * vec)
        fetch(x_at + np.uint64(start * item), np.uint32(1) if start < length else np.uint32(0), ahead, 0)
        for index in range(start, length, step):
            for i in range(n_words):
                words[i] = ahead[i]
            fetch(x_at + np.uint64((index + step) * item), np.uint32(1) if index + step < length else np.uint32(0), ahead, 0)
            unpack(words, 0, values, 0)
            if filtered:
                before = best
                for i in range(vec):
                    if values[i] > best:
                        best, place = values[i], index + i
                if best > before:
                    exps = exps * ptx.exp2((before - best) * scale)
                for i in range(vec):
                    if values[i] > lowest:
                        exps += ptx.exp2((values[i] - best) * scale)
            elif greedy:
                for i in range(vec):
                    if values[i] > best:
                        best, place = values[i], index + i
            elif vec == 1:
                score = ptx.fma(values[0], scale, noise_of(index, key_low, key_high, at_low, at_high))
                if score > best:
                    best, place = score, index
            else:
                for four in range(vec // 4):
                    drawn = philox((index >> 2) + four, key_low, key_high, at_low, at_high)
                    for i in range(4):
                        score = ptx.fma(values[4 * four + i], scale, noise(drawn[i]))
                        if score > best:
                            best, place = score, index + 4 * four + i
        found = largest(packed(best, place), partial)

        if filtered:
            top = value(np.uint32(found >> np.uint64(32)))
            floor = np.uint32(0)
            limit = np.uint64(0)
            if top_k < length:
                if top_k <= THREADS:
                    mine = rank(best)
                    for bit in range(16):
                        higher = np.uint32(floor | np.uint32(0x80000000) >> np.uint32(bit))
                        if cuda.syncthreads_count(np.int32(1) if mine >= higher else np.int32(0)) >= top_k:
                            floor = higher
                else:
                    floor = kth_of_row(x_at, start, step, length, top_k, counts, partial)
            elif top_p < one:
                mass = np.uint64(0)
                if best > lowest:
                    mass = np.uint64(np.int64(exps * ptx.exp2((best - top) * scale) * np.float32(UNIT)))
                whole = total(mass, partial)
                below = ptx.divide((one - top_p) * np.float32(0.5) * np.float32(whole), np.float32(UNIT) * np.float32(length))
                floor = rank(top + ptx.divide(ptx.log2(below), scale))
                limit = np.uint64(np.int64(top_p * np.float32(whole)))
            least = lowest
            if min_p > zero:
                least = ptx.log2(min_p)
                if top_k == length:  # otherwise top_p's mass is that of the top_k, and needs them all
                    floor = max(floor, rank(top - abs(top) * np.float32(1e-6) + ptx.divide(least * np.float32(1.0001), scale)))
            if thread == 0:
                taken[0] = np.uint32(0)
            cuda.syncthreads()
            slot = np.int64(0)
            for index in range(start, length, step):
                fetch(x_at + np.uint64(index * item), np.uint32(1), words, 0)
                unpack(words, 0, values, 0)
                for i in range(vec):
                    if rank(values[i]) >= floor and values[i] > lowest:
                        slot = np.int64(cuda.atomic.add(taken, 0, np.uint32(1)))
                        if slot < LISTED:
                            ptx.st_shared_64(np.uint32(list_sh + 8 * slot), ptx.f32_bits(values[i]), np.uint32(index + i))
                if slot >= LISTED:
                    break
            cuda.syncthreads()
            listed = np.int64(taken[0]) <= LISTED
            count = np.int64(taken[0]) if listed else length

            if top_k < length:
                exact, mine = np.uint32(0), np.uint32(0)
                if thread < count:
                    x, _ = candidate(thread, listed, list_sh, x_at)
                    mine = rank(x)
                for bit in range(bits if top_k <= THREADS else 0):
                    higher = np.uint32(exact | np.uint32(0x80000000) >> np.uint32(bit))
                    if count <= THREADS:
                        above = np.int64(cuda.syncthreads_count(np.int32(1) if mine >= higher else np.int32(0)))
                    else:
                        some = np.uint64(0)
                        for i in range(thread, count, THREADS):
                            x, _ = candidate(i, listed, list_sh, x_at)
                            if rank(x) >= higher and x > lowest:
                                some += np.uint64(1)
                        above = np.int64(total(some, partial))
                    if above >= top_k:
                        exact = higher
                floor = max(floor, exact)
                if top_p < one:
                    mass = np.uint64(0)
                    for i in range(thread, count, THREADS):
                        x, _ = candidate(i, listed, list_sh, x_at)
                        if rank(x) >= floor and x > lowest:
                            mass += mass_of(x, top, scale)
                    limit = np.uint64(np.int64(top_p * np.float32(total(mass, partial))))
            limit = max(limit, np.uint64(1))

            searching = True
            while searching:
                best, place = lowest, np.int64(0)
                for i in range(thread, count, THREADS):
                    x, index = candidate(i, listed, list_sh, x_at)
                    if rank(x) >= floor and x > lowest and (x - top) * scale >= least:
                        score = ptx.fma(x, scale, noise_of(index, key_low, key_high, at_low, at_high))
                        if score > best or (score == best and index < place):
                            best, place = score, index
                found = largest(packed(best, place), partial)
                searching = False
                if top_p < one:
                    chosen = rank(element(x_at, np.int64(np.uint32(~np.uint32(found)))))
                    mass = np.uint64(0)
                    for i in range(thread, count, THREADS):
                        x, _ = candidate(i, listed, list_sh, x_at)
                        if rank(x) > chosen and x > lowest:
                            mass += mass_of(x, top, scale)
                    if total(mass, partial) >= limit:
                        searching, floor = True, np.uint32(chosen + np.uint32(1))

        if thread == 0:
            ptx.st_global_64(out_gl + np.uint64(8 * row), np.uint32(~np.uint32(found)), np.uint32(0))

    return sample


def pick(dtype: str, vec: int) -> Config:
    return Config(dtype, vec)


def spec(config: Config) -> Spec:
    return Spec(make, config, SIGNATURE, threads=THREADS, shared_bytes=8 * LISTED, dependent=True)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for dtype in DTYPES:
        for vec in (1, 16 // ITEM[dtype]):
            yield spec(pick(dtype, vec))


@functools.cache
def _kernel(dtype: torch.dtype, vec: int, device: int) -> Kernel:
    return load(spec(pick(DTYPE_NAME[dtype], vec)), device)


def launch(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
           min_p: torch.Tensor | None, seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    rows, length = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    logits, stride = rows_of(logits)
    item, x_at = logits.element_size(), logits.data_ptr()
    kernel = _kernel(logits.dtype, widest(item, (length | stride) * item | x_at), logits.device.index)
    options = (temperature, top_k, top_p, min_p, seed, offset)
    kernel(rows, 1, 1, x_at, out.data_ptr(), *(0 if option is None else option.data_ptr() for option in options), stride, length,
           *(0 if option is None else option.stride(0) for option in options))
    return out
