"""A clone and the wheel that is built from it, made once for all tests here."""
from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.packaging.environments import ROOT, environment, install, run


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def wheel(checkout: Path) -> Path:
    """Built from the sdist, as pip builds it where there is no wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=checkout)
    assert len(list((checkout / "dist").glob("*.tar.gz"))) == 1
    (made,) = (checkout / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The python and the site-packages of an environment with the wheel in it."""
    python, site = environment(tmp_path_factory.mktemp("installed") / "venv")
    install(python, wheel)
    return python, site
