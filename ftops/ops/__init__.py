"""The ops, alone: `ftops.ops.rms_norm(x, weight, eps)`. Layout is batch, sequence, heads, head_dim throughout.

A new op is `ftops/ops/<name>.py`, `numba_kernels/<name>.py` and one line here.
"""
from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

OPS = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "gated_activation",
    "bias_activation",
    "linear",
    "linear_w4a16",
    "linear_w8a16",
    "linear_fp8",
    "linear_w8a8",
    "append_kv",
    "rotary_append",
    "attention",
    "attention_varlen",
    "attention_fp8",
    "decode_attention",
    "sample",
)


def op_module(name: str) -> ModuleType:
    """The file of op `name`: its reference, handle(s), public function and cases()."""
    return import_module(f"ftops.ops.{name}")


def kernel_file(name: str) -> str | None:
    """The file that serves op `name` on a GPU, relative to its package's folder, or None where there is none."""
    from ftops import numba_kernels
    file = Path(numba_kernels.__file__).with_name(f"{getattr(op_module(name), 'KERNEL', name)}.py")
    return f"{file.parent.name}/{file.name}" if file.is_file() else None


def kernel_cache() -> Path:
    """The folder in which compiled kernels are kept."""
    from ftops.numba_kernels.compile import cache_folder
    return cache_folder()


def oldest_capability() -> tuple[int, int]:
    """The lowest compute capability of a GPU that the kernels serve."""
    from ftops.numba_kernels.front_end import OLDEST
    return OLDEST


def compiler_problem() -> str | None:
    """Why kernels cannot be compiled here and what to do about it, or None."""
    from ftops.numba_kernels.compile import compiler_problem
    return compiler_problem()


# The function takes the place of its module as an attribute of this package, as in `ftops.ops.rms_norm(...)`.
for _name in OPS:
    globals()[_name] = getattr(op_module(_name), _name)
