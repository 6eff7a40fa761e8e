"""report: what `patch` wrote on the modules, read back."""
from __future__ import annotations

import re
from collections import Counter

from torch import nn

from ftops.integrations.transformers.decoder import cache_dtype
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.transformers.leaves import FusedNorm
from ftops.quant.module import Quantized, QuantizedLinear
from ftops.report import Report, Row

REGISTRY = "ops.attention, through transformers' registry"


def report(model: nn.Module) -> Report:
    """See `ftops.report`."""
    check_model("report", model)
    done = model.__dict__.get("_ftops_plan")
    kept = {step.path: step for step in done.steps if step.swap is None} if done else {}
    rows, families, inside, alike = [], [], None, {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, FusedLayer):
            families.append(module._ftops.arch.name)
            inside = f"{path}." if path else ""
            rows.append(Row(path, kind, f"ftops block ({families[-1]})", module._ftops.reason or "", _counts(module._ftops.fallbacks),
                            *_quantised(module)))
        elif isinstance(module, Quantized) and (inside is None or not path.startswith(inside)):
            alike.setdefault((re.sub(r"\b\d+\b", "*", path), module.qw.name), (len(rows), []))[1].append(module)
        elif isinstance(module, FusedNorm):
            rows.append(Row(path, kind, f"ops.{module._ftops.op}", "", _counts(module._ftops.fallbacks)))
        elif "_ftops_attention" in module.__dict__:
            rows.append(Row(path, kind, REGISTRY, "", _counts(module._ftops_attention.fallbacks)))
        elif path in kept:
            rows.append(Row(path, kind, None, kept[path].reason))
    for (path, _), (place, modules) in reversed(alike.items()):
        count = f" ({len(modules)})" if len(modules) > 1 else ""
        kind = type(modules[0])
        rows.insert(place, Row(path + count, kind.__name__, "quantised " + ("linear" if kind is QuantizedLinear else "embedding"), "", (),
                               *_quantised(*modules)))
    cache = cache_dtype(model)
    return Report(type(model).__name__, families[0] if families else None, tuple(rows), None if cache is None else str(cache)[6:])


def _quantised(*modules: nn.Module) -> tuple[str, tuple[int, int]]:
    """The formats of the quantised weights in the modules, and their bytes before and after."""
    weights = [part.qw for module in modules for part in module.modules() if isinstance(part, Quantized)]
    before = sum(qw.shape[0] * qw.shape[1] * qw.dtype.itemsize for qw in weights)
    return " and ".join(sorted({qw.name for qw in weights})), (before, sum(qw.nbytes for qw in weights))


def _counts(fallbacks: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(fallbacks.items()))


def check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}; pass a torch.nn.Module, "
                        "such as AutoModelForCausalLM.from_pretrained gives")
