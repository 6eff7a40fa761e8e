"""A loud token that takes the others' digits: caches of 8 bits with a scale a token and head, written and read."""
from __future__ import annotations

import pytest
import torch

import ftops
from tests.accuracy import in_float64
from tests.ops.oracles import attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Of the largest entry of v; 40 draws had 0.006 and 0.018 at most.
CACHES = [pytest.param(torch.int8, 0.01, id="int8"), pytest.param(torch.float8_e4m3fn, 0.03, id="fp8")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("cache", "allowed"), CACHES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_loud_and_quiet_tokens(cache, allowed, page_size, device):
    """Step by step into a poisoned cache, values from 1e-8 to 1e4: nothing is clipped, and a quiet request keeps its digits. A key that is
    a hundred times the others, which no query looks at, leaves theirs to them too."""
    q, k, v = (torch.randn(4, 40, heads, 64) for heads in (4, 2, 2))
    k[:, 7, :, 0], q[..., 0] = -300, q[..., 0].abs() + 1
    v *= torch.tensor([1.0, 1e-8, 1e4, 1e-3])[:, None, None, None]
    q, k, v = (x.to(device, torch.bfloat16) for x in (q, k, v))
    shape = (4, 48, 2, 64) if page_size is None else (13, page_size, 2, 64)
    caches = [torch.full(shape, 77.0, device=device).to(cache) for _ in range(2)]
    kept = {name: torch.full(shape[:3], float("nan"), device=device) for name in ("k_scale", "v_scale")}
    if page_size is not None:
        kept["page_table"] = torch.randperm(12).view(4, 3).to(device, torch.int32)
    steps = []
    for first, new in ((0, 36), (36, 1), (37, 3)):
        places, now = torch.arange(first, first + new, device=device).expand(4, new), slice(first, first + new)
        ftops.ops.append_kv(k[:, now], v[:, now], *caches, places, **kept)
        if first:
            lengths = torch.full((4,), first + new, dtype=torch.int32, device=device)
            steps.append(ftops.ops.decode_attention(q[:, now], *caches, lengths, **kept))
    exact = attention(*in_float64((q[:, 36:], k, v)), causal=True)
    error = (torch.cat(steps, 1).double() - exact).abs().amax((1, 2, 3)) / v.double().abs().amax((1, 2, 3))
    assert (error < allowed).all() and not error.isnan().any(), error
    assert all(kept[name].isnan().sum() == torch.tensor(shape[:3]).prod() - 4 * 40 * 2 for name in ("k_scale", "v_scale"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_of_zeros(device):
    """No scale is 0, and nothing divides by it."""
    zeros, caches = torch.zeros(1, 3, 2, 64, dtype=torch.float16, device=device), torch.ones(2, 1, 8, 2, 64, device=device).to(torch.int8)
    scales = {name: torch.zeros(1, 8, 2, device=device) for name in ("k_scale", "v_scale")}
    ftops.ops.append_kv(zeros, zeros, *caches, torch.arange(3, device=device)[None], **scales)
    lengths = torch.full((1,), 3, dtype=torch.int32, device=device)
    assert torch.equal(ftops.ops.decode_attention(zeros[:, :1], *caches, lengths, **scales), zeros[:, :1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_padding_that_was_never_written(dtype, device):
    """A prompt padded on the left, its padding hidden by the bias: the scales there are still the zeros they were made as."""
    k, v, q = (torch.randn(1, new, 2, 64, dtype=dtype, device=device) for new in (20, 20, 1))
    caches, bias = torch.zeros(2, 1, 48, 2, 64, device=device).to(torch.int8), torch.zeros(48, dtype=dtype, device=device)
    scales = {name: torch.zeros(1, 48, 2, device=device) for name in ("k_scale", "v_scale")}
    bias[:9] = float("-inf")
    ftops.ops.append_kv(k, v, *caches, torch.arange(9, 29, device=device)[None], **scales)
    padded = ftops.ops.decode_attention(q, *caches, torch.full((1,), 29, dtype=torch.int32, device=device), bias=bias, **scales)
    caches, scales = caches[:, :, 9:].contiguous(), {name: scale[:, 9:].contiguous() for name, scale in scales.items()}
    alone = ftops.ops.decode_attention(q, *caches, torch.full((1,), 20, dtype=torch.int32, device=device), **scales)
    torch.testing.assert_close(padded, alone)


def test_gpu_and_cpu_count_from_the_same_smallest():
    narrow = pytest.importorskip("ftops.numba_kernels.narrow")
    assert narrow.SMALLEST == ftops.ops.op_module("append_kv").SMALLEST
