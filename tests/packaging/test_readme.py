"""Whoever types what the README says, with the wheel installed, gets what it says."""
from __future__ import annotations

import re
import shlex

import pytest

from tests.packaging.environments import ROOT, run

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python" and "import " in text]
COMMANDS = [line.split("#")[0].strip() for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
OUTPUTS = [text for language, text in BLOCKS if not language]


# All in one interpreter, since each takes seconds to import PyTorch and transformers. Inductor is not what is read about here, and
# takes ten seconds of C++; tests/compile has it.
RUN = """
import sys, torch._inductor
from ftops.cli import main
torch._inductor.compile = lambda graph, *_, **__: graph.forward
examples, commands = eval(sys.argv[1])
for number, text in enumerate(examples, 1):
    exec(compile(text, f"README example {number}", "exec"), {})
for command in commands:
    assert main(command) == 0, command
"""
CHEAPER = {"demo": ["--runs", "1", "--max-new-tokens", "8"]}


@pytest.mark.slow
def test_every_example_runs(installed, tmp_path):
    """The Python ones in a namespace each; the commands of ftops; and what is shown as output is what they print."""
    python, _ = installed
    commands = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("ftops ")]
    assert len(PYTHON) == 5 and {command[0] for command in commands} == {"info", "generate", "evaluate", "demo"}
    work = repr((PYTHON, [command + CHEAPER.get(command[0], []) for command in commands]))
    shown = run(python, "-c", RUN, work, cwd=tmp_path, HF_HUB_OFFLINE="1").stdout
    lines = {line.rstrip() for line in shown.splitlines()}
    assert [line for text in OUTPUTS for line in text.splitlines() if line not in lines] == []
    assert shown.count("Output: same") == 2
    script = run(python.parent / "ftops", "--version", cwd=tmp_path).stdout
    assert script.split()[0] == "ftops"


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
