"""What the suites add to ftops/timing.py: pytest-benchmark's clock."""
from __future__ import annotations

from collections.abc import Sequence

from ftops import timing


class Clock:
    """A timer for pytest-benchmark that stands still but for what was measured: its statistics are then of device time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


def one_round(sides: Sequence[timing.Side], turn: int, calls: int, stopwatch: timing.Stopwatch) -> None:
    """Adds one measurement to every side, and the first side's to the clock."""
    timing.one_round(sides, turn, calls, stopwatch)
    CLOCK.seconds += sides[0].seconds[-1]
