"""Calls that share what each should have alone: on two streams, and in two graphs that are replayed beside each other."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Inputs = Sequence[tuple[Any, ...]]  # of each stream or graph, other ones


def assert_streams_at_once(call: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    expected = [call(*each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in inputs]
    for _ in range(100):
        for stream, each, to in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                to.append(call(*each))
    torch.cuda.synchronize()
    for to, want in zip(results, expected, strict=True):
        assert all(torch.equal(one, want) for one in to)


def assert_graphs_at_once(call: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    """Captured on one stream, each with several calls, and replayed on one each."""
    expected = [call(*each) for each in inputs]
    graphs, outs = [], []
    for each in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([call(*each) for _ in range(8)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for several in outs:
            for out in several:
                out.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for several, want in zip(outs, expected, strict=True):
            assert all(torch.equal(out, want) for out in several)
