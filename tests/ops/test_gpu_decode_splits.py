"""Splits of the keys that meet wrongly: the last block of decode_attention to arrive adds up to 16 parts, whichever it is."""
from __future__ import annotations

import pytest
import torch

from ftops import ops
from ftops.numba_kernels import counters
from ftops.numba_kernels.launch import Kernel
from tests.accuracy import assert_accurate, in_float64
from tests.ops.at_once import assert_graphs_at_once, assert_streams_at_once
from tests.ops.oracles import decode_attention
from tests.ops.test_gpu import poisoned_call

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = {"argvalues": (torch.bfloat16, torch.float32), "ids": ("bfloat16", "float32")}  # each a kernel of its own


def sample(dtype, heads=32, kv_heads=8, head_dim=128, capacity=4096, lengths=(4096, 3000), seed=0):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(len(lengths), length, n, head_dim, device=CUDA).to(dtype)
               for length, n in ((1, heads), (capacity, kv_heads), (capacity, kv_heads)))
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = float("nan"), float("nan")
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=CUDA)


@pytest.mark.parametrize("dtype", **DTYPES)
@pytest.mark.parametrize("capacity", [1024, 1088, 17152])
def test_few_parts_and_many(capacity, dtype):
    """16 splits of 64 keys, which meet in the launch, 17 and 268, for which there is another; most sequences have fewer."""
    lengths = [length for length in (0, 1, 64, 65, 128, 1000, 1024, 1025, 1088, 16385, 17152) if length <= capacity]
    args = sample(dtype, 2, 1, 64, capacity, lengths)
    ours = poisoned_call("decode_attention", args, {"fixed_split": 64})
    assert_accurate(ours, decode_attention(*in_float64(args)), decode_attention(*args))


@pytest.mark.parametrize("dtype", **DTYPES)
def test_splits_that_see_nothing(dtype):
    """All hidden by a bias: they weigh nothing beside the others, and where nobody sees anything the output is 0."""
    args = sample(dtype, lengths=(4096, 4000, 3000))
    bias = torch.zeros(3, 1, 1, 4096, device=CUDA)
    bias[0, ..., 100:], bias[1, ..., :3900], bias[2] = (float("-inf"),) * 3
    ours = poisoned_call("decode_attention", args, {"bias": bias})
    assert_accurate(ours, decode_attention(*in_float64(args), bias=bias.double()), decode_attention(*args, bias=bias))
    assert not ours[2].any()


@pytest.mark.parametrize("dtype", **DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "lengths"), [(64, 8, (8192,)), (32, 8, (8192,)), (32, 8, (8192, 1, 500))],
                         ids=["8_rows", "4_rows", "unequal"])
def test_250_runs_give_the_same_bits(heads, kv_heads, lengths, dtype):
    """Blocks arrive in another order each time, the more with other work beside them."""
    args = sample(dtype, heads, kv_heads, 128, lengths[0], lengths)
    first = ops.decode_attention(*args)
    beside, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=CUDA)
    for run in range(250):
        if run % 2:
            with torch.cuda.stream(beside):
                noise @ noise
        assert torch.equal(ops.decode_attention(*args), first), run


def test_two_streams_at_once():
    assert_streams_at_once(ops.decode_attention, [sample(torch.bfloat16, seed=seed) for seed in (0, 1)])


@pytest.mark.parametrize("stock", ["there", "used up"])
def test_two_graphs_replayed_at_once(stock, monkeypatch):
    """Graphs share no counters, though captured on one stream; without a stock they make zeros in each replay."""
    inputs = [sample(torch.bfloat16, seed=seed) for seed in (0, 1)]
    ops.decode_attention(*inputs[0])  # which makes the stock
    if stock == "used up":
        monkeypatch.setitem(counters._STOCKS, CUDA.index or 0, (0, 0))
    assert_graphs_at_once(ops.decode_attention, inputs)


def test_one_launch(monkeypatch):
    args, launches, launch = sample(torch.bfloat16), [], Kernel.__call__
    ops.decode_attention(*args)
    monkeypatch.setattr(Kernel, "__call__", lambda self, *given: (launches.append(self.spec.name), launch(self, *given))[1])
    ops.decode_attention(*args)
    assert len(launches) == 1
