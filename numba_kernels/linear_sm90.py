"""linear for many rows on Hopper (sm_90a): out = act(x W^T + bias) + residual, W of 16 bits, int8 or e4m3 with a scale a row, or int4 with
a scale, and perhaps a zero point, a row and group of k, as ftops/packing.py has it. With W of int8 or e4m3 x may be so too, a scale a row.

Gated, W is gate and up, one behind the other, and out = act(gate) * up + residual: a tile is then 8 rows of gate, 8 of up, the next 8 of
gate, and so on, as TMA puts them in turn, so that one thread has both sums of a result. Not of int4, which is packed.

Blocks of one producer thread (linear_sm90_load.py) and two consumer warpgroups (linear_sm90_math.py) with a ring of stages between them.
A tile is 128 features by 64, 128 or 256 rows of x; blocks stay, and their producers run ahead into the next tile. What is multiplied is
W x^T, so that weights of 8 and 4 bits are widened on their way to registers, wgmma's A operand, and few rows of x waste nothing. Where
there are fewer tiles than multiprocessors, the blocks of a cluster share a tile's k and add their sums through each other's shared memory
(linear_sm90_finish.py); else a tile goes to out by way of shared memory too (linear_sm90_store.py).
Floors, predictions and the plan of the first measurements: docs/tuning/linear_sm90.md.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels import ptx_sm90 as hopper
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.linear_sm90_config import COLUMNS, FEATURES, Config
from ftops.numba_kernels.linear_sm90_finish import make_finish
from ftops.numba_kernels.linear_sm90_load import make_produce, place
from ftops.numba_kernels.linear_sm90_math import make_multiply
from ftops.numba_kernels.linear_sm90_store import make_store

CONSUMERS = 256  # threads
# Tensor maps of W, x, int4's scales (for others, any) and out; other scales of W, scales of x, bias, residual (0 = not given), out;
# elements between rows of the residual; rows of x, rows of W, of which gate (0: it has none), stages of a whole k, blocks that share it, 1
# where all rows of out and of the residual begin on 8 bytes, 2 where tiles go by the map of out; int4: logarithm of a group's pieces of 32
# values of k, bytes of what four rows have; the activation.
SIGNATURE = "tttt" + "ppppp" + "l" + "iiiiii" + "ii" + "iff"


@cuda.jit(device=True, forceinline=True)
def meet():
    """All threads of a cluster, of whom none has written anything that others read. A warp does so as one."""
    cuda.syncwarp()
    hopper.cluster_arrive_relaxed()
    hopper.cluster_wait()


def make(config: Config) -> Callable:
    stages, stage_bytes, w_bytes, columns = config.stages, np.uint32(config.stage_bytes), np.uint32(config.w_bytes), config.columns
    full_at, empty_at, last, n_acc = np.uint32(config.full_at), np.uint32(config.empty_at), np.uint32(stages - 1), columns // 2
    of_consumers, sum_type = np.uint32(CONSUMERS), np.int32 if config.kind == "int8_int8" else np.float32
    # 40 + 2 * 232 registers of three warpgroups' threads: all that the block was launched with, 504 of a lane of each.
    give, take, wait_0 = hopper.SETMAXNREG["dec", 40], hopper.SETMAXNREG["inc", 232], hopper.WGMMA_WAIT[0]
    produce, (place_w, multiply) = make_produce(config), make_multiply(config)
    end_shared, (store, stored) = make_finish(config), make_store(config)

    def linear_sm90(w_map, x_map, scale_map, out_map, scale_gl, x_scale_gl, bias_gl, residual_gl, out_gl, residual_stride, rows, features,
                    half, steps, splits, wide, group_shift, record, form, linear, cubic):
        base = np.uint32((ptx.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00))
        thread = np.uint32(cuda.threadIdx.x)
        w_tensor, x_tensor, scale_tensor = hopper.tensor_map(w_map), hopper.tensor_map(x_map), hopper.tensor_map(scale_map)
        out_tensor = hopper.tensor_map(out_map)
        if thread == np.uint32(0):
            hopper.prefetch_tensor_map(w_tensor)
            hopper.prefetch_tensor_map(x_tensor)
            for s in range(stages):
                hopper.mbarrier_init(base + full_at + np.uint32(8 * s), np.uint32(1))
                hopper.mbarrier_init(base + empty_at + np.uint32(8 * s), np.uint32(CONSUMERS // 32))
            hopper.fence_mbarrier_init()
        cuda.syncthreads()

        blocks = np.uint32(splits)
        tile, apart = ptx.div_u32(np.uint32(cuda.blockIdx.x), blocks), ptx.div_u32(np.uint32(cuda.gridDim.x), blocks)
        block = np.uint32(np.uint32(cuda.blockIdx.x) - tile * blocks)
        of_features = np.uint32(np.uint32(features + np.int32(FEATURES - 1)) // np.uint32(FEATURES))
        of_rows = np.uint32(np.uint32(rows + np.int32(columns - 1)) // np.uint32(columns))
        begin = ptx.div_u32(np.uint32(block * np.uint32(steps)), blocks)
        count = np.uint32(ptx.div_u32(np.uint32((block + np.uint32(1)) * np.uint32(steps)), blocks) - begin)

        if thread >= of_consumers:
            give()
            if thread == of_consumers:
                produce(base, w_tensor, x_tensor, scale_tensor, tile, apart, of_features, of_rows, begin, np.uint32(begin + count),
                        half != np.int32(0), np.uint32(group_shift), np.uint32(record))
            if blocks != np.uint32(1):
                meet()
                meet()  # the consumers do so twice
            return

        take()
        ptx.wait_for_primary()
        speaker = thread & np.uint32(31) == np.uint32(0)
        shift, bytes_of_four = np.uint32(group_shift), np.uint32(record)
        where = place_w(base, shift, bytes_of_four)
        acc = cuda.local.array(n_acc, sum_type)
        given, act = (scale_gl, x_scale_gl, bias_gl, residual_gl, residual_stride, out_gl), (form, linear, cubic)
        slot, phase = np.uint32(0), np.uint32(0)
        while tile < of_features * of_rows:
            feature_tile, row_tile = place(tile, of_features, of_rows)
            for i in range(n_acc):
                acc[i] = sum_type(0)
            before, waiting = np.uint32(0), np.uint32(count)
            while waiting != np.uint32(0):
                hopper.mbarrier_wait(base + full_at + np.uint32(8) * slot, phase)
                stage = np.uint32(slot * stage_bytes)
                now = np.uint32(base + empty_at + np.uint32(8) * slot) if speaker else np.uint32(0)
                before = multiply(acc, where, stage, base + stage + w_bytes, shift, bytes_of_four, before, now)
                phase = np.uint32(phase ^ np.uint32(slot == last))
                slot = np.uint32(0) if slot == last else np.uint32(slot + np.uint32(1))
                waiting = ptx.here(np.uint32(waiting - np.uint32(1)))
            wait_0()
            if before != np.uint32(0):
                hopper.mbarrier_arrive(before)
            first, first_row = np.int32(feature_tile * np.uint32(FEATURES)), np.int32(row_tile * np.uint32(columns))
            if blocks == np.uint32(1):
                store(acc, base, first, first_row, rows, features, half, given, out_tensor, wide == np.int32(2), act)
            else:
                end_shared(acc, base, block, blocks, first, first_row, rows, features, half, given, wide != 0, act)
            tile = np.uint32(tile + apart)
        stored()

    return linear_sm90


def spec(config: Config, cluster: int = 1) -> Spec:
    """cluster: its blocks; the machine code is the same."""
    return Spec(make, config, SIGNATURE, threads=CONSUMERS + 128, shared_bytes=config.shared_bytes, cluster=cluster, dependent=True,
                only="sm_90a", halves=config.kind == "16-bit" or config.narrow)


def variants() -> Iterator[Spec]:
    """Every variant that `pick` can give."""
    for kind, columns in COLUMNS.items():
        for dtype in ("float16", "bfloat16"):
            yield from (spec(Config(kind, dtype, number)) for number in columns)
