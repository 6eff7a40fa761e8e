"""What the tests of the patcher compare: a model's logits, and everything about it that patching may not change."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.accuracy import assert_accurate
from tests.families.tiny import prompt


def logits(model: PreTrainedModel, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    ids = prompt()[0] if ids is None else ids
    device = "cpu" if model.device.type == "meta" else model.device  # offloaded, and run on the CPU
    with torch.inference_mode():
        return model(ids.to(device), **options).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the order of sums, which is all that another way to compute the same may change."""
    assert_accurate(ours, theirs.double(), theirs + 1e-5 * theirs.abs().max())


def makeup(model: nn.Module) -> dict[str, object]:
    """Modules by path with their class, attributes and hooks; parameters and buffers by identity; attention implementations."""
    seen: dict[str, object] = {}
    for path, module in model.named_modules():
        hooks = [len(value) for name, value in module.__dict__.items() if name.endswith("_hooks")]
        seen[path] = (type(module), set(module.__dict__), hooks)
        if isinstance(module, PreTrainedModel):
            seen[f"{path} attention"] = module.config._attn_implementation
    for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        seen[path] = (id(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_contiguous())
    return seen


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_values(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


def fallen(model: nn.Module) -> dict[str, int]:
    """Fallbacks of all modules, by reason."""
    import ftops
    counts: dict[str, int] = {}
    for row in ftops.report(model):
        for reason, count in row.fallbacks:
            counts[reason] = counts.get(reason, 0) + count
    return counts
