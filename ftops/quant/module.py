"""Modules that hold a quantised weight, in place of nn.Linear and nn.Embedding."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ftops.op import DTYPES
from ftops.quant import FORMATS, QuantizedWeight


class Quantized(nn.Module):
    """The tensors of a QuantizedWeight as buffers of their own names. `transposed`: it stood for a weight that is kept [K, N]."""

    def __init__(self, qw: QuantizedWeight, transposed: bool = False) -> None:
        super().__init__()
        self.format, self.shape, self.metadata, self.transposed = qw.format, qw.shape, dict(qw.metadata), transposed
        self.names = tuple(qw.tensors)
        for name, tensor in qw.tensors.items():
            self.register_buffer(name, tensor)

    @property
    def qw(self) -> QuantizedWeight:
        """The weight as it is now: its tensors are the module's own."""
        return QuantizedWeight(self.format, self.shape, {name: self._buffers[name] for name in self.names}, self.metadata)

    @property
    def weight(self) -> torch.Tensor:
        """The weight that it stands for, made anew each time, for code that looks at it."""
        weight = FORMATS[self.format].dequantize(self.qw)
        return weight.t() if self.transposed else weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Quantized:
        """`.to()` and the like: everything moves, and what has the weight's dtype takes the new one; nothing else is converted."""
        held = {name: self._buffers.pop(name) for name in self.names}
        super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=self.qw_dtype, device=next(iter(held.values())).device)).dtype
        for name, tensor in held.items():
            if name in FORMATS[self.format].LAYOUT.of_dtype:
                self._buffers[name] = fn(tensor)
            else:
                self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        if dtype in DTYPES:
            self.metadata["dtype"] = str(dtype)[6:]
        return self

    @property
    def qw_dtype(self) -> torch.dtype:
        return getattr(torch, str(self.metadata["dtype"]))

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.qw.name}"


class QuantizedLinear(Quantized):
    """y = x W^T + bias with a quantised W[out_features, in_features]. Differentiable in x and bias, by way of the whole weight."""

    def __init__(self, qw: QuantizedWeight, bias: nn.Parameter | None = None, transposed: bool = False) -> None:
        super().__init__(qw, transposed)
        self.out_features, self.in_features = qw.shape
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if grad or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, FORMATS[self.format].dequantize(self.qw), bias)
        return FORMATS[self.format].linear(x, self.qw, bias)


class QuantizedEmbedding(Quantized):
    """Rows of a weight [words, N] in a format that keeps them as rows, with a scale each: int8 or fp8."""

    FORMATS = ("int8", "fp8")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows, scales = F.embedding(ids, self.values.view(torch.uint8)).view(self.values.dtype), F.embedding(ids, self.scales.unsqueeze(-1))
        return (rows[..., : self.shape[1]].float() * scales).to(self.qw_dtype)
