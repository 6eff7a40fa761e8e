"""A kernel's Spec -> cubin, and the disk cache of cubins. Needs no GPU."""
from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from ftops.numba_kernels.files import write_whole
from ftops.numba_kernels.front_end import llvm_ir
from ftops.numba_kernels.machine_code import Cubin, assemble, link
from ftops.numba_kernels.machine_code import ptx as linked_ptx

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")  # what the tests compile for
_FORMAT = 1
_MAGIC = b"ftops cubin\n"
_BLACKWELL = 100  # NVVM has another LLVM from this compute capability on


@dataclass(frozen=True)
class Spec:
    """A kernel to be: `make(config)` returns the Python function, the rest is how it is compiled and launched.

    signature: one letter a parameter: p = pointer, i = int32, u = uint32, l = int64, f = float32, t = tensor map (128 bytes, first of all).
    threads: of a block, the launch bound. shared_bytes: dynamic shared memory, up to 227 KiB. min_blocks: resident blocks per
    multiprocessor that registers must allow. cluster: blocks of a cluster (sm_90 and up).
    dependent: programmatic dependent launch, where the GPU has it (sm_90 and up): the kernel may start before the one before it has ended,
    and calls `ptx.wait_for_primary` before it touches what others write.
    spills: bytes of spills that are known, and why beside the Config. only: the one architecture whose instructions it uses, or None.
    halves: float16 and bfloat16 differ in instructions of ptx.py alone, and in nothing that `make` would have to know: it is given a Config
    of dtype "16-bit", and what it returns is made into both.
    """

    make: Callable[[Any], Callable]
    config: Any
    signature: str
    threads: int
    shared_bytes: int = 0
    min_blocks: int = 1
    cluster: int = 1
    dependent: bool = False
    spills: int = 0
    only: str | None = None
    halves: bool = False

    @property
    def source(self) -> Spec:
        """What is compiled in Python and by LLVM: of a pair of halves, one for both."""
        return replace(self, config=replace(self.config, dtype="16-bit")) if self.halves and self.config.dtype != "float32" else self

    def serves(self, arch: str) -> bool:
        return self.only in (None, arch)

    @property
    def name(self) -> str:
        return f"{self.make.__module__.rpartition('.')[2]}.{self.make.__name__.lstrip('_')}[{self.config}]"


def cubin(spec: Spec, arch: str) -> Cubin:
    """The machine code of `spec` for `arch` ("sm_80", "sm_90a", ...): from the disk cache, or compiled and put there.

    Raises RuntimeError when the CUDA compiler libraries are missing (pip install "ftops[cu13]").
    """
    return cubins(spec, (arch,))[0]


def cubins(spec: Spec, arches: Sequence[str], ptxas: Path | None = None) -> list[Cubin]:
    """`cubin` for each of `arches`. ptxas: as of `compile_spec`."""
    paths = {arch: cache_folder() / f"{_key(spec, arch)}.cubin" for arch in arches}
    made = {arch: _read(path) for arch, path in paths.items()}
    for new in compile_spec(spec, [arch for arch in arches if made[arch] is None], ptxas):
        made[new.arch] = new
        _write(paths[new.arch], new)
    return [made[arch] for arch in arches]


def compile_spec(spec: Spec, arches: Sequence[str], ptxas: Path | None = None) -> Iterator[Cubin]:
    """Compiles without looking at the disk cache. Numba works once for all architectures, and for the other one of two halves.

    So does LLVM, once up to sm_90 and once for later ones, with the assembler of `machine_code.find_ptxas`: the same code, byte for byte.
    """
    problem = compiler_problem() if arches else None
    if problem:
        raise RuntimeError(f"compiling {spec.name}: {problem}")
    from ftops.numba_kernels.ptx import for_target
    dtype = spec.config.dtype if spec.source is not spec else None
    for arch in arches:
        capability = int(re.sub(r"\D", "", arch))
        if ptxas:
            of_llvm = spec.only or ("sm_80" if capability < _BLACKWELL else "sm_100")
            yield assemble(for_target(_ptx(spec.source, of_llvm), capability, dtype), arch, ptxas)
        else:
            yield link([for_target(module, capability, dtype) for module in llvm_ir(spec.source)], arch, spec.only is not None)


@functools.lru_cache(maxsize=2)
def _ptx(source: Spec, arch: str) -> str:
    return linked_ptx(llvm_ir(source), arch, source.only is not None)


@functools.cache
def compiler_problem() -> str | None:
    """Why kernels cannot be compiled here and what to do, or None. The libraries may be pip's or a CUDA toolkit's; no GPU is needed."""
    try:
        import_module("numba.cuda")
        from cuda.pathfinder import load_nvidia_dynamic_lib
        for library in ("nvvm", "nvJitLink", "nvrtc"):
            load_nvidia_dynamic_lib(library)
    except (ImportError, RuntimeError) as error:
        return ("the CUDA compiler libraries are missing: pip install 'ftops[cu13]' (or [cu12] for a CUDA 12 driver); "
                f"{str(error).strip().splitlines()[0]}")
    return None


def cache_folder() -> Path:
    """$FTOPS_CACHE, or ftops/kernels in the user's cache folder."""
    if "FTOPS_CACHE" in os.environ:
        return Path(os.environ["FTOPS_CACHE"]) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftops" / "kernels"


def _key(spec: Spec, arch: str) -> str:
    """Content of everything that the cubin depends on."""
    parts = (_FORMAT, spec.make.__qualname__, repr(spec.config), spec.signature, spec.threads, spec.min_blocks, arch, _versions(),
             sources_digest(inspect.getsourcefile(spec.make)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


@functools.cache
def _versions() -> tuple[str, ...]:
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions() if d.metadata["Name"]}
    ours = re.compile(r"(numba|numba-cuda|llvmlite|cuda-bindings|nvidia-(nvvm|nvjitlink|cuda-nvcc-cu12).*)$")  # of CUDA 12, NVVM is in nvcc
    wanted = [name for name in installed if ours.match(name)]
    return tuple(f"{name}=={installed[name]}" for name in sorted(wanted))


@functools.cache
def sources_digest(path: str) -> str:
    """SHA-256 of a kernel file and of every file of ours that it imports, directly or not: kernels inline each other's code."""
    seen: dict[Path, bytes] = {}
    waiting = [Path(path).resolve()]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen[file] = file.read_bytes()
        for node in ast.walk(ast.parse(seen[file])):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ftops.numba_kernels"):
                names = [node.module.removeprefix("ftops.numba_kernels").lstrip(".")] + [alias.name for alias in node.names]
                waiting += [found for name in names if name and (found := Path(__file__).with_name(f"{name}.py").resolve()).is_file()]
    return hashlib.sha256(b"\0".join(seen[file] for file in sorted(seen, key=lambda f: f.name))).hexdigest()


def _read(path: Path) -> Cubin | None:
    """A stored cubin, or None where there is none or it is not whole: it will be made anew."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + 32
    if not data.startswith(_MAGIC) or hashlib.sha256(data[head:]).digest() != data[len(_MAGIC):head]:
        return None
    (length,) = struct.unpack_from("<I", data, head)
    about = json.loads(data[head + 4 : head + 4 + length])
    return Cubin(code=data[head + 4 + length :], **{**about, "warnings": tuple(about["warnings"])})


def _write(path: Path, made: Cubin) -> None:
    """A folder that cannot be written costs a compile a process, nothing else."""
    about = json.dumps({k: v for k, v in vars(made).items() if k != "code"}).encode()
    payload = struct.pack("<I", len(about)) + about + made.code
    try:
        write_whole(path, _MAGIC + hashlib.sha256(payload).digest() + payload)
    except OSError:
        return
