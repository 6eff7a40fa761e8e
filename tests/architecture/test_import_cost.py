"""`import ftops` in a program that only wants a norm: no GPU touched, no Numba, no transformers, and no wait."""
from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from tests.architecture.sources import ROOT, files, module_name


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_ftops_costs_a_fifth_of_a_second_beyond_torch():
    """Of processor time: on a busy machine the clock on the wall counts the others too."""
    seconds = float(run("import torch, time; start = time.process_time(); import ftops; print(time.process_time() - start)"))
    print(f"import ftops: {seconds * 1000:.0f} ms beyond torch")
    assert seconds <= 0.2


def test_import_ftops_loads_nothing_heavy():
    loaded = json.loads(run("""
        import json, sys, torch
        before = set(sys.modules)
        import ftops
        print(json.dumps(sorted({name for name in set(sys.modules) - before})))
    """))
    heavy = ("numba", "llvmlite", "cuda", "transformers", "accelerate", "tokenizers", "torch._dynamo", "torch._inductor", "triton", "sympy",
             "rich", "ftops.numba_kernels", "ftops.integrations")
    assert [name for name in loaded if any(name == h or name.startswith(h + ".") for h in heavy)] == []
    assert "ftops.ops.attention" in loaded


FORBIDDEN = """
    import os, socket, subprocess, threading, torch

    def forbidden(name):
        def call(*args, **kwargs):
            raise AssertionError(f"work at import: {name}{args}")
        return call

    for owner, names in {torch.cuda: "_lazy_init is_available device_count get_device_capability current_device", torch._C: "_cuda_init",
                         subprocess: "Popen", socket: "create_connection", os: "makedirs mkdir"}.items():
        for name in names.split():
            if hasattr(owner, name):  # a build without CUDA has no _cuda_init
                setattr(owner, name, forbidden(name))
"""


def test_an_op_runs_without_the_other_dependencies():
    """What one part needs, a user of another need not have."""
    out = run("""
        import sys
        for name in ("numba", "cuda", "transformers", "accelerate", "rich"):
            sys.modules[name] = None
        import torch, ftops
        print(ftops.ops.rms_norm(torch.ones(2, 8), torch.ones(8), 0.0).sum().item())
    """)
    assert float(out) == 16.0


def test_no_work_at_import_of_ftops():
    """No device query, no process, no folder: a fork, a container without a GPU or a read-only home must not fail here."""
    modules = [module_name(path) for path in files("ftops") if path.stem != "__main__"]
    run(textwrap.dedent(FORBIDDEN) + f"import importlib\nfor name in {modules}: importlib.import_module(name)")


def test_no_work_at_import_of_the_kernels():
    """Numba is imported before the watch is set: what it does is not ours."""
    pytest.importorskip("numba.cuda")
    modules = [module_name(path) for path in files("numba_kernels") if path.stem != "__main__"]
    program = "import numba.cuda, numba.cuda.extending\n" + textwrap.dedent(FORBIDDEN)
    run(program + f"import importlib\nfor name in {modules}: importlib.import_module(name)")


def test_importing_integrations_leaves_the_gpu_alone():
    pytest.importorskip("transformers")
    modules = [module_name(path) for path in files("integrations") if path.stem not in ("__main__", "train")]
    out = run(f"import importlib, torch\nfor name in {modules}: importlib.import_module(name)\nprint(torch.cuda.is_initialized())")
    assert out.split()[-1] == "False"
