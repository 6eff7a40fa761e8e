"""Capturing a CUDA graph while other threads use the GPU."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Capturing begins with waiting for the whole device, which cannot be while another thread captures.
_ONE = threading.Lock()


@contextmanager
def capture(device: torch.device, pool: object = None) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of all that is launched within, none of which runs. Every kernel in it must have run before.

    Other threads may launch meanwhile and read what comes of it, but not wait for the device as a whole. pool: of `graph_pool_handle`.
    """
    graph = torch.cuda.CUDAGraph()
    with _ONE, torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        yield graph
