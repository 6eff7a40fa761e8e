"""What pip installs: the wheel by way of the sdist, an editable install, and a checkout on the path all work, and litter nothing."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

USE = """
import importlib.util, sys
import ftops
from ftops.integrations.demo.load import EMBEDDED
from ftops.ops import kernel_file
assert (EMBEDDED / "model.safetensors").is_file(), EMBEDDED
assert kernel_file("rms_norm") == "numba_kernels/rms_norm.py"
assert ftops.__file__.startswith(sys.argv[1]), ftops.__file__
if "-m" not in sys.argv:
    assert importlib.util.find_spec("numba_kernels") is None and importlib.util.find_spec("integrations") is None
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300, env=clean | environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone has, so that building leaves nothing in the repository."""
    target = tmp_path_factory.mktemp("checkout")
    if (ROOT / ".git").exists():
        files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    else:
        files = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for name in filter(lambda name: name and (ROOT / name).is_file(), files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """Built from the sdist, as pip builds it where there is no wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=checkout)
    assert len(list((checkout / "dist").glob("*.tar.gz"))) == 1
    (made,) = (checkout / "dist").glob("*.whl")
    return made


def environment(folder: Path) -> tuple[Path, Path]:
    """A new virtual environment's python and site-packages. It sees the heavy dependencies of this one, but not its editable installs."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin" / "python", site


def install(python: Path, *what: object) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", *what, cwd=python.parent)


def test_the_wheel_holds_one_package(wheel):
    """Nothing generic lands in site-packages, and everything that runs is in it, the embedded model too."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"ftops", f"{wheel.name.split('-py3')[0]}.dist-info"}
    folders = {"ftops": ROOT / "ftops", "ftops/numba_kernels": ROOT / "numba_kernels", "ftops/integrations": ROOT / "integrations"}
    wanted = {f"{prefix}/{file.relative_to(folder).as_posix()}" for prefix, folder in folders.items() for file in folder.rglob("*.py")}
    assert wanted <= set(names)
    assert {f"ftops/integrations/demo/model/{file}" for file in ("model.safetensors", "tokenizer.json", "config.json")} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_runs_the_demo(wheel, tmp_path):
    """In an environment of its own, from a folder that is not the repository."""
    python, site = environment(tmp_path / "venv")
    install(python, wheel)
    assert (site / "ftops" / "numba_kernels").is_dir() and not (site / "numba_kernels").exists() and not (site / "integrations").exists()
    run(python, "-c", USE, site, cwd=tmp_path)
    ftops = python.with_name("ftops")
    done = run(ftops, "demo", "--device", "cpu", "--runs", "1", "--max-new-tokens", "8", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.stdout.count("Output: same") == 2
    assert "attention" in run(ftops, "info", cwd=tmp_path).stdout


def test_the_wheel_brings_the_compile_backend(wheel, tmp_path):
    """torch.compile finds backend="ftops" by the entry point alone, without an import of ftops."""
    python, _ = environment(tmp_path / "venv")
    install(python, wheel)
    code = "import torch._dynamo as d; assert 'ftops' in d.list_backends(); print(d.lookup_backend('ftops').__module__)"
    assert run(python, "-c", code, cwd=tmp_path).stdout.strip().startswith("ftops.integrations")


def test_an_editable_install_works_from_anywhere(checkout, tmp_path):
    python, _ = environment(tmp_path / "venv")
    install(python, "--editable", checkout)
    run(python, "-c", USE, checkout, cwd=tmp_path)


def test_a_checkout_works_without_installing(checkout, tmp_path):
    """The folder on the path is enough, as on a machine where nothing may be installed."""
    python, _ = environment(tmp_path / "venv")
    run(python, "-c", USE, checkout, "-m", cwd=tmp_path, PYTHONPATH=str(checkout))


@pytest.mark.parametrize("module", ["ftops", "ftops.integrations.demo.train"])
def test_commands_run_as_modules_from_a_checkout(module, checkout):
    assert "usage" in run(sys.executable, "-m", module, "--help", cwd=checkout).stdout
