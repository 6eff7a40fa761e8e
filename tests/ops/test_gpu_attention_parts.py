"""Few queries over many keys that are attended to wrongly: on Hopper the heads of a group share tiles there, and the keys are split."""
from __future__ import annotations

import pytest
import torch

from ftops import ops
from ftops.numba_kernels import attention_sm90_launch
from ftops.numba_kernels.launch import Kernel, architecture
from tests.accuracy import assert_accurate, in_float64
from tests.ops.at_once import assert_graphs_at_once, assert_streams_at_once
from tests.ops.oracles import attention
from tests.ops.test_gpu import HALVES, poisoned_call

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# batch, queries, keys, heads, heads of keys, head_dim: groups that divide a tile's rows and that do not, one row and more than a tile,
# keys that no tile divides, fewer keys than queries, head dims that are filled up
PROBLEMS = [(1, 64, 2048, 8, 2, 128), (2, 17, 1000, 32, 8, 128), (1, 100, 999, 9, 3, 64), (1, 33, 700, 28, 4, 96),
            (2, 130, 1300, 16, 1, 128), (1, 257, 777, 4, 4, 128), (1, 65, 1025, 8, 2, 256), (1, 20, 640, 6, 2, 80),
            (3, 64, 512, 40, 2, 59), (1, 1, 300, 8, 8, 40), (1, 300, 200, 8, 2, 64), (1, 5, 900, 64, 1, 128)]
OPTIONS = {"full": {}, "causal": {"causal": True}, "window": {"causal": True, "window": (100, -1)}, "both_sides": {"window": (40, 20)}}


def sample(batch, queries, keys, heads, kv_heads, head_dim, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, length, n, head_dim, device=CUDA).to(dtype)
                 for length, n in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))


@pytest.fixture(params=[1, 2, 7, 16])
def parts(request, monkeypatch):
    monkeypatch.setattr(attention_sm90_launch, "key_parts", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_in_parts(problem, options, dtype, parts):
    args = sample(*problem, dtype)
    assert_accurate(poisoned_call("attention", args, options), attention(*in_float64(args), **options), attention(*args, **options))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths(causal, parts):
    """Parts without keys, sequences without any, and NaN beyond the lengths, which reaches nothing."""
    q, k, v = sample(6, 40, 1030, 8, 2, 128)
    lengths = torch.tensor([0, 1, 128, 500, 1024, 1030], dtype=torch.int32, device=CUDA)
    dirty = tuple(t.clone() for t in (k, v))
    for row, length in enumerate(lengths.tolist()):
        for t in dirty:
            t[row, length:] = float("nan")
    options = {"kv_lengths": lengths, "causal": causal}
    ours = poisoned_call("attention", (q, *dirty), options)
    assert_accurate(ours, attention(*in_float64((q, k, v)), **options), attention(q, k, v, **options))
    assert not ours[0].any()


def test_heads_first_in_memory(parts):
    """As caches hold keys, with room for more behind them."""
    q, k, v = sample(2, 50, 900, 8, 2, 128)
    room = [torch.full((2, 2, 1024, 128), float("nan"), device=CUDA, dtype=torch.bfloat16) for _ in range(2)]
    for there, t in zip(room, (k, v), strict=True):
        there[:, :, :900] = t.transpose(1, 2)
    ours = ops.attention(q, *(t[:, :, :900].transpose(1, 2) for t in room), causal=True)
    assert_accurate(ours, attention(*in_float64((q, k, v)), causal=True), attention(q, k, v, causal=True))


def test_scores_that_grow_late(parts):
    """The base that a row is measured from is one of its part's first scores; the parts must agree all the same."""
    q, k, v = sample(1, 64, 1500, 8, 2, 128)
    q[..., 0], k[..., 0] = 16.0, 0.0
    k[:, [3, 700], :, 0] = torch.tensor([60.0, 59.0], device=CUDA, dtype=k.dtype)[None, :, None] * 128 ** 0.5 / 16
    assert_accurate(ops.attention(q, k, v), attention(*in_float64((q, k, v))), attention(q, k, v))


def chunk(*args):
    return ops.attention(*args, causal=True)


def test_a_chunk_is_served_so(monkeypatch):
    """On Hopper, that is: two launches for one sequence, one for sixteen."""
    launches, launch = [], Kernel.__call__
    problems = [sample(batch, 32, keys, 32, 8, 128) for batch, keys in ((1, 4096), (16, 2048))]
    for args in problems:
        assert_accurate(chunk(*args), attention(*in_float64(args), causal=True), attention(*args, causal=True))
    monkeypatch.setattr(Kernel, "__call__", lambda self, *given: (launches.append(self.spec.name), launch(self, *given))[1])
    for args in problems:
        chunk(*args)
    assert len(launches) == (3 if architecture(0) == "sm_90a" else 2)


def test_250_runs_give_the_same_bits():
    args = sample(1, 64, 8192, 32, 8, 128)
    first = chunk(*args)
    assert all(torch.equal(chunk(*args), first) for _ in range(250))


def test_two_streams_and_two_graphs_at_once():
    """Many more tiles than multiprocessors, of different lengths: blocks take them from a counter."""
    inputs = [sample(8, 60, 4096, 64, 8, 128, seed=seed) for seed in (0, 1)]
    lengths = torch.tensor([4096, 100, 3000, 1, 0, 4000, 2048, 17], dtype=torch.int32, device=CUDA)

    def call(*args):
        return ops.attention(*args, kv_lengths=lengths)

    assert_streams_at_once(call, inputs)
    assert_graphs_at_once(call, inputs)
