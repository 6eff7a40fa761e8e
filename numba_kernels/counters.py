"""Counters in global memory, 0 before a launch, which the launch leaves as 0 for the one after it in the stream.

Launches that may run at once share none: every stream has its own, and so has every stream of a capture, since a graph may be replayed
beside another. All come out of a stock, which is the driver's and not PyTorch's: a kernel may be first launched in the warm-up of
torch.compile's CUDA graphs, where whatever PyTorch allocates belongs to a pool that must be empty afterwards. Zeros made while a graph is
captured would be a kernel more in each replay, of 2 us.
"""
from __future__ import annotations

import threading

import torch

STOCK, LEAST = 1 << 18, 256  # counters of a stock, 1 MiB; of a stream at first
_LOCK = threading.Lock()
_STOCKS: dict[int, tuple[int, int]] = {}  # device: address of the next one of its stock, how many are left
_OF_STREAM: dict[tuple[int, int], tuple[int, int]] = {}  # (device, stream): address, how many
_OF_CAPTURE: dict[tuple[int, int], tuple[int, int, int]] = {}  # (device, stream): its latest capture, address, how many


def reserve(device: int) -> None:
    """Makes the stock of a device, once: by whoever loads a kernel with counters, so before a capture in which it is launched."""
    with _LOCK:
        if device not in _STOCKS:
            _STOCKS[device] = _zeros(device, STOCK), STOCK


def counters(device: int, count: int) -> int:
    """Address of `count` zeros, 32 bits each, for a launch on torch's current stream that comes before anything else is allocated."""
    stream = torch._C._cuda_getCurrentRawStream(device)
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(device, stream, count)
    address, there = _OF_STREAM.get((device, stream), (0, 0))
    if there < count:
        with _LOCK:  # those that they replace stay: a graph or another thread may still use them
            count = max(LEAST, 1 << (count - 1).bit_length())
            address = _taken(device, count)
            if address == 0:
                more = max(STOCK, count)
                _STOCKS[device] = _zeros(device, more), more
                address = _taken(device, count)
            _OF_STREAM[device, stream] = address, count
    return address


def _of_capture(device: int, stream: int, count: int) -> int:
    from cuda.bindings import driver
    capture = int(driver.cuStreamGetCaptureInfo(stream)[2])
    latest, address, there = _OF_CAPTURE.get((device, stream), (0, 0, 0))
    if latest != capture or there < count:
        with _LOCK:
            address = _taken(device, count)
            if address == 0:  # nothing can be made for good while a graph is captured
                return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}").data_ptr()
            _OF_CAPTURE[device, stream] = capture, address, count
    return address


def _taken(device: int, count: int) -> int:
    """Address of the next `count` of the stock; 0 if fewer are left."""
    address, left = _STOCKS[device]
    if left < count:
        return 0
    _STOCKS[device] = address + 4 * count, left - count
    return address


def _zeros(device: int, count: int) -> int:
    """Address of memory that is kept until the process ends."""
    from cuda.bindings import driver
    with torch.cuda.device(device):
        status, address = driver.cuMemAlloc(4 * count)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:  # there may be room among what PyTorch keeps for later
            torch.cuda.empty_cache()
            status, address = driver.cuMemAlloc(4 * count)
        if status == driver.CUresult.CUDA_SUCCESS:
            status, = driver.cuMemsetD32(address, 0, count)
            torch.cuda.default_stream(device).synchronize()  # other streams do not wait for it
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"ftops: no {4 * count} bytes of memory on cuda:{device} for the counters of a kernel: {status.name}")
    return int(address)
