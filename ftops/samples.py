"""Random inputs for the `cases()` of the ops."""
from __future__ import annotations

from collections.abc import Sequence

import torch


def randn(shape: Sequence[int], device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values from the CPU generator, so that a seed gives the same sample on every device."""
    return (torch.randn(tuple(shape)) * scale).to(device=device, dtype=dtype)


def integers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """An int32 tensor of `values`."""
    return torch.tensor(list(values), dtype=torch.int32, device=device)
