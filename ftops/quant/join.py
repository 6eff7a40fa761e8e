"""Weights that lie one after the other as one, without a second copy: the parts become slices of the whole."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ftops.quant import FORMATS, QuantizedWeight


def check_join(parts: Sequence[QuantizedWeight]) -> None:
    """Raises ValueError with the reason if the parts cannot be one weight."""
    if len(parts) < 2:
        return
    first = parts[0]
    layout = FORMATS[first.format].LAYOUT
    if len({part.format for part in parts}) > 1:
        raise ValueError(f"their formats differ: {', '.join(sorted({part.format for part in parts}))}")
    if any(_options(part) != _options(first) for part in parts):
        raise ValueError(f"their options of {first.format} differ")
    if any(part.shape[0] % layout.rows for part in parts[:-1]):
        raise ValueError(f"{first.format} joins rows in multiples of {layout.rows}, not {' + '.join(str(p.shape[0]) for p in parts)}")
    for name in layout.whole:
        if any(not torch.equal(part.tensors[name], first.tensors[name]) for part in parts if name in part.tensors):
            raise ValueError(f"their {name} differ")


def _options(part: QuantizedWeight) -> tuple[object, ...]:
    """What is the same for all rows of a weight."""
    return part.metadata, part.shape[1], {name: tensor.shape[1:] for name, tensor in part.tensors.items()}


def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of all parts, which `check_join` allows, one after the other; the parts' tensors become slices of the whole's."""
    first = parts[0]
    if len(parts) == 1:
        return first
    whole = FORMATS[first.format].LAYOUT.whole
    tensors = {name: tensor if name in whole else fuse([part.tensors[name] for part in parts]) for name, tensor in first.tensors.items()}
    return replace(first, shape=(sum(part.shape[0] for part in parts), first.shape[1]), tensors=tensors)


def fuse(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all tensors as one, whose slices they become. Does nothing if they already lie one after the other."""
    first = tensors[0].data
    if len(tensors) == 1:
        return first
    if not _adjacent(tensors):
        fused = torch.cat([tensor.data for tensor in tensors])
        for tensor, rows in zip(tensors, fused.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = rows
        return fused
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _adjacent(tensors: Sequence[torch.Tensor]) -> bool:
    storage, end = tensors[0].untyped_storage().data_ptr(), tensors[0].storage_offset()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.storage_offset() != end or tensor.untyped_storage().data_ptr() != storage:
            return False
        end += tensor.numel()
    return True
