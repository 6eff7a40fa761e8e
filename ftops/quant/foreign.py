"""Readers of weights that others quantised, into int4 bit for bit: nothing is rounded again.

gptq (Frantar et al., "GPTQ", 2022, as AutoGPTQ and GPTQModel write it): qweight int32 [K/8, N], value k of a column at bit 4 (k % 8);
qzeros int32 [groups, N/8], zero points likewise along N, less one (checkpoint_format gptq) or as they are (gptq_v2); scales [groups, N];
g_idx [K], the group of each k. awq (Lin et al., "AWQ", 2023, version gemm): qweight int32 [K, N/8], qzeros int32 [groups, N/8], with
columns 0 2 4 6 1 3 5 7 of eight from the lowest bits up; scales [groups, N].
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ftops.op import invalid
from ftops.quant import int4
from ftops.quant.weight import QuantizedWeight

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def from_gptq(tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> QuantizedWeight:
    """Of one layer's qweight, qzeros, scales and, if it is there, g_idx; options are the checkpoint's. Raises ValueError."""
    _check("gptq", tensors, options)
    q = _unpacked(tensors["qweight"].t()).to(torch.uint8)
    zeros = _unpacked(tensors["qzeros"])
    if options.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & 15
    qw = _weight("gptq", q, zeros, tensors["scales"], options)
    groups = tensors.get("g_idx")
    size = q.shape[1] if options["group_size"] == -1 else options["group_size"]
    if groups is not None and not torch.equal(groups.long(), torch.arange(q.shape[1], device=groups.device) // size):
        raise invalid("gptq", "g_idx", "in another order than the columns (desc_act=True)", "groups of neighbouring columns; quantise the "
                      "original with ftops.quantize")
    return qw


def from_awq(tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> QuantizedWeight:
    """Of one layer's qweight, qzeros and scales; options are the checkpoint's. Raises ValueError."""
    _check("awq", tensors, options)
    version = str(options.get("version") or options.get("format") or "gemm").lower()
    if version != "gemm":
        raise invalid("awq", "version", repr(version), "'gemm'")
    place = torch.argsort(torch.tensor(AWQ_ORDER))  # the nibble of each column

    def columns(words: torch.Tensor) -> torch.Tensor:
        return _unpacked(words).unflatten(1, (-1, 8))[..., place].flatten(1)

    q = columns(tensors["qweight"]).t().to(torch.uint8).contiguous()
    return _weight("awq", q, columns(tensors["qzeros"]), tensors["scales"], options)


FOREIGN: dict[str, Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], QuantizedWeight]] = {"gptq": from_gptq, "awq": from_awq}


def _check(name: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> None:
    if options.get("bits", options.get("w_bit", 4)) != 4:
        raise invalid(name, "bits", options.get("bits", options.get("w_bit")), "4")
    if options.get("group_size") not in (-1, *int4.GROUP_SIZES):
        raise invalid(name, "group_size", options.get("group_size"), "32, 64, 128 or -1 (a whole column)")
    for part in ("qweight", "qzeros", "scales"):
        if part not in tensors:
            raise invalid(name, part, "missing", "qweight, qzeros and scales")
        if tensors[part].dim() != 2 or (part != "scales" and tensors[part].dtype is not torch.int32):
            raise invalid(name, part, f"{tensors[part].dtype} {tuple(tensors[part].shape)}", "two dimensions, int32 but for scales")


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, n] -> int32 0 .. 15 [rows, 8 n], from the lowest bits up."""
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)) & 15).flatten(1)


def _weight(name: str, q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, options: Mapping[str, Any]) -> QuantizedWeight:
    N, K = q.shape
    whole = options["group_size"] == -1
    size = 128 if whole else options["group_size"]
    groups = 1 if whole else -(-K // size)
    if scales.shape != (groups, N) or zeros.shape != (groups, N):
        raise invalid(name, "scales, qzeros", f"{tuple(scales.shape)}, {tuple(zeros.shape)} of values", f"({groups}, {N}) each, since "
                      f"qweight is that of a weight {N} x {K} in groups of {options['group_size']}")
    if whole:
        scales, zeros = (part.expand(-(-K // size), -1) for part in (scales, zeros))
    symmetric = bool(options.get("sym") or options.get("zero_point") is False) and bool((zeros == 8).all())
    return int4.from_values(q, scales.t(), None if symmetric else zeros.t().to(scales.dtype), size)
