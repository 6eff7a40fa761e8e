"""What can compute a linear on this GPU, by name, for `ftops tune`: our kernels' configurations, and PyTorch's product ("library").

Each takes x[rows, K] and the weight's tensors as the op does. The first is what is taken where nothing was measured.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftops.ops import op_module
from ftops.packing import PIECE_K

Run = Callable[..., torch.Tensor]
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
    """(name of the problem, candidates) of ops.linear."""
    module = op_module("linear")
    return _few_rows(x, weight, module.MAX_ROWS, FAR * module.MAX_ROWS, lambda x, weight: module.library(x, weight, None, None, None))


def of_linear_w8a16(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> tuple[str, dict[str, Run]]:
    module = op_module("linear_w8a16")
    return _few_rows(x, values, module.MAX_ROWS, FAR * module.MAX_ROWS, partial(_written_out, module))


def of_linear_fp8(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> tuple[str, dict[str, Run]]:
    """Of more rows there is nothing to choose: they are rounded to eight bits, which is another result."""
    module = op_module("linear_fp8")
    name, found = _few_rows(x, values, module.MAX_ROWS, module.MAX_ROWS, partial(_written_out, module))
    return name, found if len(x) <= module.MAX_ROWS else {}


def of_linear_w4a16(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int) -> tuple[str, dict[str, Run]]:
    from ftops.numba_kernels import linear_w4a16 as kernel
    from ftops.numba_kernels import tuned
    from ftops.numba_kernels.dequantise import launch as dequantise
    module, group_size = op_module("linear_w4a16"), PIECE_K * packed.shape[1] // scales.shape[1]
    ours = {}
    if len(x) <= FAR * module.MAX_ROWS:
        ours = {tuned.name_of("linear_w4a16", config): partial(_int4, kernel, config)
                for config in _fitting(kernel.candidates(str(x.dtype)[6:], len(x), group_size), x.device)}

    def library(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int) -> torch.Tensor:
        return op_module("linear").library(x, dequantise(packed, scales, features, x.shape[-1]), None, None, None)

    return (tuned.problem(kernel.op_of(group_size), x.dtype, features, x.shape[-1]),
            _ordered(ours, library, len(x) <= module.MAX_ROWS))


OF_FORMAT: dict[str | None, Callable[..., tuple[str, dict[str, Run]]]] = {
    None: of_linear, "int8": of_linear_w8a16, "fp8": of_linear_fp8, "int4": of_linear_w4a16}


def _few_rows(x: torch.Tensor, weight: torch.Tensor, most: int, far: int, library: Run) -> tuple[str, dict[str, Run]]:
    from ftops.numba_kernels import linear as kernel
    from ftops.numba_kernels import tuned
    kind, ours = kernel.KINDS.get(weight.dtype, "16-bit"), {}
    if len(x) <= far and kernel.serves(x, weight, None):
        ours = {tuned.name_of("linear", config): partial(_launched, kernel, config)
                for config in _fitting(kernel.candidates(kind, str(x.dtype)[6:], len(x)), x.device)}
    return tuned.problem(kernel.OPS[kind], x.dtype, *weight.shape), _ordered(ours, library, len(x) <= most)


def _launched(kernel: Any, config: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    return kernel.launch(x, weight, scales, None, None, None, config=config)


def _int4(kernel: Any, config: Any, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, features: int) -> torch.Tensor:
    return kernel.launch(x, packed, scales, features, None, None, None, config=config)


def _written_out(module: Any, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return op_module("linear").library(x, module.dequantise(values, scales, x.shape[-1], x.dtype), None, None, None)


def _fitting(configs: list[Any], device: torch.device) -> list[Any]:
    """Those whose shared memory a block can have; 99 KiB on some GPUs, 227 on others."""
    most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return [config for config in configs if config.shared_bytes <= most]


def _ordered(ours: dict[str, Run], library: Run, few: bool) -> dict[str, Run]:
    from ftops.numba_kernels.tuned import LIBRARY
    return {**ours, LIBRARY: library} if few else {LIBRARY: library, **ours}
