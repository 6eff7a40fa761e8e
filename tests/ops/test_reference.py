"""A wrong formula: each op's CPU implementation and its reference against PyTorch's and Hugging Face's own."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops.ops import op_module
from tests.accuracy import assert_accurate, in_float64
from tests.ops.calls import CASES, CASES_AND_DTYPES, DTYPE_IDS, call, case, handle_calls, reference_of
from tests.ops.oracles import ORACLES, assert_appended

CPU = torch.device("cpu")
COMPUTING = [p for p in CASES_AND_DTYPES if p.values[0] != "append_kv"]
WRITING = [p for p in CASES_AND_DTYPES if p.values[0] == "append_kv"]


@pytest.mark.parametrize(("name", "case", "dtype"), COMPUTING)
def test_cpu_is_as_accurate_as_pytorch(name, case, dtype):
    args, kwargs = case.make(CPU, dtype)
    ours = call(name, args, kwargs)
    assert_accurate(ours, ORACLES[name](*in_float64(args), **in_float64(kwargs)), ORACLES[name](*args, **kwargs))
    for tensor in ours if isinstance(ours, tuple) else (ours,):
        assert tensor.is_contiguous()


@pytest.mark.parametrize(("name", "case"), [p for p in CASES if p.values[0] != "append_kv"])
def test_reference_in_float64_is_the_formula(name, case):
    """The reference is what the CUDA kernels are read against; in float64 it must agree to the last digits."""
    args, kwargs = case.make(CPU, torch.float32)
    exact = ORACLES[name](*in_float64(args), **in_float64(kwargs))
    for handle, low_level in handle_calls(name, args, kwargs):
        ours = reference_of(op_module(name), handle)(*in_float64(low_level))
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "case", "dtype"), WRITING)
def test_append_kv_writes_its_slots_and_no_other(name, case, dtype):
    """A slot that belongs to another token or sequence must come through bit for bit."""
    args, kwargs = case.make(CPU, dtype)
    k, v, k_cache, v_cache, positions = args
    for cache in (k_cache, v_cache):
        cache.fill_(7)
    before = [tensor.clone() for tensor in args]
    assert call(name, args, kwargs) is None
    assert_appended(k, k_cache, before[2], positions, kwargs.get("page_table"), kwargs.get("k_scale"))
    assert_appended(v, v_cache, before[3], positions, kwargs.get("page_table"), kwargs.get("v_scale"))
    assert all(torch.equal(args[i], before[i]) for i in (0, 1, 4))


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_append_then_decode_is_attention(dtype):
    """The two halves of decoding agree on where a token lies: filled step by step, the cache gives what one attention gives."""
    q, k, v = (torch.randn(2, 12, heads, 64).to(dtype) for heads in (4, 2, 2))
    caches = [torch.full((2, 16, 2, 64), float("nan"), dtype=dtype) for _ in range(2)]
    steps = []
    for first, new in ((0, 7), (7, 1), (8, 4)):
        positions = torch.arange(first, first + new).expand(2, new)
        tokens = slice(first, first + new)
        ftops.ops.append_kv(k[:, tokens], v[:, tokens], *caches, positions)
        steps.append(ftops.ops.decode_attention(q[:, tokens], *caches, torch.full((2,), first + new, dtype=torch.int32)))
    whole = ORACLES["attention"](*in_float64((q, k, v)), causal=True)
    assert_accurate(torch.cat(steps, 1), whole, ORACLES["attention"](q, k, v, causal=True))


def test_decode_ignores_a_page_outside_the_pool_that_no_length_reaches():
    """Serving engines leave -1 or a huge number in the unused end of a page table."""
    args, kwargs = case("decode_attention", "paged").make(CPU, torch.float32)
    expected = call("decode_attention", args, kwargs)
    for unused in (-1, 10 ** 6):
        table = kwargs["page_table"].clone()
        for row, length in enumerate(args[3].tolist()):
            table[row, -(-length // 16):] = unused
        assert torch.equal(call("decode_attention", args, kwargs | {"page_table": table}), expected)


def test_append_kv_skips_a_page_outside_the_pool():
    args, kwargs = case("append_kv", "paged").make(CPU, torch.float32)
    k_cache, table = args[2].fill_(7), kwargs["page_table"].clone()
    table[0, 0] = len(k_cache)
    table[1, 1] = -1
    ftops.ops.append_kv(*args, page_table=table)
    assert (k_cache[kwargs["page_table"][0, 0]] == 7).all()
    assert (k_cache[kwargs["page_table"][1, 1]] == 7).all()


@pytest.mark.parametrize("name", ["attention", "decode_attention"])
def test_what_is_hidden_cannot_be_seen(name):
    """Values beyond a sequence's length, even infinite ones, do not reach the output."""
    args, kwargs = case(name, "lengths" if name == "attention" else "d64").make(CPU, torch.float32)
    q, k, v = args[:3]
    lengths = kwargs["kv_lengths"] if name == "attention" else args[3]
    expected = call(name, args, kwargs)
    for row, length in enumerate(lengths.tolist()):
        k[row, length:], v[row, length:] = float("inf"), -float("inf")
    assert torch.equal(call(name, (q, k, v, *args[3:]), kwargs), expected)
