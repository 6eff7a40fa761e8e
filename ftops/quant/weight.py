"""A quantised weight, whatever its format: named tensors, and what is needed to read them."""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ftops.op import DTYPES, invalid


@dataclass(frozen=True)
class QuantizedWeight:
    """format: a name in ftops.quant.FORMATS; shape: (N, K) of the weight it stands for.

    metadata: plain strings and numbers, kept in a file beside the tensors; "dtype" is that of the weight, without "torch.".
    """

    format: str
    shape: tuple[int, int]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str | int] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, str(self.metadata["dtype"]))

    @property
    def name(self) -> str:
        """int8, or int4 g128: the format, and how many values of k share a scale if not all of a row."""
        return f"{self.format} g{self.metadata['group_size']}" if "group_size" in self.metadata else self.format

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> QuantizedWeight:
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Layout:
    """How a format's tensors hang together.

    rows: of the weight, in multiples of which weights are cut and joined. of_dtype: the tensors that have the weight's dtype. whole: those
    that belong to the columns, and are the same for all rows.
    """

    rows: int = 1
    of_dtype: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


def check_weight(format: str, weight: torch.Tensor) -> None:
    """What every format asks of a weight that it is to quantise."""
    if weight.dim() != 2 or not weight.numel():
        raise invalid(format, "weight.shape", tuple(weight.shape), "[N, K], neither 0")
    if weight.dtype not in DTYPES:
        raise invalid(format, "weight.dtype", weight.dtype, "float32, float16, bfloat16")
    if not weight.isfinite().all():
        raise invalid(format, "weight", "not finite everywhere", "finite values: infinities and NaN have no nearest integer")


def check_format(format: str, qw: QuantizedWeight) -> None:
    if qw.format != format:
        raise invalid(format, "qw.format", repr(qw.format), f"{format!r}; use ftops.quant.FORMATS[qw.format]")


def cut(qw: QuantizedWeight, dim: int, index: int, count: int, multiple: int) -> QuantizedWeight:
    """Shard `index` of `count` along dim 0 (rows, N) or 1 (columns, K): slices of the packed tensors, without repacking."""
    if dim not in (0, 1):
        raise invalid(qw.format, "dim", dim, "0 (rows, N) or 1 (columns, K)")
    size = qw.shape[dim]
    if not 0 <= index < count:
        raise invalid(qw.format, "index", index, f"0 to {count - 1}, a shard of {count}")
    if size % (count * multiple):
        raise invalid(qw.format, "shape", qw.shape, f"shards along dim {dim} of a multiple of {multiple}: {size} / {count} is none")
    tensors = {}
    for name, tensor in qw.tensors.items():
        whole = dim == 1 and tensor.dim() == 1  # one scale a row serves every shard of the columns
        tensors[name] = tensor if whole else tensor.chunk(count, dim)[index].contiguous()
    shape = (size // count, qw.shape[1]) if dim == 0 else (qw.shape[0], size // count)
    return replace(qw, shape=shape, tensors=tensors)
