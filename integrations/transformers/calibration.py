"""SmoothQuant's calibration: what each w8a8 layer is given while the model runs on some text."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ftops.integrations.transformers.arch import follow
from ftops.integrations.transformers.archs import ARCHS
from ftops.integrations.transformers.quantized import Target
from ftops.quant.w8a8 import smoothing


def largest_inputs(model: nn.Module, found: dict[str, Target], calibration: Any) -> dict[str, torch.Tensor]:
    """The largest value of each column of what every w8a8 layer is given, [K] float32, while the model runs on `calibration`."""
    watched = {path: target.module for path, target in found.items() if target.spec.format == "w8a8"}
    if not watched:
        raise ValueError("quantize: calibration is given, and no layer is w8a8, the format that uses it; allowed: None")
    largest: dict[str, torch.Tensor] = {}

    def watch(path: str) -> RemovableHandle:
        def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            columns = inputs[0].detach().flatten(0, -2).float().abs().amax(0)
            largest[path] = torch.maximum(largest[path], columns) if path in largest else columns
        return watched[path].register_forward_pre_hook(look)

    hooks = [watch(path) for path in watched]
    try:
        with torch.inference_mode():
            for batch in _batches(calibration):
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _batches(calibration: Any) -> Iterator[dict[str, Any]]:
    for batch in (calibration,) if isinstance(calibration, (torch.Tensor, Mapping)) else calibration:
        if isinstance(batch, torch.Tensor):
            yield {"input_ids": batch}
        elif isinstance(batch, Mapping):
            yield dict(batch)
        else:
            raise ValueError(f"quantize: calibration has a {type(batch).__name__}; allowed: token ids [B,S], what a tokenizer gives "
                             "(tokenizer(text, return_tensors='pt')), or several of them")


def smoothing_scales(model: nn.Module, found: dict[str, Target], largest: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SmoothQuant's scales by path; layers that are one weight in a block have the same input and so the same scales."""
    paths, groups, grouped = {id(target.module): path for path, target in found.items()}, [], set()
    for layer in model.modules():
        arch = next((arch for arch in ARCHS.values() if arch.matches(layer)), None)
        for group in () if arch is None else (arch.qkv, arch.up):
            members = [paths[id(module)] for module in (follow(layer, path) for path in group) if id(module) in paths]
            groups.append(members)
            grouped.update(members)
    groups += [[path] for path in found if path not in grouped]
    smooth = {}
    for group in groups:
        seen = [path for path in group if path in largest]
        if seen:
            columns = torch.stack([found[path].oriented(found[path].module.weight).abs().amax(0) for path in seen])
            scales = smoothing(torch.stack([largest[path] for path in seen]).amax(0), columns)
            smooth |= dict.fromkeys(seen, scales)
    return smooth
