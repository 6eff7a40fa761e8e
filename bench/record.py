"""What a measurement leaves: a record, its figures, and the file of its suite in bench/results/<GPU>/."""
from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
OURS = "ftops"
SOURCES = ("ftops", "numba_kernels", "integrations", "bench")


@dataclass
class Record:
    """One problem: seconds of one call by side, in the order in which they are shown, ours first; what cannot run has a reason.

    bytes and flops are what the problem needs, whoever computes it; 0 where that says nothing.
    """

    suite: str
    group: str
    name: str
    seconds: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    timed: str = "graph"
    rounds: int = 1
    commit: str = ""
    date: str = ""


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: bytes a second of a large copy (read and written) and of a large sum (read), and operations a second of
    a large matrix product."""

    copy: float
    read: float
    matmul: float


def figures(record: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """Rate, its share of the ceiling that binds, and by how much each peer takes longer than we do (above 1: we are faster)."""
    ours = record["seconds"][OURS]
    by_memory, by_math = record["bytes"] / max(ceilings["copy"], ceilings["read"]), record["flops"] / ceilings["matmul"]
    rate = ""
    if by_math > by_memory:
        rate = f"{record['flops'] / ours / 1e12:.3g} TFLOP/s"
    elif by_memory:
        rate = f"{record['bytes'] / ours / 1e12:.3g} TB/s"
    return {"rate": rate, "share": max(by_memory, by_math) / ours,
            "ratios": {peer: seconds / ours for peer, seconds in record["seconds"].items() if peer != OURS}}


def slug(device_name: str) -> str:
    """"NVIDIA H200" is h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower().removeprefix("nvidia ")).strip("_")


def commit() -> str:
    """The commit that ran, with "+changes" where sources differ from it. FTOPS_BENCH_COMMIT names it for a copy without its history."""
    given = os.environ.get("FTOPS_BENCH_COMMIT")
    if given:
        return given
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", *SOURCES).strip()
    return (head + ("+changes" if changed else "")) or "unknown"


def today() -> str:
    return date.today().isoformat()


def save(folder: Path, suite: str, facts: dict[str, Any], ceilings: Ceilings, records: list[Record]) -> Path:
    """Writes or renews <folder>/<device>/<suite>.json. Of an earlier run on the same machine, what was not measured again stays."""
    file = folder / slug(facts["device"]) / f"{suite}.json"
    old = json.loads(file.read_text()) if file.is_file() else {}
    merged = {(r["group"], r["name"]): r for r in old.get("records", [])} if old.get("machine") == facts else {}
    merged |= {(r.group, r.name): asdict(r) for r in records}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"suite": suite, "machine": facts, "ceilings": asdict(ceilings), "records": list(merged.values())},
                      indent=1, default=str)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        temporary.write(text + "\n")
    os.chmod(temporary.name, 0o644)
    os.replace(temporary.name, file)
    return file


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except OSError:
        return ""
