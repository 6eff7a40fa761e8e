"""How a time is taken: all sides in one process, one after the other in every round, on inputs that are not in the L2 cache.

On a GPU each side's calls, one on every copy of the inputs, are one CUDA graph; its replay is timed by events, behind a write of
more than the L2. What cannot be captured is timed by events around the calls. On a CPU the clock of the host is read.
The stated time is the median over rounds of the time of one call. An output that is not right is not timed: `error`, `allowed_error`.
"""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

L2_BYTES = 60e6  # of a Hopper GPU; less elsewhere
COPIES = 2, 64
COPIES_BYTES = 8e9  # of memory for all copies together
ROUNDS = 7, 25
SECONDS = 0.25  # of measuring one problem, about


@dataclass
class Side:
    """One implementation, run(inputs), and what is learnt of it."""

    name: str
    run: Callable[[Any], Any]
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    missing: str | None = None
    timed: str = ""
    replay: Callable[[], Any] | None = None


def copies_for(moved: float, held: float) -> int:
    """How many sets of inputs make twice the L2, of `moved` bytes that a call reads or writes and `held` in memory.

    Of small ones there are 64: a replay reads each once, and the L2 is overwritten before it.
    """
    least, most = COPIES
    wanted = max(least, min(most, math.ceil(2 * L2_BYTES / max(moved, 1))))
    return max(1, min(wanted, int(COPIES_BYTES / max(held, 1))))


def prepare(side: Side, inputs: Sequence[Any], device: torch.device) -> None:
    """Warms the side up and captures its calls. A peer that cannot run here says why in `missing`."""
    def calls() -> None:
        for one in inputs:
            side.run(one)

    side.replay, side.timed = calls, "host clock"
    if device.type != "cuda":
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        side.run(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        side.replay, side.timed = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        side.timed = "events"
    side.replay()


class Stopwatch:
    """Times replays on `device`, each behind a write over the L2."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.empty(int(4 * L2_BYTES) if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def __call__(self, replays: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of each replay, one after the other."""
        if self.device.type != "cuda":
            return [self._on_host(replay) for replay in replays]
        events = []
        for replay in replays:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.scratch.zero_()
            start.record()
            replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    @staticmethod
    def _on_host(replay: Callable[[], Any]) -> float:
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start


def order(sides: Sequence[Side], turn: int) -> list[Side]:
    """Each round starts with another side, so that none always runs behind the same one."""
    turn %= len(sides)
    return [*sides[turn:], *sides[:turn]]


def one_round(sides: Sequence[Side], turn: int, calls: int, stopwatch: Stopwatch) -> None:
    """Adds one measurement of one call to every side."""
    turned = order(sides, turn)
    for side, seconds in zip(turned, stopwatch([side.replay for side in turned]), strict=True):
        side.seconds.append(seconds / calls)


def rounds_for(sides: Sequence[Side], stopwatch: Stopwatch) -> int:
    """As many as fit in SECONDS, by a first look."""
    least, most = ROUNDS
    return max(least, min(most, round(SECONDS / max(sum(stopwatch([side.replay for side in sides])), 1e-6))))


def median(side: Side) -> float:
    return statistics.median(side.seconds)


def error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, NaN counting as infinite."""
    worst = (output.double() - expected.double()).abs().max() if output.numel() else torch.zeros(())
    return float("inf") if worst.isnan() else float(worst)


def allowed_error(expected: torch.Tensor, dtype: torch.dtype, peers: Sequence[float]) -> float:
    """Twice the best peer's error, and two roundings of the largest value."""
    rounding = torch.finfo(dtype).eps * float(expected.abs().max()) if expected.numel() else 0.0
    return 2 * min(peers, default=0.0) + 2 * rounding
