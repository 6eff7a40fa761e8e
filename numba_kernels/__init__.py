"""Device code and its launch. One kernel = one file; nothing here is imported before an op first runs on a GPU."""
from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftops.numba_kernels.compile import Spec

KERNELS = (
    "attention",
    "bias_activation",
    "decode_attention",
    "dequantise",
    "gated_activation",
    "layer_norm",
    "linear",
    "linear_sm90",
    "linear_w4a16",
    "quantise_rows",
    "rms_norm",
    "rotary",
    "rotary_append",
    "sample",
    "scale_product",
)


def variants_of(name: str) -> Iterator[Spec]:
    """Every variant of kernel `name`; a kernel may be made of several files."""
    return import_module(f"ftops.numba_kernels.{name}").variants()


def variants() -> Iterator[Spec]:
    """Every variant of every kernel, for the compile tests and for compiling ahead."""
    for name in KERNELS:
        yield from variants_of(name)
