"""python -m bench.render: docs/benchmarks.md and its plots, out of bench/results/<device>/<suite>.json and nothing else."""
from __future__ import annotations


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def cell(seconds: float, ratio: float) -> str:
    return f"{duration(seconds)} ({ratio:.2f} x)"
