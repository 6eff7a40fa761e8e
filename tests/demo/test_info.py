"""`ftops info` is what a person runs when something is missing, so it works without everything."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda import pathfinder

from ftops import info
from ftops.cli import main
from ftops.numba_kernels import compile
from ftops.ops import OPS


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_what_is_missing_and_what_is_used(capsys):
    assert main(["info"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The CPU is used" in shown
    assert "The kernels cannot run here: * PyTorch" in shown
    assert torch.__version__ in shown
    for op in OPS:
        assert f"│ {op} │" in shown
    assert "no kernel" not in shown and "│ linear_w8a16 │ numba_kernels/linear.py │ PyTorch and Numba │" in shown


def test_a_narrow_terminal_cuts_nothing_off(capsys, monkeypatch):
    """On 40 columns names are folded; an ellipsis would hide which op is meant."""
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown[shown.index("┏"):].splitlines())) <= 40


def test_it_names_a_missing_compiler(monkeypatch, capsys):
    """A machine without the CUDA compiler is told which extra to install."""
    def absent(library: str) -> None:
        raise pathfinder.DynamicLibNotFoundError(f"no lib{library}.so")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", absent)
    compile.compiler_problem.cache_clear()
    try:
        assert main(["info"]) == 0
    finally:
        compile.compiler_problem.cache_clear()
    assert "libraries are missing: pip install 'ftops[cu13]' (or [cu12] " in capsys.readouterr().out


def test_the_cuda_12_wheels_count(monkeypatch):
    monkeypatch.setattr(info.metadata, "version", lambda name: {"nvidia-nvjitlink-cu12": "12.9"}.get(name) or _absent(name))
    assert info.installed("nvidia-nvjitlink", "nvidia-nvjitlink-cu12") == "12.9"
    assert info.installed("nvidia-nvjitlink") is None


def _absent(name: str) -> str:
    raise info.metadata.PackageNotFoundError(name)


def test_it_shows_where_kernels_are_kept(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FTOPS_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.cubin").write_bytes(b"x" * 2**20)
    assert main(["info"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/kernels(1kernels,1.0MiB)" in shown


def test_it_needs_neither_transformers_nor_numba():
    """A broken or missing transformers does not stop the command that would say so."""
    code = ("import sys; sys.modules['transformers'] = sys.modules['numba'] = None\n"
            "from ftops.cli import main; sys.exit(main(['info']) or main(['generate', '--prompt', 'x']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "decode_attention" in done.stdout
    assert "pip install 'ftops[demo]'" in done.stderr
