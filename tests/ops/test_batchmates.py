"""A request that is answered otherwise in other company: with `fixed_split` the bits are those it gets alone."""
from __future__ import annotations

import pytest
import torch

import ftops
from tests.ops.calls import DTYPE_IDS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = (1, 700, 64, 2048, 129, 1025, 3, 2047)


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def paged(cache, size):
    """[B,S,Hkv,D] as pages of `size` in random order, and the table."""
    pages = cache.reshape(-1, size, *cache.shape[2:])
    order = torch.randperm(len(pages), device=cache.device, generator=torch.Generator(cache.device).manual_seed(1))
    pool = torch.empty_like(pages)
    pool[order] = pages
    return pool, order.view(len(cache), -1).int()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("page_size", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("new", "heads", "head_dim", "window", "fixed_split"), [
    (1, 8, 128, None, 256), (1, 8, 128, None, 64), (1, 2, 256, None, 1000), (3, 8, 64, None, 100), (1, 8, 64, 300, 128),
    (1, 40, 59, None, 512)])
def test_decode_attention_alone_and_in_a_batch(new, heads, head_dim, window, fixed_split, page_size, dtype, device):
    """Other batch sizes, other lengths beside it, a longer cache: bit for bit the same."""
    device = torch.device(device)
    lengths = torch.tensor([max(length, new) for length in LENGTHS], dtype=torch.int32, device=device)
    q = torch.randn(len(LENGTHS), new, heads, head_dim, device=device).to(dtype)
    caches = [torch.randn(len(LENGTHS), 2048, 2, head_dim, device=device).to(dtype) for _ in range(2)]
    options = {"window": window, "fixed_split": fixed_split}
    table = None
    if page_size:
        (k, table), (v, _) = (paged(cache, page_size) for cache in caches)
        caches = [k, v]
    together = ftops.ops.decode_attention(q, *caches, lengths, page_table=table, **options)
    for row, length in enumerate(lengths.tolist()):
        this = slice(row, row + 1)
        for last in (2048, length, min(2048, length + 100)):
            of_row = caches if page_size else [cache[this, :last] for cache in caches]
            own_table = None if table is None else table[this, : -(-last // page_size)]
            alone = ftops.ops.decode_attention(q[this], *of_row, lengths[this], page_table=own_table, **options)
            assert torch.equal(bits(alone), bits(together[this])), (length, last)
    pairs = torch.tensor([3, 0, 3, 6], device=device)
    of_rows = caches if page_size else [cache[pairs] for cache in caches]
    others = ftops.ops.decode_attention(q[pairs], *of_rows, lengths[pairs], page_table=None if table is None else table[pairs], **options)
    assert torch.equal(bits(others), bits(together[pairs]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_decode_attention_over_8_bits_alone_and_in_a_batch(cache_dtype, dtype):
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    q = torch.randn(len(LENGTHS), 1, 8, 128, device="cuda").to(dtype)
    caches = [(torch.randn(len(LENGTHS), 2048, 2, 128, device="cuda") * 30).to(cache_dtype) for _ in range(2)]
    options = {"fixed_split": 256, **{name: torch.tensor([0.03, 0.04], device="cuda") for name in ("k_scale", "v_scale")}}
    together = ftops.ops.decode_attention(q, *caches, lengths, **options)
    for row in range(len(LENGTHS)):
        this = slice(row, row + 1)
        alone = ftops.ops.decode_attention(q[this], *(cache[this] for cache in caches), lengths[this], **options)
        assert torch.equal(bits(alone), bits(together[this]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, (100, 0)], ids=["causal", "window"])
def test_attention_varlen_alone_and_in_a_batch(window, head_dim, dtype):
    """No kernel splits the keys of a prompt: a packed sequence needs no option for that."""
    starts = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    q, k, v = (torch.randn(int(starts[-1]), heads, head_dim, device="cuda").to(dtype) for heads in (8, 2, 2))
    together = ftops.ops.attention_varlen(q, k, v, starts, starts, max(LENGTHS), max(LENGTHS), causal=True, window=window)
    for row, length in enumerate(LENGTHS):
        rows, ends = slice(int(starts[row]), int(starts[row + 1])), torch.tensor([0, length], dtype=torch.int32, device="cuda")
        alone = ftops.ops.attention_varlen(q[rows], k[rows], v[rows], ends, ends, length, length, causal=True, window=window)
        assert torch.equal(bits(alone), bits(together[rows])), length


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_alone_and_in_a_batch(causal, head_dim, dtype):
    q, k, v = (torch.randn(len(LENGTHS), 300, heads, head_dim, device="cuda").to(dtype) for heads in (8, 2, 2))
    lengths = torch.tensor([min(length, 300) for length in LENGTHS], dtype=torch.int32, device="cuda")
    together = ftops.ops.attention(q, k, v, causal=causal, kv_lengths=lengths)
    for row in range(len(LENGTHS)):
        this = slice(row, row + 1)
        alone = ftops.ops.attention(q[this], k[this], v[this], causal=causal, kv_lengths=lengths[this])
        assert torch.equal(bits(alone), bits(together[this]))
