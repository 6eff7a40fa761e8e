"""The project's files and what each one imports, read from the syntax tree: nothing is imported to find out."""
from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("ftops", "numba_kernels", "integrations")


@dataclass(frozen=True)
class Import:
    """`target` as a dotted name; lazy: inside a function; typing: only for type checkers."""

    file: str
    line: int
    target: str
    lazy: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"

    def of(self, *packages: str) -> bool:
        return any(self.target == package or self.target.startswith(package + ".") for package in packages)


def files(*folders: str) -> list[Path]:
    """Python files below the folders, as paths relative to the root."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """numba_kernels/ptx.py is ftops.numba_kernels.ptx."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "ftops" else ("ftops", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in files(*PACKAGES)}


@cache
def imports(path: Path) -> tuple[Import, ...]:
    found = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        def add(target: str) -> None:
            found.append(Import(str(path), node.lineno, target, lazy, typing))
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = module_name(path.parent / "__init__.py").split(".")
                module = ".".join([*package[: len(package) - node.level + 1], module]).rstrip(".")
            for alias in node.names:
                name = f"{module}.{alias.name}"
                add(name if name in MODULES or module in ("torch", "torch.utils") else module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            add(f"torch.{node.attr}")  # torch.library.Library needs no import statement of its own
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy, typing or (guarded and child in node.body))

    visit(ast.parse((ROOT / path).read_text()), False, False)
    return tuple(found)


def violations(folder: str, wrong) -> list[str]:
    """What `wrong(import)` finds in the folder, written out."""
    return [str(one) for path in files(folder) for one in imports(path) if wrong(one)]
