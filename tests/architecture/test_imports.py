"""Imports run integrations -> ftops -> numba_kernels, and what belongs to others is touched in one place."""
from __future__ import annotations

from pathlib import Path

from ftops.ops import OPS
from tests.architecture.sources import PACKAGES, ROOT, files, imports, module_name, violations

FACADE = ("ftops/__init__.py", "ftops/cli.py")  # ftops.patch and its like, and the command line, reach up to integrations
KERNELS, INTEGRATIONS = "ftops.numba_kernels", "ftops.integrations"
FOUNDATION = {f"{KERNELS}.{name}" for name in ("ptx", "compile", "launch")}


def kernel_modules() -> set[str]:
    """One kernel = one file: those that bear an op's name or launch something. The others are the foundation and shared device helpers."""
    return {module_name(path) for path in files("numba_kernels") if path.stem in OPS or "\ndef launch" in (ROOT / path).read_text()}


def test_numba_kernels_import_nothing_else_of_ours():
    assert violations("numba_kernels", lambda i: i.of("ftops") and not i.of(KERNELS)) == []


def test_kernels_do_not_import_one_another():
    kernels = kernel_modules()
    assert f"{KERNELS}.rms_norm" in kernels
    assert not FOUNDATION & kernels
    assert violations("numba_kernels", lambda i: i.target in kernels) == []


def test_ftops_reaches_kernels_only_from_its_ops_and_lazily():
    """`import ftops` must work without Numba, and each op must have one way down."""
    assert violations("ftops", lambda i: i.of(KERNELS) and not i.typing and not (i.file.startswith("ftops/ops/") and i.lazy)) == []


def test_ftops_does_not_know_integrations():
    assert violations("ftops", lambda i: i.of(INTEGRATIONS) and not (i.file in FACADE and i.lazy)) == []


def test_integrations_do_not_reach_kernels():
    assert violations("integrations", lambda i: i.of(KERNELS)) == []


def test_a_family_is_data():
    """A file in archs/ that needs more than arch.py, and a family that it is a variation of, is code about one model."""
    families = [path for path in files("integrations/transformers/archs") if path.name != "__init__.py"]
    assert families
    for path in families:
        allowed = {f"{INTEGRATIONS}.transformers.arch", "__future__", *(module_name(other) for other in families)}
        assert [str(one) for one in imports(path) if one.target not in allowed] == []


def test_transformers_distributed_and_dynamo_stay_in_integrations():
    foreign = ("transformers", "accelerate", "torch.distributed", "torch._dynamo", "torch._inductor", "torch.fx")
    for folder in ("ftops", "numba_kernels"):
        assert violations(folder, lambda i: i.of(*foreign)) == []


def test_torch_library_stays_in_op():
    for folder in PACKAGES:
        assert violations(folder, lambda i: i.of("torch.library") and i.file != "ftops/op.py") == []


def test_folders_are_imported_by_their_installed_names():
    """`import numba_kernels` works in a checkout alone, and there makes every op twice."""
    for folder in (*PACKAGES, "tests", "bench"):
        assert violations(folder, lambda i: i.of("numba_kernels", "integrations")) == []


def test_no_import_cycles():
    """Among the imports that run at import time; a lazy one that closes a circle is a step back in the straight line of a call."""
    graph = {module_name(path): {i.target for i in imports(path) if not i.lazy and not i.typing and i.of("ftops")}
             for path in files(*PACKAGES)}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module):], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                if not module.startswith(target + ".") and target != module:  # the package itself, which its modules may name
                    walk(target, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_the_reader_of_imports_sees_what_it_should(tmp_path, monkeypatch):
    """The tests above pass on an empty list: this one shows that the list is not empty for want of looking."""
    from tests.architecture import sources
    text = "from torch import library\nfrom . import ptx\ndef f():\n    from ftops import integrations\n    torch.library.Library\n"
    (tmp_path / "numba_kernels").mkdir()
    (tmp_path / "numba_kernels" / "made_up.py").write_text(text)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    seen = {(i.target, i.lazy) for i in imports(Path("numba_kernels/made_up.py"))}
    assert {("torch.library", False), ("torch.library", True), ("ftops.numba_kernels.ptx", False), ("ftops.integrations", True)} <= seen
