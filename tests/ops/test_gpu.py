"""A kernel that is wrong: every case on CUDA against float64, every size around a tile's edge, and 250 runs of what might race."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.accuracy import assert_accurate, in_float64
from tests.ops.calls import CASES_AND_DTYPES, DTYPE_IDS, call, case
from tests.ops.oracles import ORACLES, assert_appended, attention, decode_attention, layer_norm, rms_norm

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HALVES = {"argvalues": (torch.float16, torch.bfloat16), "ids": ("float16", "bfloat16")}


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (integers: their largest), so that an element that a kernel forgets cannot hold a right value by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def poisoned_call(name, args, kwargs):
    with poisoned():
        return call(name, args, kwargs)


def assert_case(name, args, kwargs):
    ours = poisoned_call(name, args, kwargs)
    assert_accurate(ours, ORACLES[name](*in_float64(args), **in_float64(kwargs)), ORACLES[name](*args, **kwargs))
    for tensor in ours if isinstance(ours, tuple) else (ours,):
        assert tensor.is_contiguous()


def test_poison_reaches_what_an_op_allocates():
    with poisoned():
        assert torch.empty(5000, device=CUDA, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(torch.ones(3, 5, device=CUDA)).isnan().all()


@pytest.mark.parametrize(("name", "case", "dtype"), [p for p in CASES_AND_DTYPES if p.values[0] != "append_kv"])
def test_case(name, case, dtype):
    assert_case(name, *case.make(CUDA, dtype))


@pytest.mark.parametrize(("name", "case", "dtype"), [p for p in CASES_AND_DTYPES if p.values[0] == "append_kv"])
def test_append_kv_case(name, case, dtype):
    args, kwargs = case.make(CUDA, dtype)
    k, v, k_cache, v_cache, positions = args
    for cache in (k_cache, v_cache):
        cache.fill_(7)
    before = [tensor.clone() for tensor in args]
    poisoned_call(name, args, kwargs)
    assert_appended(k, k_cache, before[2], positions, kwargs.get("page_table"), kwargs.get("k_scale"))
    assert_appended(v, v_cache, before[3], positions, kwargs.get("page_table"), kwargs.get("v_scale"))
    assert all(torch.equal(args[i], before[i]) for i in (0, 1, 4))


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_at_the_edges_of_tiles(causal, head_dim, dtype):
    """Lengths one below, at and above every power of two that a tile may have, for queries and for keys."""
    edges = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 193, 257)
    q, k, v = (torch.randn(1, max(edges), heads, head_dim, device=CUDA).to(dtype) for heads in (2, 1, 1))
    for queries in edges:
        for keys in edges:
            sample = q[:, :queries], k[:, :keys], v[:, :keys]
            ours = poisoned_call("attention", sample, {"causal": causal})
            theirs = attention(*sample, causal=causal)
            if dtype is torch.float32 and (not causal or queries == keys):  # PyTorch's own kernel is less exact than its formula
                theirs = scaled_dot_product_attention(*(t.transpose(1, 2).expand(-1, 2, -1, -1) for t in sample),
                                                      is_causal=causal).transpose(1, 2)
            assert_accurate(ours, attention(*in_float64(sample), causal=causal), theirs)


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize("window", [(0, 0), (15, 0), (64, 0), (63, 64), (130, -1), (-1, 5)], ids=str)
def test_attention_at_the_edges_of_windows(window, dtype):
    """The tiles that a window skips are exactly those it hides."""
    for queries, keys in ((300, 300), (100, 300), (300, 100)):
        sample = tuple(torch.randn(1, length, heads, 64, device=CUDA).to(dtype) for length, heads in ((queries, 4), (keys, 2), (keys, 2)))
        for causal in (False, True):
            options = {"causal": causal, "window": window}
            ours = poisoned_call("attention", sample, options)
            assert_accurate(ours, attention(*in_float64(sample), **options), attention(*sample, **options))


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("page_size", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("new", [1, 3])
def test_decode_attention_at_every_length(new, page_size, dtype):
    """One row for each length up to 290 and some longer, whose splits over the keys end everywhere."""
    lengths = (*range(291), 511, 512, 513, 1023, 1024, 1025, 2047, 2048)
    q, *caches = (torch.randn(len(lengths), length, heads, 64, device=CUDA).to(dtype) for length, heads in ((new, 4), (2048, 1), (2048, 1)))
    for cache in caches:
        for row, length in enumerate(lengths):
            cache[row, length:] = float("nan")
    options = {}
    if page_size:
        order = torch.randperm(len(lengths) * 2048 // page_size, device=CUDA)
        caches = [torch.empty_like(c.view(-1, page_size, 1, 64)).index_copy_(0, order, c.view(-1, page_size, 1, 64)) for c in caches]
        options["page_table"] = order.view(len(lengths), -1).int()
    sample = (q, *caches, torch.tensor(lengths, dtype=torch.int32, device=CUDA))
    ours = poisoned_call("decode_attention", sample, options)
    assert_accurate(ours, decode_attention(*in_float64(sample), **options), decode_attention(*sample, **options))
    assert not ours[0].any()


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("oracle", [rms_norm, layer_norm])
def test_norm_of_every_length(oracle, dtype):
    """Rows of any length and alignment: 1 to 70, and around what a warp or a block holds in registers."""
    edges = [edge + off for edge in (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768) for off in (-1, 0, 1, 8)]
    for length in (*range(1, 71), *edges):
        x, residual = torch.randn(2, 3, length, device=CUDA).to(dtype)
        vectors = torch.randn(1 if oracle is rms_norm else 2, length, device=CUDA).to(dtype)
        options = {"residual": residual} if length % 2 else {}
        ours = poisoned_call(oracle.__name__, (x, *vectors, 1e-6), options)
        exact = oracle(*in_float64((x, *vectors)), 1e-6, **in_float64(options))
        assert_accurate(ours, exact, oracle(x, *vectors, 1e-6, **options))


RACES = [(name, which) for name, cases in {
    "rms_norm": ("llama", "residual", "long"), "layer_norm": ("row", "residual", "long"),
    "linear": ("row", "everything", "norm_everything"), "linear_w4a16": ("row", "zeros", "two_batches"),
    "linear_w8a16": ("row", "two_batches", "norm_gated"),
    "attention": ("d64", "d128", "d256", "gqa", "window_both", "bias_row", "everything", "long"),
    "attention_varlen": ("causal", "d128", "many"),
    "decode_attention": ("d128", "long", "most_new", "paged", "paged_fp8", "wide_group"),
}.items() for which in cases]


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize(("name", "which"), RACES, ids=[f"{name}-{which}" for name, which in RACES])
def test_250_runs_give_the_same_bits(name, which, dtype):
    """A missing barrier shows as a rare difference. Other work runs beside every second half, to shift the blocks about."""
    args, kwargs = case(name, which).make(CUDA, dtype)
    first = call(name, args, kwargs)
    beside, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=CUDA)
    for run in range(250):
        if run % 2:
            with torch.cuda.stream(beside):
                noise @ noise
        again = call(name, args, kwargs)
        for one, other in zip(again, first, strict=True) if isinstance(first, tuple) else ((again, first),):
            assert torch.equal(one, other), f"run {run}"
    torch.cuda.synchronize()
