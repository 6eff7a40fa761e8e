"""What stands in safetensors files beside quantised weights, and what makes a file be refused.

The metadata of every file has under "ftops" a JSON object: `version`; `save`, which the files of one save share; `weights`, for every
quantised module by path its format, shape (N, K) and metadata. Its tensors lie in the files as <path>.<name>.
"""
from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ftops.quant import FORMATS, QuantizedWeight
from ftops.quant.module import Quantized

VERSION = 1
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
           "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class Stored:
    """weights: quantised modules by path, their tensors on the meta device. tensors: all tensors by name, likewise."""

    weights: dict[str, QuantizedWeight]
    tensors: dict[str, torch.Tensor]


def describe(model: nn.Module) -> str:
    """The JSON object for the files of one save of `model`."""
    weights = {path: {"format": module.format, "shape": module.shape, "metadata": module.metadata}
               for path, module in model.named_modules() if isinstance(module, Quantized)}
    return json.dumps({"version": VERSION, "save": secrets.token_hex(8), "weights": weights})


def read(files: Iterable[str | Path]) -> Stored:
    """What the files of one save hold, without their values. Raises ValueError for a damaged, foreign or mismatched file."""
    from safetensors import SafetensorError, safe_open
    tensors: dict[str, torch.Tensor] = {}
    first: tuple[str | Path, str] | None = None
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                text = (opened.metadata() or {}).get("ftops")
                for name in opened.keys():  # noqa: SIM118  it is no dict
                    piece = opened.get_slice(name)
                    tensors[name] = torch.empty(piece.get_shape(), dtype=_DTYPES.get(piece.get_dtype(), torch.float64), device="meta")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"load: {file} is damaged, cut short or no safetensors file: {error}; write or download it again") from None
        if text is None:
            raise ValueError(f"load: {file} is not of ftops: its metadata says nothing of quantised weights; "
                             "allowed: what ftops.save or save_pretrained wrote of a quantised model")
        first = first or (file, text)
        if text != first[1]:
            raise ValueError(f"load: {file} belongs to another save than {first[0]}; all files must come from one")
    if first is None:
        raise ValueError("load: there is no safetensors file")
    return Stored(_weights(*first, tensors), tensors)


def _weights(file: str | Path, text: str, tensors: dict[str, torch.Tensor]) -> dict[str, QuantizedWeight]:
    try:
        held = json.loads(text)
        version, entries = held["version"], {path: (entry["format"], tuple(entry["shape"]), entry["metadata"])
                                             for path, entry in held["weights"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"load: the metadata of {file} cannot be read; write or download it again") from None
    if version != VERSION:
        raise ValueError(f"load: {file} has version {version}; this ftops reads {VERSION}")
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if path in entries and leaf != "bias":
            by_module.setdefault(path, {})[leaf] = tensor
    weights = {path: QuantizedWeight(format, shape, by_module.get(path, {}), metadata)
               for path, (format, shape, metadata) in entries.items()}
    for path, qw in weights.items():
        _check(file, path, qw)
    return weights


def _check(file: str | Path, path: str, qw: QuantizedWeight) -> None:
    """Whether the format can read these tensors: a product on the meta device asks of them all that a real one does."""
    if qw.format not in FORMATS:
        raise ValueError(f"load: {path} in {file} is {qw.format!r}; this ftops reads {', '.join(FORMATS)}")
    written = qw.metadata.get("version")
    if written != FORMATS[qw.format].VERSION:
        raise ValueError(f"load: {path} in {file} is {qw.format} version {written}; this ftops reads {FORMATS[qw.format].VERSION}")
    N, K = qw.shape
    try:
        rows = FORMATS[qw.format].linear(torch.empty((1, K), dtype=qw.dtype, device="meta"), qw).shape[-1]
    except KeyError as missing:
        raise ValueError(f"load: {path}.{missing.args[0]} is in none of the files; write or download them again") from None
    except ValueError as error:
        raise ValueError(f"load: {path} does not hold the {N} x {K} weight that its file speaks of: {error}") from None
    if rows != N:
        raise ValueError(f"load: {path} has {rows} rows, and its file speaks of {N}")
