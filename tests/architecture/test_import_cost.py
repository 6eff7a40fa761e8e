"""`import ftops` in a program that only wants a norm: no GPU touched, no Numba, no transformers, and no wait."""
from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.architecture.sources import ROOT, files, module_name

# Every step in one interpreter, since each interpreter takes seconds to import torch. Tells what came of each, or its traceback.
PROGRAM = """
import contextlib, importlib, json, os, socket, subprocess, sys, threading, time, traceback, torch

def forbidden(name):
    def call(*args, **kwargs):
        raise AssertionError(f"work at import: {name}{args}")
    return call

WATCHED = [(owner, name, getattr(owner, name)) for owner, names in {
    torch.cuda: "_lazy_init is_available device_count get_device_capability current_device", torch._C: "_cuda_init",
    subprocess: "Popen", socket: "create_connection", os: "makedirs mkdir"}.items()
    for name in names.split() if hasattr(owner, name)]  # a build without CUDA has no _cuda_init

@contextlib.contextmanager
def watch():
    for owner, name, _ in WATCHED:
        setattr(owner, name, forbidden(name))
    yield
    for owner, name, original in WATCHED:
        setattr(owner, name, original)

def ftops():
    before, start = set(sys.modules), time.process_time()
    with watch():
        importlib.import_module("ftops")
    return time.process_time() - start, sorted(set(sys.modules) - before)

def op():
    loaded = dict(sys.modules)
    sys.modules.update(dict.fromkeys(("numba", "cuda", "transformers", "accelerate", "rich")))
    y = sys.modules["ftops"].ops.rms_norm(torch.ones(2, 8), torch.ones(8), 0.0)
    for name in [name for name, module in sys.modules.items() if module is None]:
        del sys.modules[name]
    sys.modules.update(loaded)
    return y.sum().item()

def modules():
    with watch():
        for name in given["ftops"]: importlib.import_module(name)

def kernels():
    import numba.cuda, numba.cuda.extending  # what Numba does at import is not ours
    with watch():
        for name in given["numba_kernels"]: importlib.import_module(name)

def integrations():
    for name in given["integrations"]: importlib.import_module(name)  # not watched: transformers asks for the devices
    assert not torch.cuda.is_initialized()

given, told = json.loads(sys.argv[1]), {}
for step in (ftops, op, modules, kernels, integrations):
    try:
        told[step.__name__] = step()
    except BaseException:
        told[step.__name__] = traceback.format_exc()
print(json.dumps(told))
"""
HEAVY = ("numba", "llvmlite", "cuda", "transformers", "accelerate", "tokenizers", "torch._dynamo", "torch._inductor", "triton", "sympy",
         "rich", "ftops.numba_kernels", "ftops.integrations")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    modules = {folder: [module_name(path) for path in files(folder) if path.stem not in ("__main__", "train")]
               for folder in ("ftops", "numba_kernels", "integrations")}
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(modules)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_ftops_costs_a_fifth_of_a_second_beyond_torch(told):
    """Of processor time: on a busy machine the clock on the wall counts the others too. No device query, no process, no folder either."""
    seconds, _ = told["ftops"]
    print(f"import ftops: {seconds * 1000:.0f} ms beyond torch")
    assert seconds <= 0.2


def test_import_ftops_loads_nothing_heavy(told):
    _, loaded = told["ftops"]
    assert [name for name in loaded if any(name == h or name.startswith(h + ".") for h in HEAVY)] == []
    assert "ftops.ops.attention" in loaded


def test_an_op_runs_without_the_other_dependencies(told):
    """What one part needs, a user of another need not have."""
    assert told["op"] == 16.0


@pytest.mark.parametrize(("step", "needs"), [("modules", "torch"), ("kernels", "numba"), ("integrations", "transformers")])
def test_no_work_at_import(step, needs, told):
    """No device query, no process, no folder: a fork, a container without a GPU or a read-only home must not fail here."""
    if find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    assert told[step] is None, told[step]
