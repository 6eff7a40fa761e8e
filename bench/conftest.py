"""`pytest bench`: pytest-benchmark's own table, of our device time, and below it each problem beside its peers.

--results FOLDER, or FTOPS_BENCH_RESULTS, writes <FOLDER>/<device>/<suite>.json, of which `python -m bench.render` makes docs/benchmarks.md.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import method
from bench.record import OURS, Ceilings, Record, commit, figures, save, today
from bench.render import cell, duration, told
from ftops import timing
from ftops.machine import machine

os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("torch.__trace").propagate = False
RECORDS = pytest.StashKey[list[Record]]()
CEILINGS = pytest.StashKey[Ceilings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for the results as JSON; FTOPS_BENCH_RESULTS names it as well")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    config.option.benchmark_columns = ["min", "median", "max", "rounds"]  # the rest of pytest-benchmark's table fills no screen


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def stopwatch(device: torch.device) -> timing.Stopwatch:
    return timing.Stopwatch(device)


@pytest.fixture(scope="session")
def ceilings(device: torch.device, stopwatch: timing.Stopwatch, request: pytest.FixtureRequest) -> Ceilings:
    """What this device does at best, measured now: nothing is compared with a data sheet."""
    count, size, dtype = (2 ** 28, 8192, torch.bfloat16) if device.type == "cuda" else (2 ** 23, 512, torch.float32)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    # By kernels: copy_ is a DMA transfer, which is a third slower on an H200.
    sides = [timing.Side("copy", lambda _: torch.neg(source, out=target)), timing.Side("read", lambda _: source.amax()),
             timing.Side("matmul", lambda _: torch.matmul(a, b))]
    for side in sides:
        timing.prepare(side, [None], device)
    for turn in range(9):
        method.one_round(sides, turn, 1, stopwatch)
    copy, read, matmul = (timing.median(side) for side in sides)
    request.config.stash[CEILINGS] = Ceilings(8 * count / copy, 4 * count / read, 2 * size ** 3 / matmul)
    return request.config.stash[CEILINGS]


@pytest.fixture(autouse=True)
def anew() -> None:
    """One seed; and torch.compile forgets what it compiled: of one function it keeps eight versions, and then runs it uncompiled."""
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def keep(request: pytest.FixtureRequest, benchmark: Any, ceilings: Ceilings) -> Callable[[Record], None]:
    """Takes a finished record, for the tables and the file, and puts its figures into pytest-benchmark's own result."""
    def take(record: Record) -> None:
        record.commit, record.date = commit(), today()
        request.config.stash[RECORDS].append(record)
        benchmark.group = f"{record.suite}: {record.group}"
        benchmark.extra_info.update(asdict(record) | figures(asdict(record), asdict(ceilings)))
    return take


@pytest.fixture
def measure(benchmark: Any, keep: Callable[[Record], None], device: torch.device,
            stopwatch: timing.Stopwatch) -> Callable[..., Record]:
    """Warms up, measures and keeps sides that were found right, ours first; a peer that cannot run here is kept as missing."""
    def run(record: Record, sides: list[timing.Side], inputs: list[Any]) -> Record:
        running = [side for side in sides if side.missing is None]
        for side in running:
            timing.prepare(side, inputs, device)
        record.rounds = timing.rounds_for(running, stopwatch)
        turns = iter(range(record.rounds))
        benchmark.pedantic(lambda: method.one_round(running, next(turns), len(inputs), stopwatch), rounds=record.rounds)
        record.seconds = {side.name: timing.median(side) for side in running}
        record.errors = {side.name: side.error for side in running if side.error is not None}
        record.missing = {side.name: side.missing for side in sides if side.missing is not None}
        record.timed = sides[0].timed
        keep(record)
        return record
    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if not records:
        return
    ceilings = config.stash[CEILINGS]
    facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    terminalreporter.section(facts["device"])
    terminalreporter.line(f"{told(asdict(ceilings))}; in brackets: how much longer than ftops")
    for record in records:
        figured = figures(asdict(record), asdict(ceilings))
        peers = [f"{name} {cell(seconds, figured['ratios'][name])}" for name, seconds in record.seconds.items() if name != OURS]
        peers += [f"{name} cannot: {reason}" for name, reason in record.missing.items()]
        share = f"{figured['rate']} {figured['share']:.0%}" if figured["rate"] else ""
        terminalreporter.line(f"{record.group:18} {record.name:34} {duration(record.seconds[OURS]):>9} {share:18} {'; '.join(peers)}")
    folder = config.getoption("--results") or os.environ.get("FTOPS_BENCH_RESULTS")
    if folder:
        for suite in dict.fromkeys(record.suite for record in records):
            file = save(Path(folder), suite, facts, ceilings, [record for record in records if record.suite == suite])
            terminalreporter.line(f"written: {file}")
