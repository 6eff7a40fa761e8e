"""The ops, alone: `ftops.ops.rms_norm(x, weight, eps)`. Layout is batch, sequence, heads, head_dim throughout.

A new op is `ftops/ops/<name>.py`, `numba_kernels/<name>.py` and one line here.
"""
from __future__ import annotations

from importlib import import_module
from types import ModuleType

OPS = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "gated_activation",
    "bias_activation",
    "append_kv",
    "attention",
    "attention_varlen",
    "decode_attention",
)


def op_module(name: str) -> ModuleType:
    """The file of op `name`: its reference, handle(s), public function and cases()."""
    return import_module(f"ftops.ops.{name}")


# The function takes the place of its module as an attribute of this package, as in `ftops.ops.rms_norm(...)`.
for _name in OPS:
    globals()[_name] = getattr(op_module(_name), _name)
