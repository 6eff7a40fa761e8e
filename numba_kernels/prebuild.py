"""python -m ftops.numba_kernels.prebuild [ARCH ...]: compiles every kernel variant into the disk cache, in parallel.

Without arguments: for the GPU that is there. Prints registers and spills of each kernel, and exits with 1 if one spills unannounced
or the linker serialised wgmma (C7509, or C7512 for want of registers) or ignored setmaxnreg (C7504).
"""
from __future__ import annotations

import gc
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from ftops.numba_kernels import KERNELS, variants_of
from ftops.numba_kernels.compile import Cubin, Spec, cubins
from ftops.numba_kernels.machine_code import find_ptxas


def complaints(spec: Spec, made: Cubin) -> str:
    """What is wrong with a compiled kernel, or an empty string."""
    wrong = [w for w in made.warnings if re.search(r"C75\d\d", w)]
    if made.spill_bytes > spec.spills:
        wrong.append(f"spills {made.spill_bytes} bytes, {spec.spills} are announced")
    return "; ".join(wrong)


def build_kernel(name: str, indices: list[int], arches: Sequence[str]) -> list[tuple[str, str, Cubin, str]]:
    """Compiles variants `indices` of kernel `name`: (arch, variant, cubin, what is wrong). Specs do not travel between processes."""
    specs = list(variants_of(name))
    built = [(made.arch, spec.name, made, complaints(spec, made)) for spec in (specs[index] for index in indices)
             for made in cubins(spec, [arch for arch in arches if spec.serves(arch)], find_ptxas())]
    gc.collect()
    gc.freeze()
    return built


def _start() -> None:
    """Of a worker: garbage is looked for after each job, among what that has made."""
    gc.disable()


def build_all(arches: Sequence[str], workers: int | None = None) -> Iterator[tuple[str, str, Cubin, str]]:
    """(arch, variant, cubin, what is wrong) of every kernel variant for each of `arches`, ascending, compiled in `workers` processes."""
    jobs: dict[Spec, tuple[str, list[int]]] = {}  # two halves of one source are a job
    for name in KERNELS:
        for index, spec in enumerate(variants_of(name)):
            jobs.setdefault(spec.source, (name, []))[1].append(index)
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), get_context("spawn"), initializer=_start) as pool:
        for built in pool.map(build_kernel, *zip(*jobs.values(), strict=True), itertools.repeat(arches)):
            yield from built


def main() -> int:
    arches = sys.argv[1:]
    if not arches:
        from ftops.numba_kernels.launch import architecture
        arches = [architecture(0)]
    bad = 0
    for arch, variant, made, wrong in build_all(arches):
        print(f"{arch:8} {made.registers:4} registers  {variant}  {wrong}")
        bad += bool(wrong)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
