"""What a call costs the host, device work aside: tiny tensors, many calls enqueued, and the clock of the host."""
from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.method import CLOCK
from bench.record import OURS, ROOT, Record
from ftops import ops
from ftops.ops.attention import ATTENTION
from ftops.ops.decode_attention import DECODE_ATTENTION
from ftops.ops.rms_norm import ADD_RMS_NORM, RMS_NORM

CALLS, ROUNDS, IMPORTS = (200, 15, 5) if torch.cuda.is_available() else (30, 9, 3)
DTYPE = torch.bfloat16
Calls = dict[str, Callable[[], Any]]


def rms_norm(device: torch.device) -> Calls:
    x, weight = torch.randn(1, 256, device=device, dtype=DTYPE), torch.ones(256, device=device, dtype=DTYPE)
    return {OURS: lambda: ops.rms_norm(x, weight, 1e-6), "op handle": lambda: RMS_NORM(x, weight, 1e-6, 0.0),
            "torch": lambda: F.rms_norm(x, (256,), weight, 1e-6), "torch add": lambda: x + x}


def rms_norm_residual(device: torch.device) -> Calls:
    x, weight = torch.randn(1, 256, device=device, dtype=DTYPE), torch.ones(256, device=device, dtype=DTYPE)
    return {OURS: lambda: ops.rms_norm(x, weight, 1e-6, residual=x), "op handle": lambda: ADD_RMS_NORM(x, x, weight, 1e-6, 0.0),
            "torch": lambda: F.rms_norm(x + x, (256,), weight, 1e-6)}


def attention(device: torch.device) -> Calls:
    q, k, v = (torch.randn(1, 32, 2, 64, device=device, dtype=DTYPE) for _ in range(3))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return {OURS: lambda: ops.attention(q, k, v, causal=True),
            "op handle": lambda: ATTENTION(q, k, v, True, 0.125, -1, -1, 0.0, None, None, None),
            "torch": lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True)}


def decode_attention(device: torch.device) -> Calls:
    q, k, v = (torch.randn(1, n, 2, 64, device=device, dtype=DTYPE) for n in (1, 64, 64))
    lengths = torch.full((1,), 64, dtype=torch.int32, device=device)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return {OURS: lambda: ops.decode_attention(q, k, v, lengths),
            "op handle": lambda: DECODE_ATTENTION(q, k, v, lengths, None, 0.125, -1, 0.0, None, None, None, None),
            "torch": lambda: F.scaled_dot_product_attention(*heads_first)}


def append_kv(device: torch.device) -> Calls:
    k, v = (torch.randn(1, 1, 2, 64, device=device, dtype=DTYPE) for _ in range(2))
    caches = [torch.zeros(1, 64, 2, 64, device=device, dtype=DTYPE) for _ in range(2)]
    positions, index = (torch.full(shape, 5, device=device) for shape in ((1, 1), (1,)))

    def in_torch() -> None:
        for cache, value in zip(caches, (k, v), strict=True):
            cache.index_copy_(1, index, value)

    return {OURS: lambda: ops.append_kv(k, v, *caches, positions), "torch": in_torch}


def launch(device: torch.device) -> Calls:
    """A kernel of six arguments that does nothing."""
    if device.type != "cuda":
        pytest.skip("a launch needs a GPU")
    from ftops.numba_kernels.compile import Spec
    from ftops.numba_kernels.launch import load
    kernel = load(Spec(make_nothing, None, "ppplif", threads=32), torch.cuda.current_device())
    x = torch.zeros(1, device=device)
    address = x.data_ptr()
    return {OURS: lambda: kernel(1, 1, 1, address, address, address, 1, 1, 1.0), "torch add": lambda: x + x}


def make_nothing(_: None) -> Callable[..., None]:
    def nothing(x_gl, y_gl, z_gl, rows, length, scale):
        return
    return nothing


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("calls_of", [launch, rms_norm, rms_norm_residual, attention, decode_attention, append_kv],
                         ids=lambda f: f.__name__)
@torch.inference_mode()
def test_call(calls_of: Callable[[torch.device], Calls], keep: Callable[[Record], None], benchmark: Any, device: torch.device) -> None:
    """`op handle` is the same call without the checks of the public function."""
    calls = calls_of(device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def one_round() -> None:
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.perf_counter() - start) / CALLS)
        CLOCK.seconds += seconds[OURS][-1]

    one_round()
    seconds = {name: [] for name in calls}
    benchmark.pedantic(one_round, rounds=ROUNDS)
    keep(Record("host", "host time of a call", calls_of.__name__, {name: statistics.median(all_) for name, all_ in seconds.items()},
                timed="host clock", rounds=ROUNDS))


@pytest.mark.benchmark(timer=CLOCK)
def test_import(keep: Callable[[Record], None], benchmark: Any) -> None:
    """`import ftops` beyond `import torch`, beside `import transformers` beyond `import torch`; the best of some processes each."""
    best = {OURS: float("inf"), "transformers": float("inf")}

    def one_round() -> None:
        for module in best:
            program = f"import torch, time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
            best[module] = min(best[module], float(done.stdout))
        CLOCK.seconds += best[OURS]

    benchmark.pedantic(one_round, rounds=IMPORTS)
    keep(Record("host", "import, beyond torch", "import", best, timed="host clock", rounds=IMPORTS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
