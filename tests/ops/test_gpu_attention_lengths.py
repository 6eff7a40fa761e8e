"""Attention of the head dims that models have, at lengths that no tile divides, and what lies beyond the lengths."""
from __future__ import annotations

import pytest
import torch

from tests.accuracy import assert_accurate, in_float64
from tests.ops.oracles import attention, attention_varlen, decode_attention
from tests.ops.test_gpu import CUDA, HALVES, poisoned_call

pytestmark = pytest.mark.gpu
HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (1, 3, 97, 128, 200, 257, 799, 1023, 1025, 2048)
# Each length meets three others as keys, and each option several of them.
OPTIONS = ({}, {"causal": True}, {"causal": True, "window": (100, 0)}, {"softcap": 20.0}, {"causal": True, "scale": 0.2})


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention(head_dim, dtype):
    for place, queries in enumerate(LENGTHS):
        for step in (0, 1, 4):
            keys, options = LENGTHS[(place + step) % len(LENGTHS)], OPTIONS[(place + step) % len(OPTIONS)]
            sample = randn(2, queries, 4, head_dim, dtype=dtype), *(randn(2, keys, 2, head_dim, dtype=dtype) for _ in range(2))
            ours = poisoned_call("attention", sample, options)
            assert_accurate(ours, attention(*in_float64(sample), **options), attention(*sample, **options))


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_beyond_the_lengths_are_not_looked_at(head_dim, dtype):
    """NaN there reaches nothing, and a row without keys is 0."""
    lengths = (0, 1, 97, 128, 200, 257)
    q, k, v = (randn(len(lengths), 257, heads, head_dim, dtype=dtype) for heads in (4, 2, 2))
    clean = tuple(t.clone() for t in (k, v))
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = float("nan"), float("nan")
    options = {"kv_lengths": torch.tensor(lengths, dtype=torch.int32, device=CUDA)}
    for causal in (False, True):
        ours = poisoned_call("attention", (q, k, v), {**options, "causal": causal})
        exact = attention(*in_float64((q, *clean)), **options, causal=causal)
        assert_accurate(ours, exact, attention(q, *clean, **options, causal=causal))
        assert not ours[0].any()


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_varlen(head_dim, dtype):
    """All of these lengths in one call."""
    starts = torch.tensor([0, *LENGTHS], device=CUDA).cumsum(0).int()
    sample = tuple(randn(sum(LENGTHS), heads, head_dim, dtype=dtype) for heads in (4, 2, 2))
    args = *sample, starts, starts, max(LENGTHS), max(LENGTHS)
    for options in ({}, {"causal": True}):
        ours = poisoned_call("attention_varlen", args, options)
        assert_accurate(ours, attention_varlen(*in_float64(args), **options), attention_varlen(*args, **options))


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("new", [1, 4])
def test_decode_attention(new, head_dim, dtype):
    q, *caches = (randn(len(LENGTHS), length, heads, head_dim, dtype=dtype) for length, heads in ((new, 8), (2048, 2), (2048, 2)))
    for cache in caches:
        for row, length in enumerate(LENGTHS):
            cache[row, length:] = float("nan")
    sample = (q, *caches, torch.tensor(LENGTHS, dtype=torch.int32, device=CUDA))
    ours = poisoned_call("decode_attention", sample, {})
    assert_accurate(ours, decode_attention(*in_float64(sample)), decode_attention(*sample))
