"""The tests that run under compute-sanitizer are there: a renamed case would otherwise be missed on a GPU only."""
from __future__ import annotations

import importlib
from pathlib import Path

from tests.ops.calls import CASES_AND_DTYPES

LISTED = (Path(__file__).parent / "sanitized.txt").read_text().splitlines()


def test_what_is_sanitized_is_there():
    ids = {p.id for p in CASES_AND_DTYPES}
    for line in LISTED:
        file, _, test = line.partition("::")
        name, _, case = test.partition("[")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert hasattr(module, name), line
        assert not name.endswith("_case") or case.removesuffix("]") in ids, line


def test_every_op_is_sanitized():
    assert not {op for op in (p.values[0] for p in CASES_AND_DTYPES) if not any(f"[{op}-" in line for line in LISTED)}
