"""What can compute a linear on this GPU, by name, for `ftops tune`: our kernels' configurations, and PyTorch's product ("library").

Each takes x[rows, K] and the weight's tensors as the op does. The first is what is taken where nothing was measured.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftops.ops import op_module
from ftops.packing import PIECE_K

Run = Callable[..., torch.Tensor]
Offer = Callable[..., tuple[str, dict[str, Run]]]  # (x, *weight) -> (name of the problem, candidates)
FAR = 4  # times as many rows as are taken unmeasured are measured of a kernel for few


def measured_rows() -> tuple[int, ...]:
    """Rows of x that are measured."""
    from ftops.numba_kernels.tuned import ROWS
    return ROWS


def keep(device: int, winners: dict[str, dict[int, str]]) -> Path:
    """Writes the names of winners, by problem and rows, for later processes. Raises OSError."""
    from ftops.numba_kernels import tuned
    return tuned.keep(device, winners)


def known(device: int) -> tuple[Path, int]:
    """The file of winners for this GPU, and how many weights it knows."""
    from ftops.numba_kernels import tuned
    return tuned.known(device)


def of_linear(x: torch.Tensor, weight: torch.Tensor) -> tuple[str, dict[str, Run]]:
    return _of_rows("linear", x, weight, lambda x, weight: op_module("linear").library(x, weight, None, None, None))


def of_linear_w8a16(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> tuple[str, dict[str, Run]]:
    def library(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        dense = op_module("linear_w8a16").dequantise(values, scales, x.shape[-1], x.dtype)
        return op_module("linear").library(x, dense, None, None, None)

    return _of_rows("linear_w8a16", x, values, library)


def of_linear_fp8(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> tuple[str, dict[str, Run]]:
    """Few rows are not offered the library, nor more rows kernels of 16 bits: to round x to eight bits or not is another result."""
    op = op_module("linear_fp8")
    if len(x) <= op.MAX_ROWS:
        return _of_rows("linear_fp8", x, values, None)
    able = op.multiplies_fp8(x.device) and not (values.shape[0] | values.shape[1]) % 16
    return _of_narrow(x, values, op.make_narrow_library() if able else None)


def of_linear_w8a8(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> tuple[str, dict[str, Run]]:
    """Few rows are multiplied as linear_w8a16 does. Of a weight without `smooth`, which is divided by before."""
    op = op_module("linear_w8a8")
    if len(x) <= op.MAX_ROWS:
        return of_linear_w8a16(x, values, scales)
    return _of_narrow(x, values, None if (values.shape[0] | values.shape[1]) % 16 else op.make_narrow_library())


def of_linear_w4a16(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int) -> tuple[str, dict[str, Run]]:
    from ftops.numba_kernels import linear_sm90_launch as hopper
    from ftops.numba_kernels import linear_w4a16 as kernel
    from ftops.numba_kernels import tuned
    from ftops.numba_kernels.dequantise import launch as dequantise
    most, group_size, dtype = op_module("linear_w4a16").MAX_ROWS, PIECE_K * packed.shape[1] // scales.shape[1], str(x.dtype)[6:]
    few: dict[str, Run] = {}
    if len(x) <= FAR * most:
        few = {name: partial(_w4a16, kernel.launch, config=config)
               for name, config in _fitting(kernel.candidates(dtype, len(x), group_size), x.device).items()}
    many = {name: partial(_w4a16, hopper.launch_w4a16, picked=picked)
            for name, picked in _on_hopper("int4", x, features, x.shape[-1]).items()}

    def library(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int) -> torch.Tensor:
        return op_module("linear").library(x, dequantise(packed, scales, features, x.shape[-1]), None, None, None)

    return (tuned.problem(tuned.op_of("int4", group_size), x.dtype, features, x.shape[-1]),
            _ordered("int4", few, many, library, len(x), most))


OF_FORMAT: dict[str | None, Offer] = {None: of_linear, "int8": of_linear_w8a16, "fp8": of_linear_fp8, "int4": of_linear_w4a16,
                                      "w8a8": of_linear_w8a8}
_EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "w8a8": torch.int8}


def as_multiplied(format: str | None, x: torch.Tensor, rows: int) -> torch.Tensor:
    """x, some of `rows` rows, as the op of the format multiplies it, in float32."""
    if format not in _EIGHT_BITS or rows <= op_module(f"linear_{format}").MAX_ROWS:
        return x.float()
    from ftops.numba_kernels.quantise_rows import launch as quantise
    values, scales = quantise(x, _EIGHT_BITS[format], None)
    return values[:, :x.shape[1]].float() * scales.unsqueeze(1)


def _of_rows(op: str, x: torch.Tensor, weight: torch.Tensor, library: Run | None) -> tuple[str, dict[str, Run]]:
    """Of weights that lie row by row."""
    from ftops.numba_kernels import linear as kernel
    from ftops.numba_kernels import linear_sm90_launch as hopper
    from ftops.numba_kernels import tuned
    from ftops.numba_kernels.linear_tile import kind_of
    most, kind = op_module(op).MAX_ROWS, kind_of(weight.dtype)
    few: dict[str, Run] = {}
    many: dict[str, Run] = {}
    if len(x) <= FAR * most and kernel.serves(x, weight, None):
        few = {name: partial(_rows, kernel.launch, config=config)
               for name, config in _fitting(kernel.candidates(kind, str(x.dtype)[6:], len(x)), x.device).items()}
    if hopper.can_serve(x, weight):
        many = {name: partial(_rows, hopper.launch, picked=picked)
                for name, picked in _on_hopper(kind, x, weight.shape[0], x.shape[1]).items()}
    return tuned.problem(tuned.op_of(kind), x.dtype, *weight.shape), _ordered(kind, few, many, library, len(x), most)


def _of_narrow(x: torch.Tensor, weight: torch.Tensor, library: Run | None) -> tuple[str, dict[str, Run]]:
    """Of more rows than are multiplied as they are, which are rounded to the weight's eight bits."""
    from ftops.numba_kernels import linear_sm90_launch as hopper
    from ftops.numba_kernels import tuned
    from ftops.numba_kernels.linear_tile import kind_of
    kind = f"{kind_of(weight.dtype)}_{kind_of(weight.dtype)}"
    many: dict[str, Run] = {}
    if hopper.can_serve(x, weight):
        narrow = op_module("linear").make_narrow(weight.dtype)
        many = {name: partial(_without_smooth, narrow, picked=picked)
                for name, picked in _on_hopper(kind, x, weight.shape[0], x.shape[1]).items()}
    others = library and partial(_without_smooth, library)
    return tuned.problem(tuned.op_of(kind), x.dtype, *weight.shape), _ordered(kind, {}, many, others, len(x), 0)


def _rows(launch: Run, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None, **picked: Any) -> torch.Tensor:
    return launch(x, weight, scales, None, None, None, **picked)


def _w4a16(launch: Run, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int, **picked: Any) -> torch.Tensor:
    return launch(x, packed, scales, features, None, None, None, **picked)


def _without_smooth(narrow: Run, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, **picked: Any) -> torch.Tensor:
    return narrow(x, None, values, scales, None, None, None, **picked)


def _fitting(candidates: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Those of a kernel for few rows whose shared memory a block can have, with a norm too; 99 KiB on some GPUs, 227 on others."""
    most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return {name: config for name, config in candidates.items() if replace(config, normed=True).shared_bytes <= most}


def _on_hopper(kind: str, x: torch.Tensor, N: int, K: int) -> dict[str, Any]:
    from ftops.numba_kernels import linear_sm90_launch as hopper
    from ftops.numba_kernels.launch import capability
    if capability(x.device.index) != (9, 0):
        return {}
    return hopper.candidates(kind, str(x.dtype)[6:], len(x), N, K, x.device.index)


def _ordered(kind: str, few: dict[str, Run], many: dict[str, Run], library: Run | None, rows: int, most: int) -> dict[str, Run]:
    """First those of which one is taken unmeasured, as the ops ask."""
    from ftops.numba_kernels.linear_sm90_config import FROM_ROWS
    from ftops.numba_kernels.tuned import LIBRARY
    others = {} if library is None else {LIBRARY: library}
    if few and rows <= most:
        return {**few, **many, **others}
    if many and rows >= FROM_ROWS[kind]:
        return {**many, **few, **others}
    return {**others, **few, **many}
