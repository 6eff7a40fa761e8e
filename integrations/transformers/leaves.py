"""Norms outside of fused layers, in any model: LayerNorm, and whatever turns out, by trying it, to be an RMS norm.

As with layers, only the class of the module changes, and its own forward is the way back.
"""
from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ftops import ops
from ftops.integrations.transformers.arch import Unfit
from ftops.integrations.transformers.swap import Swapped, change_class, forward_replaced, offloaded, original_class, swapped_class
from ftops.op import DTYPES


@dataclass
class NormState:
    """op: "layer_norm", or "rms_norm" with its offset. fallbacks counts the calls that the original served, by reason."""

    op: str
    eps: float
    offset: float = 0.0
    fallbacks: Counter[str] = field(default_factory=Counter)


def is_norm(module: nn.Module) -> bool:
    """A candidate by name and shape; `examine_norm` finds out whether it is one."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not module._modules and (
        isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__ or type(module).__name__.endswith("LayerNorm"))


def examine_norm(module: nn.Module) -> NormState:
    """How the ops compute this norm. Raises Unfit with the reason. Changes nothing."""
    if offloaded(module):
        raise Unfit("accelerate offloads it")
    if forward_replaced(module):
        raise Unfit("its forward was replaced")
    if module.weight.device.type not in ("cpu", "cuda") or module.weight.dtype not in DTYPES or type(module.weight) is not nn.Parameter:
        raise Unfit(f"its weight is {module.weight.dtype} on {module.weight.device.type}")
    if type(module).forward is nn.LayerNorm.forward:
        return NormState("layer_norm", module.eps)
    parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if len(parameters) != 1 or set(module._parameters) != {"weight"} or not isinstance(eps, float):
        raise Unfit("it is neither LayerNorm nor a plain RMS norm")
    offset = next((offset for offset in (0.0, 1.0) if _computes(module, eps, offset)), None)
    if offset is None:
        raise Unfit("its values are not those of an RMS norm, with weight or with 1 + weight")
    return NormState("rms_norm", eps, offset)


@torch.no_grad()
def _computes(module: nn.Module, eps: float, offset: float) -> bool:
    """Whether the module gives, on rows of ordinary and of tiny values, what rms_norm gives."""
    weight = module.weight
    rows = torch.sin(torch.arange(3 * len(weight), device=weight.device, dtype=torch.float32)).view(3, -1)
    rows = (rows * torch.tensor([[1.0], [30.0], [eps ** 0.5]], device=weight.device)).to(weight.dtype)
    forward: Callable[..., Any] = type(module).forward
    theirs, ours = forward(module, rows), ops.rms_norm(rows, weight, eps, offset=offset)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return isinstance(theirs, torch.Tensor) and theirs.dtype is ours.dtype and torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance)


class FusedNorm(Swapped):
    """What a swapped norm does instead of, or before, the original."""

    _ftops: NormState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._ftops
        x = args[0] if len(args) == 1 and not kwargs else None
        reason = _unfit(x, self.weight)
        if reason is not None:
            if not torch.compiler.is_compiling():
                state.fallbacks[reason] += 1
            return super().forward(*args, **kwargs)
        if state.op == "layer_norm":
            return ops.layer_norm(x, self.weight, self.bias, state.eps)
        return ops.rms_norm(x, self.weight, state.eps, offset=state.offset)


def _unfit(x: torch.Tensor | None, weight: torch.Tensor) -> str | None:
    if x is None:
        return "other arguments than one tensor"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "gradients"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if x.dtype is not weight.dtype or x.dtype not in DTYPES or x.device != weight.device or x.device.type not in ("cpu", "cuda"):
        return f"x is {x.dtype} on {x.device.type}, weight {weight.dtype} on {weight.device.type}"
    return None


def swap_norm(state: NormState, module: nn.Module) -> None:
    module._ftops = state
    change_class(module, swapped_class(FusedNorm, type(module)))


def restore_norm(module: nn.Module) -> None:
    change_class(module, original_class(module))
    del module._ftops
