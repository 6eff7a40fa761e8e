"""A launch that writes wrong numbers or nothing: arguments, streams, devices, threads, shared memory, clusters, dependent launches."""
from __future__ import annotations

import struct
import threading

import pytest
import torch

from ftops.numba_kernels.launch import Kernel, load
from tests.kernels import tiny

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HOPPER = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs clusters")


def blocks(count: int) -> int:
    return -(-count // tiny.THREADS)


def fill(y: torch.Tensor, value: float) -> None:
    load(tiny.fill(), y.device.index)(blocks(y.numel()), 1, 1, y.data_ptr(), value, y.numel())


def poisoned(*shape: int, device: torch.device | str = CUDA) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=device)


def test_a_kernel_writes_what_it_is_told_and_no_more():
    y = poisoned(1000)
    fill(y[:777], 2.5)
    assert torch.equal(y[:777], torch.full((777,), 2.5, device=CUDA))
    assert y[777:].isnan().all()


def test_arguments_arrive():
    """Types of every width in an order that needs padding, at the ends of their ranges."""
    y = torch.zeros(6, dtype=torch.int64, device=CUDA)
    sent = (-1, y.data_ptr(), -(2**31), 1.5, -(2**62), 2**32 - 1, 2**63 + 5)
    load(tiny.ECHO, 0)(1, 1, 1, *sent)
    assert y.tolist() == [-1, -(2**31), 1536, -(2**62), 2**32 - 1, 2**63 + 5 - 2**64]


@pytest.mark.parametrize("arguments", [(), (1.0,), (1.0, 1000, 7)], ids=len)
def test_wrong_number_of_arguments_launches_nothing(arguments):
    y = poisoned(1000)
    kernel = load(tiny.fill(), 0)
    with pytest.raises(struct.error, match="expected 3"):
        kernel(blocks(1000), 1, 1, y.data_ptr(), *arguments)
    torch.cuda.synchronize()
    assert y.isnan().all()
    fill(y, 3.0)
    assert (y == 3).all()


def test_a_launch_that_the_driver_refuses_is_an_error():
    """A grid of 0 blocks: an exception with the kernel's name, and the next launch works."""
    y = poisoned(10)
    with pytest.raises(RuntimeError, match=r"tiny\.make_fill.*grid \(0, 1, 1\) on cuda:0.*INVALID_VALUE"):
        load(tiny.fill(), 0)(0, 1, 1, y.data_ptr(), 1.0, 10)
    fill(y, 4.0)
    assert (y == 4).all()


def test_loaded_once_and_told_apart():
    assert load(tiny.fill(), 0) is load(tiny.fill(), 0)
    y, z = poisoned(10), poisoned(10)
    fill(y, 1.0)
    load(tiny.fill(3), 0)(1, 1, 1, z.data_ptr(), 1.0, 10)
    assert (y == 1).all() and (z == 3).all()


def test_side_stream():
    """On the stream that is current, and no other: the fill waits behind the sleep of the side stream."""
    y = poisoned(1000)
    fill(y, 1.0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        fill(y, 2.0)
    before = y.clone()  # on the default stream, long before the side stream wakes
    assert not side.query()
    side.synchronize()
    assert (before == 1).all() and (y == 2).all()


def test_graph_replays_the_launch():
    y = poisoned(1000)
    fill(y, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill(y, 5.0)
    y.zero_()
    graph.replay()
    assert (y == 5).all()


def test_loading_during_capture_is_refused():
    """The error names the kernel and what to do, and comes before anything is compiled."""
    y = poisoned(10)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"tiny\.make_fill.*CUDA graph is captured.*ftops\.warmup"), torch.cuda.graph(graph):
        load(tiny.fill(41), 0)
    torch.cuda.synchronize()
    load(tiny.fill(41), 0)(1, 1, 1, y.data_ptr(), 1.0, 10)
    assert (y == 41).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device():
    """The tensor decides, not the current device, which stays what it was."""
    y, z = poisoned(1000), poisoned(1000, device="cuda:1")
    fill(z, 7.0)
    fill(y, 6.0)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert (y == 6).all() and (z == 7).all()
    with torch.cuda.device(1):
        fill(y, 8.0)
        assert torch.cuda.current_device() == 1
    torch.cuda.synchronize(0)
    assert (y == 8).all()


def test_threads_launch_at_once():
    """A server's threads share the kernel: each launch must read its own arguments."""
    wrong, kernel = [], load(tiny.fill(), 0)

    def run(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(200):
                y = poisoned(64 + index)
                value = float(1000 * index + turn)
                kernel(1, 1, 1, y.data_ptr(), value, y.numel())
                if not (y == value).all():
                    wrong.append((index, turn, y[0].item()))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_load_at_once():
    """Eight threads that meet a new kernel get one."""
    kernels: list[Kernel] = []
    threads = [threading.Thread(target=lambda: kernels.append(load(tiny.fill(43), 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 8 and len(set(map(id, kernels))) == 1


@pytest.mark.parametrize("size", [1000, 12 * 1024, 12 * 1024 + 1, 24 * 1024], ids=lambda size: f"{4 * size}_bytes")
def test_dynamic_shared_memory(size):
    """Up to 48 KiB as it is, beyond only if the driver is told."""
    if 4 * size > torch.cuda.get_device_properties(0).shared_memory_per_block_optin:
        pytest.skip("less shared memory")
    x, y = torch.randn(size, device=CUDA), poisoned(size)
    load(tiny.reverse(size), 0)(1, 1, 1, x.data_ptr(), y.data_ptr())
    assert torch.equal(y, x.flip(0))


@HOPPER
def test_cluster():
    """Four blocks read each other's shared memory."""
    y = torch.zeros(12, dtype=torch.int32, device=CUDA)
    load(tiny.NEIGHBOURS, 0)(12, 1, 1, y.data_ptr())
    assert y.tolist() == [4000 + 4 * (i // 4) + (i + 1) % 4 for i in range(12)]


@HOPPER
def test_grid_that_clusters_do_not_divide_is_an_error():
    y = torch.zeros(12, dtype=torch.int32, device=CUDA)
    with pytest.raises(RuntimeError, match=r"neighbours.*grid \(6, 1, 1\)"):
        load(tiny.NEIGHBOURS, 0)(6, 1, 1, y.data_ptr())


@pytest.mark.parametrize("graphed", [False, True], ids=["stream", "graph"])
def test_dependent_launch_waits_for_its_primary(graphed):
    """A chain of launches, each of which may start before the one before it ends, and reads what that wrote."""
    count, length = 200_000, 50
    kernel = load(tiny.INCREASE, 0)
    a, b = torch.zeros(count, device=CUDA), poisoned(count)

    def chain() -> None:
        for i in range(length):
            x, y = (a, b) if i % 2 == 0 else (b, a)
            kernel(blocks(count), 1, 1, x.data_ptr(), y.data_ptr(), count)

    chain()
    expected = length
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(5):
            graph.replay()
            expected += length
    assert (a == expected).all() and (b == expected - 1).all()
