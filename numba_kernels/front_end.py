"""Numba source -> LLVM IR: the part of compiling that is written in Python, and the longest.

Once for all architectures, and for both 16-bit dtypes where a Spec says so: what differs are texts of instructions, which the LLVM IR
carries all (ptx.py).
"""
from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftops.numba_kernels.compile import Spec

OLDEST = (8, 0)  # compute capability: packed 16-bit conversions, cp.async and mma of bfloat16 begin there
_LOCK = threading.Lock()
_RESOLVED: dict[tuple, Any] = {}
_IDLE = ("inline_closure_likes", "inline_inlinables", "inline_overloads", "nopython_rewrites")


@functools.lru_cache(maxsize=1)
def llvm_ir(spec: Spec) -> tuple[str, ...]:
    """The kernel and the device functions that it calls, with the PTX texts of every architecture."""
    from numba.cuda import compiler, types
    letters = {"p": types.uint64, "i": types.int32, "u": types.uint32, "l": types.int64, "f": types.float32,
               "t": types.CPointer(types.UniTuple(types.uint64, 16))}
    with _LOCK, _numba():
        library, _ = compiler._compile_pyfunc_with_fixup(  # cuda.compile without NVVM
            spec.make(spec.config), types.void(*(letters[c] for c in spec.signature)), device=False, abi="numba", cc=OLDEST, lto=True,
            launch_bounds=(spec.threads, spec.min_blocks))
        return tuple(library.llvm_strs)


@contextmanager
def _numba() -> Iterator[None]:
    """Numba without a GPU, and in a third of the time.

    It asks the current device for its capability when it meets a nested device function; what it writes does not depend on the answer.
    At each use of an operator it goes through all that the operator means for arrays, text, sets, ...; here once for the same types.
    Four passes look for comprehensions, closures, array expressions and what is to be inlined; two analyse the whole function anew when
    they have found none. After each of seven passes it computes how long every variable lives, for generators, `with` and reference counts;
    device code has none of these. It keeps most of what it makes until it ends: until then, garbage is not looked for.
    """
    from numba.cuda import dispatcher, types
    from numba.cuda.compiler import CUDACompiler
    from numba.cuda.core import transforms
    from numba.cuda.core.postproc import PostProcessor, VariableLifetime
    resolve, pipelines, collects = types.BaseFunction.get_call_type, CUDACompiler.define_pipelines, gc.isenabled()

    def resolve_once(function: types.Function, context: object, args: tuple, kws: dict) -> object:
        key = function, context, args, tuple(kws.items())
        if key not in _RESOLVED:
            _RESOLVED[key] = resolve(function, context, args, kws)
        return _RESOLVED[key]

    def needed(compiler: CUDACompiler) -> list:
        (pipeline,) = pipelines(compiler)
        pipeline.passes = [step for step in pipeline.passes if step[0].name() not in _IDLE]
        return [pipeline]

    def without_lifetimes(post_processor: PostProcessor, emit_dels: bool = False, extend_lifetimes: bool = False) -> None:
        function = post_processor.func_ir
        function.blocks = transforms.canonicalize_cfg(function.blocks)
        function.variable_lifetime = VariableLifetime(function.blocks)  # computed when asked for
        function.generator_info = None

    changes = {(dispatcher, "get_current_device"): lambda: SimpleNamespace(compute_capability=OLDEST),
               (types.BaseFunction, "get_call_type"): resolve_once, (CUDACompiler, "define_pipelines"): needed,
               (PostProcessor, "run"): without_lifetimes}
    originals = {place: getattr(*place) for place in changes}
    for place, ours in changes.items():
        setattr(*place, ours)
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for place, original in originals.items():
            setattr(*place, original)
