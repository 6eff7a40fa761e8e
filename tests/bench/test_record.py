"""A result names the sources that it came from."""
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import record


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FTOPS_BENCH_COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for folder in (*record.SOURCES, "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def head(repository: Path) -> str:
    return subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout[:12]


def test_changed_sources_are_marked_and_other_changes_are_not(repository):
    assert record.commit() == head(repository)
    (repository / "docs" / "file").write_text("two")
    assert record.commit() == head(repository)
    (repository / "numba_kernels" / "file").write_text("two")
    assert record.commit() == head(repository) + "+changes"


def test_a_copy_without_history_is_told_its_commit(repository, monkeypatch):
    monkeypatch.setenv("FTOPS_BENCH_COMMIT", "0123456789ab")
    assert record.commit() == "0123456789ab"


def test_no_repository_and_nothing_told_is_unknown(tmp_path, monkeypatch):
    monkeypatch.delenv("FTOPS_BENCH_COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == "unknown"
