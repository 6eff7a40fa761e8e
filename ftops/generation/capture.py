"""Capturing a CUDA graph while other threads use the GPU."""
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
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


class Graphs:
    """One kind of work on tensors at fixed addresses: as it is for `plain` times, then as the replay of a CUDA graph, where that can be.

    The last MOST graphs are kept; what was let go has to come `plain` times again.
    """

    MOST = 64

    def __init__(self, device: torch.device, capturable: bool, plain: int) -> None:
        self._device, self._capturable, self._plain = device, capturable, plain
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._times: Counter[Hashable] = Counter()
        self.forget()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """`work` on the same tensors for the same key."""
        if key in self._graphs:
            self._graphs[key].replay()
            return
        work()
        if not self._capturable:
            return
        if len(self._times) > 16 * self.MOST:
            self._times.clear()
        self._times[key] += 1
        if self._times[key] < self._plain:
            return
        if len(self._graphs) == self.MOST:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest], self._times[oldest]
        with capture(self._device, self._pool) as graph:
            work()
        self._graphs[key] = graph

    def forget(self) -> None:
        """The tensors are others now."""
        self._graphs.clear()
        self._times.clear()
        # One for all, since never two run at once: what one leaves in its memory, beside the tensors that it is given, no other needs.
        # A pool of which all graphs are gone cannot be used again: an assertion of PyTorch's allocator.
        self._pool = torch.cuda.graph_pool_handle() if self._capturable else None
