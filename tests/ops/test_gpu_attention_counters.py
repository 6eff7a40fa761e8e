"""Prefill that skips or repeats rows: on Hopper, blocks of a causal call take tiles from a counter, which a launch leaves as it was."""
from __future__ import annotations

import pytest
import torch

from ftops import ops
from tests.accuracy import assert_accurate, in_float64
from tests.ops.oracles import attention

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def sample(seed: int) -> tuple[torch.Tensor, ...]:
    """Many more tiles of query rows than any GPU has multiprocessors, of different lengths."""
    torch.manual_seed(seed)
    return tuple(torch.randn(4, 1000, heads, 64, device=CUDA, dtype=torch.bfloat16) for heads in (16, 4, 4))


def test_calls_one_after_the_other():
    for seed in range(3):
        args = sample(seed)
        assert_accurate(ops.attention(*args, causal=True), attention(*in_float64(args), causal=True), attention(*args, causal=True))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "lengths"])
def test_sections_that_do_not_come_out_even(masked):
    """Heads whose keys and values fill L2 several times over are taken in sections, and 9 of them leave a last one that is smaller."""
    torch.manual_seed(0)
    args = tuple(torch.randn(1, length, 9, 128, device=CUDA, dtype=torch.bfloat16) for length in (300, 8192, 8192))
    options = {"kv_lengths": torch.tensor([8000], device=CUDA, dtype=torch.int32)} if masked else {"causal": True}
    assert_accurate(ops.attention(*args, **options), attention(*in_float64(args), **options), attention(*args, **options))


def test_two_streams_at_once():
    inputs = [sample(seed) for seed in (0, 1)]
    expected = [ops.attention(*each, causal=True) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for stream, each, to in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                to.append(ops.attention(*each, causal=True))
    torch.cuda.synchronize()
    for to, want in zip(results, expected, strict=True):
        assert all(torch.equal(one, want) for one in to)


def test_two_graphs_replayed_at_once():
    inputs = [sample(seed) for seed in (0, 1)]
    expected = [ops.attention(*each, causal=True) for each in inputs]
    graphs, outs = [], []
    for each in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = ops.attention(*each, causal=True)
            outs.append((first, ops.attention(*each, causal=True)))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for pair in outs:
            for out in pair:
                out.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for pair, want in zip(outs, expected, strict=True):
            assert all(torch.equal(out, want) for out in pair)
