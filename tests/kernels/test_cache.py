"""A stale kernel, a broken cache file, or a cold start of eight processes: what a user finds under ~/.cache/ftops."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from ftops.numba_kernels import KERNELS, compile
from ftops.numba_kernels.compile import cache_folder, cubin, cubins, sources_digest
from tests.kernels import tiny

KERNEL_FOLDER = Path(compile.__file__).parent
SPEC, ARCH = tiny.fill(), "sm_80"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("FTOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled, as it happens: (spec, arch)."""
    calls = []
    original = compile.compile_spec

    def counted(spec, arches, *ptxas):
        calls.extend((spec, arch) for arch in arches)
        return original(spec, arches, *ptxas)

    monkeypatch.setattr(compile, "compile_spec", counted)
    return calls


def test_second_use_compiles_nothing(folder, compiled):
    made = cubin(SPEC, ARCH)
    assert len(list(folder.iterdir())) == 1
    assert cubin(SPEC, ARCH) == made
    assert compiled == [(SPEC, ARCH)]


def test_only_missing_architectures_are_compiled(folder, compiled):
    first = cubin(SPEC, "sm_90a")
    both = cubins(SPEC, ("sm_80", "sm_90a"))
    assert both[1] == first and both[0].arch == "sm_80"
    assert compiled == [(SPEC, "sm_90a"), (SPEC, "sm_80")]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


BROKEN = {"truncated": truncated, "one_bit": flipped, "empty": lambda data: b"", "head_only": lambda data: data[:20],
          "longer": lambda data: data + b"x", "foreign": lambda data: b"\x7fELF" + data, "text": lambda data: b"# not a cubin\n" * 50}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_entry_is_made_anew(folder, compiled, how):
    """A full disk, a killed process, another program's file: never loaded, never an error."""
    made = cubin(SPEC, ARCH)
    path, = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(BROKEN[how](whole))
    again = cubin(SPEC, ARCH)
    assert len(compiled) == 2
    assert (again.registers, again.entry.startswith("_ZN")) == (made.registers, True)
    assert list(folder.iterdir()) == [path]
    assert cubin(SPEC, ARCH) == again
    assert len(compiled) == 2


def test_entry_that_is_a_folder(folder):
    cubin(SPEC, ARCH)
    path, = folder.iterdir()
    path.unlink()
    path.mkdir()
    assert cubin(SPEC, ARCH).arch == ARCH


@pytest.mark.parametrize("where", ["under_a_file", "read_only"])
def test_cache_that_cannot_be_written(tmp_path, monkeypatch, compiled, where):
    """A read-only home costs a compile a process, and nothing else."""
    place = tmp_path / "place"
    if where == "under_a_file":
        place.write_text("a file")
    else:
        place.mkdir(mode=0o500)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
    monkeypatch.setenv("FTOPS_CACHE", str(place))
    assert cubin(SPEC, ARCH).arch == ARCH
    assert cubin(SPEC, ARCH).arch == ARCH
    assert len(compiled) == 2


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FTOPS_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a" / "kernels"
    monkeypatch.delenv("FTOPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "ftops" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / ".cache" / "ftops" / "kernels"


CHANGES = {
    "make": {"make": tiny.make_target}, "config": {"config": tiny.Config(2)}, "signature": {"signature": "pfi"}, "threads": {"threads": 64},
    "min_blocks": {"min_blocks": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_spec_is_another_entry(change):
    assert compile._key(replace(SPEC, **CHANGES[change]), ARCH) != compile._key(SPEC, ARCH)


def test_another_architecture_or_compiler_is_another_entry(monkeypatch):
    key = compile._key(SPEC, ARCH)
    assert compile._key(SPEC, "sm_90a") != key
    names = " ".join(compile._versions())
    for part in ("numba==", "numba-cuda==", "llvmlite==", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-bindings=="):
        assert part in names
    monkeypatch.setattr(compile, "_versions", lambda: ("numba-cuda==99",))
    assert compile._key(SPEC, ARCH) != key


@pytest.fixture
def copied_kernels(tmp_path, monkeypatch):
    """The sources of the kernels where a test may edit them: digest(name) is that of a kernel file."""
    shutil.copytree(KERNEL_FOLDER, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compile, "__file__", str(tmp_path / "kernels" / "compile.py"))
    return tmp_path / "kernels"


def digests(kernels: Path) -> dict[str, str]:
    sources_digest.cache_clear()
    found = {path.stem: sources_digest(str(path)) for path in kernels.glob("*.py")}
    sources_digest.cache_clear()
    return found


def test_a_changed_helper_changes_the_kernels_that_inline_it(copied_kernels):
    before = digests(copied_kernels)
    helper = copied_kernels / "rows.py"
    helper.write_text(helper.read_text() + "\n# changed\n")
    after = digests(copied_kernels)
    changed = {name for name in before if before[name] != after[name]}
    assert {"rows", "row_tile", "rms_norm", "layer_norm", "rotary", "bias_activation"} <= changed
    assert not {"ptx", "compile", "launch", "activation"} & changed


def test_changed_instructions_change_every_kernel(copied_kernels):
    before = digests(copied_kernels)
    (copied_kernels / "ptx.py").write_text((copied_kernels / "ptx.py").read_text().replace("fma.rn.f32", "fma.rz.f32"))
    after = digests(copied_kernels)
    assert [name for name in KERNELS if before[name] == after[name]] == []


def test_the_digest_of_a_spec_is_that_of_its_file():
    assert sources_digest(tiny.__file__) != sources_digest(str(KERNEL_FOLDER / "rms_norm.py"))


@pytest.mark.slow
def test_eight_processes_that_start_cold(tmp_path):
    """torchrun on eight GPUs: all compile, one file is left, and each process has a whole kernel."""
    program = textwrap.dedent("""
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from ftops.numba_kernels import bias_activation
        from ftops.numba_kernels.compile import cubin

        def compile(_):
            all_are_there.wait(timeout=100)
            made = cubin(next(bias_activation.variants()), "sm_80")
            return made.registers, len(made.code) > 1000, made.entry.encode() in made.code

        processes = get_context("fork")  # importing PyTorch and Numba is done once
        all_are_there = processes.Barrier(8)
        print(*ProcessPoolExecutor(8, processes).map(compile, range(8)), sep="\\n")
    """)
    environment = {**os.environ, "FTOPS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([str(KERNEL_FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    results = done.stdout.splitlines()
    assert len(results) == 8 and len(set(results)) == 1, done.stdout + done.stderr
    assert results[0].endswith("True, True)"), results[0]
    kept, = (tmp_path / "cache" / "kernels").iterdir()
    assert kept.suffix == ".cubin"


@pytest.mark.parametrize("library", ["nvvm", "nvJitLink", "nvrtc"])
def test_missing_compiler_library_is_named(folder, monkeypatch, library):
    """pip install ftops without an extra: the error says which to add."""
    pathfinder = pytest.importorskip("cuda.pathfinder")
    original = pathfinder.load_nvidia_dynamic_lib

    def load(name):
        if name == library:
            raise pathfinder.DynamicLibNotFoundError(f"{name} was not found")
        return original(name)

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", load)
    compile.compiler_problem.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=rf"tiny.*libraries are missing.*ftops\[cu13\].*{library}"):
            cubin(SPEC, ARCH)
    finally:
        compile.compiler_problem.cache_clear()
    assert not folder.exists()
