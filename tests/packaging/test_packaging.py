"""What pip installs: the wheel by way of the sdist, an editable install, and a checkout on the path all work, and litter nothing."""
from __future__ import annotations

import zipfile

from tests.packaging.environments import ROOT, environment, install, run

USE = """
import importlib.resources, importlib.util, sys
import ftops
from ftops.ops import kernel_file
assert importlib.resources.files("ftops.integrations.demo").joinpath("model", "model.safetensors").is_file()
assert kernel_file("rms_norm") == "numba_kernels/rms_norm.py"
assert ftops.__file__.startswith(sys.argv[1]), ftops.__file__
if "-m" not in sys.argv:
    assert importlib.util.find_spec("numba_kernels") is None and importlib.util.find_spec("integrations") is None
"""


def test_the_wheel_holds_one_package(wheel):
    """Nothing generic lands in site-packages, and everything that runs is in it, the embedded model too."""
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"ftops", f"{wheel.name.split('-py3')[0]}.dist-info"}
    folders = {"ftops": ROOT / "ftops", "ftops/numba_kernels": ROOT / "numba_kernels", "ftops/integrations": ROOT / "integrations"}
    wanted = {f"{prefix}/{file.relative_to(folder).as_posix()}" for prefix, folder in folders.items() for file in folder.rglob("*.py")}
    assert wanted <= set(names)
    assert {f"ftops/integrations/demo/model/{file}" for file in ("model.safetensors", "tokenizer.json", "config.json")} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    entries = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "[torch_dynamo_backends]\nftops = " in entries and "[console_scripts]\nftops = " in entries


def test_the_wheel_works_from_anywhere(installed, tmp_path):
    """torch.compile finds backend="ftops" by the entry point alone, without an import of ftops."""
    python, site = installed
    assert (site / "ftops" / "numba_kernels").is_dir() and not (site / "numba_kernels").exists() and not (site / "integrations").exists()
    backend = "import torch._dynamo as d; assert 'ftops' in d.list_backends(); print(d.lookup_backend('ftops').__module__)"
    assert run(python, "-c", backend + USE, site, cwd=tmp_path).stdout.strip().startswith("ftops.integrations")


def test_an_editable_install_works_from_anywhere(checkout, tmp_path):
    python, _ = environment(tmp_path / "venv")
    install(python, "--editable", checkout)
    run(python, "-c", USE, checkout, cwd=tmp_path)


MODULES = """
import runpy
for module in ("ftops", "ftops.integrations.demo.train"):
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code
"""


def test_a_checkout_works_without_installing(checkout, tmp_path):
    """The folder on the path is enough, as on a machine where nothing may be installed; `python -m` finds the commands."""
    python, _ = environment(tmp_path / "venv")
    assert run(python, "-c", USE + MODULES, checkout, "-m", cwd=tmp_path, PYTHONPATH=str(checkout)).stdout.count("usage") == 2
