"""A file that grows past reading: kernels up to 400 lines, others up to 300."""
from __future__ import annotations

import ast

from tests.architecture.sources import PACKAGES, ROOT, files
from tests.architecture.test_imports import kernel_modules, module_name

KERNEL_LINES, LINES = 400, 300
LARGER = {
    "integrations/demo/train.py": "made the embedded model once; no part of what is installed runs it",
}


def test_size_of_files():
    kernels = kernel_modules()
    sizes = []
    for path in files(*PACKAGES, "tests", "bench"):
        lines = len((ROOT / path).read_text().splitlines())
        sizes.append((lines, KERNEL_LINES if module_name(path) in kernels else LINES, str(path)))
    for lines, limit, path in sorted(sizes, reverse=True):
        print(f"{lines:5} of {limit}  {path}")
    assert [f"{path}: {lines} lines, {limit} allowed" for lines, limit, path in sizes if lines > limit and path not in LARGER] == []
    assert [path for path in LARGER if (ROOT / path).exists() and len((ROOT / path).read_text().splitlines()) <= LINES] == []


def test_every_file_says_what_it_is_for():
    """The first thing in a file is its docstring."""
    assert [str(path) for path in files(*PACKAGES, "tests", "bench")
            if (text := (ROOT / path).read_text()).strip() and not ast.get_docstring(ast.parse(text))] == []


def test_no_assert_in_place_of_an_error():
    """python -O drops asserts, and a user who passes a wrong argument deserves a sentence."""
    assert [f"{path}:{node.lineno}" for path in files(*PACKAGES) for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.Assert)] == []


def test_no_promises_left_in_comments():
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    assert [f"{path}:{number}" for path in files(*PACKAGES, "tests", "bench")
            for number, line in enumerate((ROOT / path).read_text().splitlines(), 1) if any(word in line for word in words)] == []
