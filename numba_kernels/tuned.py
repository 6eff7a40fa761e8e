"""What `ftops tune` has measured on this GPU: which candidate is the fastest for a linear of which sizes.

A JSON file for each kind of GPU, beside the compiled kernels:

    {"format": 1, "gpu": "NVIDIA H200", "versions": {"torch": ..., "cuda": ...}, "sources": digest of the files in this folder,
     "winners": {"linear bfloat16 6144x4096": {"1": "linear: warps 4, stages 2, batch 8", ..., "8192": "library"}}}

A winner is the name of something that the kernels offer, so that a file can choose among that and nothing else. It is read once a process,
when the first linear of a size is planned; a file that is broken, or was measured with other kernels or versions, is left alone, and a
warning says so.
"""
from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ftops.numba_kernels.compile import cache_folder
from ftops.numba_kernels.files import write_whole

_LOG = logging.getLogger("ftops")
_FORMAT = 1
LIBRARY = "library"  # the name of PyTorch's own product, cuBLASLt
ROWS = tuple(2 ** n for n in range(14))  # of x that are measured; others go by the next larger one
_OPS = {"16-bit": "linear", "int8": "linear_w8a16", "e4m3": "linear_fp8", "e4m3_e4m3": "linear_fp8", "int8_int8": "linear_w8a8"}
T = TypeVar("T")
Winners = dict[str, dict[int, str]]  # by problem, then by rows
UNTUNED: set[int | None] = set()  # devices without a file, as is known since the first question: the others then cost a launch 0.1 us


def op_of(kind: str, group_size: int = 0) -> str:
    """The op of weights of `kind`, as problems name it."""
    return _OPS.get(kind) or f"linear_w4a16 g{group_size}"


def problem(op: str, dtype: torch.dtype, N: int, K: int) -> str:
    """The name of a weight [N, K] that meets x of `dtype` in op `op`."""
    return f"{op} {str(dtype).removeprefix('torch.')} {N}x{K}"


def name_of(kernel: str, config: Any) -> str:
    """The name of a configuration: "linear: batch 8, warps 4, stages 2"; what the problem says already is left out."""
    return f"{kernel}: " + ", ".join(f"{field.name} {getattr(config, field.name)}" for field in fields(config)
                                     if field.name not in ("kind", "dtype", "normed"))


def winner(problem: str, rows: int, device: int) -> str | None:
    """The fastest candidate by name, or None where nothing was measured."""
    measured = _winners(device).get(problem)
    return None if measured is None else measured.get(next((most for most in ROWS if most >= rows), ROWS[-1]))


def chosen(problem: str, rows: int, device: int, candidates: Mapping[str, T]) -> T:
    """What has won of `candidates`, by name; where none has, the first."""
    name = winner(problem, rows, device)
    return candidates[name] if name in candidates else next(iter(candidates.values()))


def takes(kernel: str, problem: str, rows: int, untuned: bool, device: int) -> bool:
    """Whether `kernel` is to serve the problem: one of its configurations has won, or nothing was measured and `untuned`."""
    name = winner(problem, rows, device)
    return untuned if name is None else name.startswith(f"{kernel}: ")


def file_of(gpu: str) -> Path:
    return cache_folder().parent / "tuned" / (re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json")


def gpu_of(device: int) -> str:
    return torch.cuda.get_device_name(device)


def keep(device: int, measured: Winners) -> Path:
    """Writes winners beside those that were measured with the same kernels and versions before. Raises OSError."""
    path, key = file_of(gpu_of(device)), _key(gpu_of(device))
    try:
        known = _checked(path.read_bytes(), key)
    except (OSError, ValueError):
        known = {}
    for name, by_rows in measured.items():
        known[name] = known.get(name, {}) | by_rows
    write_whole(path, (json.dumps({**key, "winners": known}, indent=1) + "\n").encode())
    forget()
    return path


def known(device: int) -> tuple[Path, int]:
    """The file of this GPU, and how many weights' winners are in it."""
    return file_of(gpu_of(device)), len(_winners(device))


def forget() -> None:
    """The file is read again, for what is planned from now on."""
    _winners.cache_clear()
    UNTUNED.clear()


@functools.cache
def _winners(device: int) -> Winners:
    path, found = file_of(gpu_of(device)), {}
    try:
        found = _checked(path.read_bytes(), _key(gpu_of(device)))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as problem:
        _LOG.warning("%s is not used: %s; ftops tune makes it anew", path, problem)
    if not found:
        UNTUNED.add(device)
    return found


def _checked(data: bytes, key: Mapping[str, Any]) -> Winners:
    """The winners in a file. Raises ValueError with what is wrong with it."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("winners"), dict):
        raise ValueError("it is no file of ftops tune")
    for name, value in key.items():
        if content.get(name) != value:
            raise ValueError(f"its {name} is {str(content.get(name))[:60]}, now {str(value)[:60]}")
    winners: Winners = {}
    for name, by_rows in content["winners"].items():
        if not isinstance(by_rows, dict) or not all(rows in map(str, ROWS) and isinstance(won, str) for rows, won in by_rows.items()):
            raise ValueError(f"its winners of {name[:60]} are not names by rows")
        winners[name] = {int(rows): won for rows, won in by_rows.items()}
    return winners


def _key(gpu: str) -> dict[str, Any]:
    """What the measurements hang on."""
    return {"format": _FORMAT, "gpu": gpu, "versions": {"torch": torch.__version__, "cuda": torch.version.cuda}, "sources": _sources()}


@functools.cache
def _sources() -> str:
    """Of all files in this folder: kernels inline each other's code, and reading which do would take longer."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:40]
