"""Counters in global memory, 0 before a launch, which the launch leaves as 0 for the one after it in the stream.

Launches that may run at once share none: every stream has its own, and so has every stream of a capture, since a graph may be replayed
beside another. Those come out of a stock: zeros made while a graph is captured are a kernel more in each replay, of 2 us.
"""
from __future__ import annotations

import threading

import torch

STOCK, LEAST = 1 << 18, 256  # counters for the graphs of a device, 1 MiB; of a stream at first
_LOCK = threading.Lock()
_STOCKS: dict[int, torch.Tensor] = {}
_TAKEN: dict[int, int] = {}
_OF_STREAM: dict[tuple[int, int], tuple[int, int]] = {}  # (device, stream): address, how many
_OF_CAPTURE: dict[tuple[int, int], tuple[int, int, int]] = {}  # (device, stream): its latest capture, address, how many
_KEPT: list[torch.Tensor] = []


def reserve(device: int) -> None:
    """Makes the stock of a device, once: by whoever loads a kernel with counters, so before a capture in which it is launched."""
    with _LOCK:
        if device not in _STOCKS:
            _STOCKS[device], _TAKEN[device] = torch.zeros(STOCK, dtype=torch.int32, device=f"cuda:{device}"), 0
            torch.cuda.current_stream(device).synchronize()  # other streams take from it too


def counters(device: int, count: int) -> int:
    """Address of `count` zeros, 32 bits each, for a launch on torch's current stream that comes before anything else is allocated."""
    stream = torch._C._cuda_getCurrentRawStream(device)
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(device, stream, count)
    address, there = _OF_STREAM.get((device, stream), (0, 0))
    if there < count:
        with _LOCK:
            zeros = torch.zeros(max(LEAST, 1 << (count - 1).bit_length()), dtype=torch.int32, device=f"cuda:{device}")
            _KEPT.append(zeros)  # and those that it replaces, which a graph or another thread may still use
            address, _ = _OF_STREAM[device, stream] = zeros.data_ptr(), len(zeros)
    return address


def _of_capture(device: int, stream: int, count: int) -> int:
    from cuda.bindings import driver
    capture = int(driver.cuStreamGetCaptureInfo(stream)[2])
    latest, address, there = _OF_CAPTURE.get((device, stream), (0, 0, 0))
    if latest != capture or there < count:
        with _LOCK:
            if _TAKEN[device] + count > STOCK:
                return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}").data_ptr()
            address = _STOCKS[device].data_ptr() + 4 * _TAKEN[device]
            _TAKEN[device] += count
            _OF_CAPTURE[device, stream] = capture, address, count
    return address
