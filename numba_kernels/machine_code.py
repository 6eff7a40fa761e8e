"""LLVM IR -> machine code: NVVM and nvJitLink, or the assembler behind them alone.

LTO-IR, not PTX: nvJitLink compiles PTX as if more code were to be linked, and then ignores setmaxnreg (warning C7504) and serialises
wgmma (C7509). A cubin, not PTX, is loaded, since the newest NVVM writes PTX that older drivers refuse.
"""
from __future__ import annotations

import functools
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LOCK = threading.Lock()


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


def link(modules: Sequence[str], arch: str, only: bool) -> Cubin:
    """only: this architecture's own instructions are used, such as wgmma of sm_90a."""
    return _cubin(*_linked(_lto_ir(modules, arch, only), arch), arch)


def ptx(modules: Sequence[str], arch: str, only: bool) -> str:
    """What nvJitLink hands to its assembler, texts of other architectures and dtypes still among it."""
    return _linked(_lto_ir(modules, arch, only), arch, "-ptx")[0].decode().rstrip("\0")


def assemble(text: str, arch: str, ptxas: Path) -> Cubin:
    """The machine code that nvJitLink makes of this PTX, byte for byte, as long as ptxas is of its version."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(re.sub(r"^\.target \S+$", f".target {arch}", text, count=1, flags=re.MULTILINE))
        ran = subprocess.run([ptxas, f"-arch={arch}", "-v", "-o", result, source], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"{ptxas} for {arch}: {ran.stdout}{ran.stderr}")
        return _cubin(result.read_bytes(), ran.stderr, arch)


@functools.cache
def find_ptxas() -> Path | None:
    """ptxas of nvJitLink's version (pip install "cuda-toolkit[nvcc]"), or None."""
    from cuda.bindings import nvjitlink
    from cuda.pathfinder import find_nvidia_binary_utility
    found = find_nvidia_binary_utility("ptxas")
    version = ".".join(map(str, nvjitlink.version()))
    if found and f"release {version}," in subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout:
        return Path(found)
    return None


def _lto_ir(modules: Sequence[str], arch: str, only: bool) -> bytes:
    from numba.cuda.cudadrv import nvvm
    with _LOCK:
        return nvvm.compile_ir(modules, opt=3, arch=f"compute_{arch.removeprefix('sm_') if only else re.sub('[^0-9]', '', arch)}",
                               gen_lto=None)


def _linked(ltoir: bytes, arch: str, *options: str) -> tuple[bytes, str]:
    """(cubin, or with -ptx PTX; what the linker said)."""
    from cuda.bindings import nvjitlink
    options = [f"-arch={arch}", "-lto", "-verbose", *options]
    link = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(link, nvjitlink.InputType.LTOIR, ltoir, len(ltoir), "kernel")
        nvjitlink.complete(link)
        log = bytearray(nvjitlink.get_info_log_size(link))
        nvjitlink.get_info_log(link, log)
        size, get = ((nvjitlink.get_linked_ptx_size, nvjitlink.get_linked_ptx) if "-ptx" in options else
                     (nvjitlink.get_linked_cubin_size, nvjitlink.get_linked_cubin))
        result = bytearray(size(link))
        get(link, result)
    finally:
        nvjitlink.destroy(link)
    return bytes(result), log.decode(errors="replace")


def _cubin(code: bytes, log: str, arch: str) -> Cubin:
    return Cubin(code=code, entry=code[code.index(b".text.") + 6:].split(b"\0")[0].decode(), arch=arch,
                 registers=_number(r"(\d+) registers", log), spill_bytes=_number(r"(\d+) bytes spill stores", log) +
                 _number(r"(\d+) bytes spill loads", log), stack_bytes=_number(r"(\d+) bytes stack frame", log),
                 warnings=tuple(line.strip() for line in log.splitlines() if re.search(r"C75\d\d|warning", line)))


def _number(pattern: str, text: str) -> int:
    return max((int(n) for n in re.findall(pattern, text)), default=0)
