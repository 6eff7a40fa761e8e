"""Whoever types what the README says, with the wheel installed, gets what it says."""
from __future__ import annotations

import re

import pytest

from tests.packaging.environments import ROOT, environment, install, run

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python" and "import " in text]
COMMANDS = [line.split("#")[0].strip() for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
OUTPUTS = [text for language, text in BLOCKS if not language]


@pytest.mark.slow
def test_every_example_runs(wheel, tmp_path):
    """The Python ones in a namespace each; the commands of ftops; and what is shown as output is what they print."""
    python, _ = environment(tmp_path / "venv")
    install(python, wheel)
    assert len(PYTHON) == 5
    code = "".join(f"exec(compile({text!r}, 'README example {number}', 'exec'), {{}})\n" for number, text in enumerate(PYTHON, 1))
    shown = run(python, "-c", code, cwd=tmp_path, HF_HUB_OFFLINE="1").stdout
    lines = {line.rstrip() for line in shown.splitlines()}
    assert [line for text in OUTPUTS for line in text.splitlines() if line not in lines] == []

    commands = [command for command in COMMANDS if command.startswith("ftops ")]
    assert {command.split()[1] for command in commands} == {"info", "generate", "evaluate", "demo"}
    for command in commands:
        shown = run("bash", "-c", command, cwd=tmp_path, PATH=f"{python.parent}:/usr/bin:/bin").stdout
        assert "demo" not in command or shown.count("Output: same") == 2


def test_every_command_of_a_clone_is_there():
    makes = [command for command in COMMANDS if command.startswith("make ")]
    assert makes and [run("bash", "-c", command.replace("make", "make -n", 1), cwd=ROOT) for command in makes]
    extras = {extra for command in COMMANDS if command.startswith("pip ") for extra in re.search(r"\[(.*?)\]", command)[1].split(",")}
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.MULTILINE))
    assert extras and extras <= declared


PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"`[^`]*`", "", (ROOT / page).read_text())
    targets = re.findall(r"\]\(([^)#]+)", prose)
    assert [target for target in targets if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()] == []
