"""What the kernels of attention and attention_varlen share: their parameters, and where a block of query rows lies among the keys."""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import cuda

from ftops.numba_kernels import ptx

# q, k, v, out, bias, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_kv (0 = not given); strides in bytes of q, k, v (batch, row, head)
# and bias (batch, head, row); Sq, Skv, heads, query heads a kv head, head_dim, row tiles, window left and right, bias is float32;
# scale, softcap. Packed sequences have batch strides of 0.
SIGNATURE = "ppppppppp" + "lllllllll" + "lll" + "iiiiiiiii" + "ff"
LOG2E = np.float32(1.4426950408889634)
MINUS_INFINITY = np.float32(-np.inf)
NO_STRIDES = (0, 0, 0)  # of a bias that is not given
UNBOUNDED = 1 << 30  # a window end beyond every key; positions +- it stay within int32


def address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@functools.cache
def make_locate(rows: int) -> Callable:
    """locate(...) of a block of `rows` query rows:

    (batch, head, first row, queries, keys, rows of q before the sequence, rows of k before it, limit, position of the first row, begin,
    end).
    Keys at and beyond `limit` do not exist; rows of the block see keys of [begin, end) alone. first row >= queries: there is none.
    A head's last rows come first, since under a causal mask they take longest; the heads that share keys follow one another.
    """

    @cuda.jit(device=True, forceinline=True)
    def locate(queries, keys, heads, tiles, left, right, lengths_gl, starts_q_gl, starts_kv_gl):
        block = ptx.here(np.uint32(cuda.blockIdx.x))
        row_of_heads = ptx.div_u32(block, np.uint32(tiles))
        tile = np.int32(tiles - np.int32(1) - np.int32(block - row_of_heads * np.uint32(tiles)))
        batch = ptx.div_u32(row_of_heads, np.uint32(heads))
        head = np.uint32(row_of_heads - batch * np.uint32(heads))
        start_q, start_kv = np.uint32(0), np.uint32(0)
        at = np.uint64(4) * np.uint64(batch)
        if starts_q_gl != np.uint64(0):
            start_q, start_kv = ptx.ld_global_32(starts_q_gl + at), ptx.ld_global_32(starts_kv_gl + at)
            queries = np.int32(ptx.ld_global_32(starts_q_gl + at + np.uint64(4)) - start_q)
            keys = np.int32(ptx.ld_global_32(starts_kv_gl + at + np.uint64(4)) - start_kv)
        limit = np.int32(keys)
        if lengths_gl != np.uint64(0):
            limit = np.int32(min(limit, np.int32(ptx.ld_global_32(lengths_gl + at))))
        first_row = np.int32(tile * np.int32(rows))
        position = np.int32(keys - queries + first_row)
        begin = np.int32(max(np.int32(position - left), np.int32(0)))
        end = np.int32(min(limit, np.int32(position + min(np.int32(rows), np.int32(queries - first_row)) + right)))
        return batch, head, first_row, np.int32(queries), np.int32(keys), start_q, start_kv, limit, position, begin, end

    return locate
