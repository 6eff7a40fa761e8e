"""What the suites add to ftops/timing.py: pytest-benchmark's clock."""
from __future__ import annotations

from collections.abc import Sequence

from ftops.timing import COPIES, L2_BYTES, ROUNDS, Side, Stopwatch, allowed_error, copies_for, error, median, order, prepare, rounds_for
from ftops.timing import one_round as timed_round

__all__ = ["CLOCK", "COPIES", "L2_BYTES", "ROUNDS", "Side", "Stopwatch", "allowed_error", "copies_for", "error", "median", "one_round",
           "order", "prepare", "rounds_for"]


class Clock:
    """A timer for pytest-benchmark that stands still but for what was measured: its statistics are then of device time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


def one_round(sides: Sequence[Side], turn: int, calls: int, stopwatch: Stopwatch) -> None:
    """Adds one measurement to every side, and the first side's to the clock."""
    timed_round(sides, turn, calls, stopwatch)
    CLOCK.seconds += sides[0].seconds[-1]
