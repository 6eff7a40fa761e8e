"""Numba source -> LTO-IR -> cubin, and the disk cache of cubins. Needs no GPU.

LTO-IR, not PTX: nvJitLink compiles PTX as if more code were to be linked, and then ignores setmaxnreg (warning C7504) and serialises
wgmma (C7509). A cubin, not PTX, is loaded, since the newest NVVM writes PTX that older drivers refuse.
"""
from __future__ import annotations

import ast
import functools
import gc
import hashlib
import inspect
import json
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ftops.numba_kernels.files import write_whole

OLDEST = (8, 0)  # compute capability: packed 16-bit conversions, cp.async and mma of bfloat16 begin there
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")  # what the tests compile for
_FORMAT = 1
_MAGIC = b"ftops cubin\n"
_LOCK = threading.Lock()
_RESOLVED: dict[tuple, Any] = {}


@dataclass(frozen=True)
class Spec:
    """A kernel to be: `make(config)` returns the Python function, the rest is how it is compiled and launched.

    signature: one letter a parameter: p = pointer, i = int32, u = uint32, l = int64, f = float32, t = tensor map (128 bytes, first of all).
    threads: of a block, the launch bound. shared_bytes: dynamic shared memory, up to 227 KiB. min_blocks: resident blocks per
    multiprocessor that registers must allow. cluster: blocks of a cluster (sm_90 and up).
    dependent: programmatic dependent launch, where the GPU has it (sm_90 and up): the kernel may start before the one before it has ended,
    and calls `ptx.wait_for_primary` before it touches what others write.
    spills: bytes of spills that are known, and why beside the Config. only: the one architecture whose instructions it uses, or None.
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

    @property
    def name(self) -> str:
        return f"{self.make.__module__.rpartition('.')[2]}.{self.make.__name__.lstrip('_')}[{self.config}]"


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel for one architecture, with what the linker said of it."""

    code: bytes = field(repr=False)
    entry: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    warnings: tuple[str, ...]


def cubin(spec: Spec, arch: str) -> Cubin:
    """The machine code of `spec` for `arch` ("sm_80", "sm_90a", ...): from the disk cache, or compiled and put there.

    Raises RuntimeError when the CUDA compiler libraries are missing (pip install "ftops[cu13]").
    """
    return cubins(spec, (arch,))[0]


def cubins(spec: Spec, arches: Sequence[str]) -> list[Cubin]:
    """`cubin` for each of `arches`, in ascending order; several together cost little more than one."""
    paths = {arch: cache_folder() / f"{_key(spec, arch)}.cubin" for arch in arches}
    made = {arch: _read(path) for arch, path in paths.items()}
    for new in compile_spec(spec, [arch for arch in arches if made[arch] is None]):
        made[new.arch] = new
        _write(paths[new.arch], new)
    return [made[arch] for arch in arches]


def compile_spec(spec: Spec, arches: Sequence[str]) -> Iterator[Cubin]:
    """Compiles without looking at the disk cache. Numba, the longest part, works once for all architectures.

    LTO-IR of one architecture is linked for those after it, which gives the same machine code byte for byte, up to where a PTX text would
    be another.
    """
    modules, until = _llvm_ir(spec) if arches else [], 0.0
    for arch in arches:
        capability, suffix = re.fullmatch(r"sm_(\d+)([af]?)", arch).groups()
        if int(capability) >= until:
            ltoir, until = _lto_ir(modules, int(capability), suffix if spec.only else "")
        yield _link(spec, ltoir, arch)


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


def _llvm_ir(spec: Spec) -> list[str]:
    """The kernel and the device functions that it calls, with the PTX texts of every architecture."""
    problem = compiler_problem()
    if problem:
        raise RuntimeError(f"compiling {spec.name}: {problem}")
    from numba.cuda import compiler, types
    letters = {"p": types.uint64, "i": types.int32, "u": types.uint32, "l": types.int64, "f": types.float32,
               "t": types.CPointer(types.UniTuple(types.uint64, 16))}
    with _LOCK, _numba():
        library, _ = compiler._compile_pyfunc_with_fixup(  # cuda.compile without NVVM
            spec.make(spec.config), types.void(*(letters[c] for c in spec.signature)), device=False, abi="numba", cc=OLDEST, lto=True,
            launch_bounds=(spec.threads, spec.min_blocks))
        return library.llvm_strs


@contextmanager
def _numba() -> Iterator[None]:
    """Numba without a GPU, and in half of the time.

    It asks the current device for its capability when it meets a nested device function; what it writes does not depend on the answer.
    At each use of an operator it goes through all that the operator means for arrays, text, sets, ...; here once for the same types.
    Two passes look for comprehensions, closures and array expressions, and analyse the whole function anew when they have found none.
    It keeps most of what it makes until it ends: until then, garbage is not looked for.
    """
    from numba.cuda import dispatcher, types
    from numba.cuda.compiler import CUDACompiler
    ask, resolve, pipelines = dispatcher.get_current_device, types.BaseFunction.get_call_type, CUDACompiler.define_pipelines
    collects = gc.isenabled()

    def resolve_once(function: types.Function, context: object, args: tuple, kws: dict) -> object:
        key = function, context, args, tuple(kws.items())
        if key not in _RESOLVED:
            _RESOLVED[key] = resolve(function, context, args, kws)
        return _RESOLVED[key]

    def needed(compiler: CUDACompiler) -> list:
        (pipeline,) = pipelines(compiler)
        pipeline.passes = [step for step in pipeline.passes if step[0].name() not in ("inline_closure_likes", "nopython_rewrites")]
        return [pipeline]

    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=OLDEST)
    types.BaseFunction.get_call_type, CUDACompiler.define_pipelines = resolve_once, needed
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        dispatcher.get_current_device, types.BaseFunction.get_call_type, CUDACompiler.define_pipelines = ask, resolve, pipelines


def _lto_ir(modules: list[str], capability: int, suffix: str) -> tuple[bytes, float]:
    """(LTO-IR, the capability up to which it serves)."""
    from numba.cuda.cudadrv import nvvm

    from ftops.numba_kernels import ptx
    texts, ends = zip(*(ptx.for_target(module, capability) for module in modules), strict=True)
    with _LOCK:
        return nvvm.compile_ir(texts, opt=3, arch=f"compute_{capability}{suffix}", gen_lto=None), min(ends)


def _link(spec: Spec, ltoir: bytes, arch: str) -> Cubin:
    from cuda.bindings import nvjitlink
    options = [f"-arch={arch}", "-lto", "-verbose"]
    link = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(link, nvjitlink.InputType.LTOIR, ltoir, len(ltoir), spec.make.__name__)
        nvjitlink.complete(link)
        log = bytearray(nvjitlink.get_info_log_size(link))
        nvjitlink.get_info_log(link, log)
        code = bytearray(nvjitlink.get_linked_cubin_size(link))
        nvjitlink.get_linked_cubin(link, code)
    finally:
        nvjitlink.destroy(link)
    text = log.decode(errors="replace")
    return Cubin(code=bytes(code), entry=code[code.index(b".text.") + 6:].split(b"\0")[0].decode(), arch=arch,
                 registers=_number(r"(\d+) registers", text), spill_bytes=_number(r"(\d+) bytes spill stores", text) +
                 _number(r"(\d+) bytes spill loads", text), stack_bytes=_number(r"(\d+) bytes stack frame", text),
                 warnings=tuple(line.strip() for line in text.splitlines() if re.search(r"C75\d\d|warning", line)))


def _number(pattern: str, text: str) -> int:
    return max((int(n) for n in re.findall(pattern, text)), default=0)


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
    ours = re.compile(r"(numba|numba-cuda|llvmlite|cuda-bindings|nvidia-(nvvm|nvjitlink|cuda-nvcc).*)$")
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
