"""A step that launches more than it needs: every operator of a layer of a decode step is one of ours, and they are few."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ftops
from ftops.integrations.transformers.decoder import CausalDecoder
from ftops.integrations.transformers.layer import FusedLayer
from tests.families.tiny import prompt, tiny

MOST = 8
VIEWS = {"chunk", "view", "_unsafe_view", "transpose", "split_with_sizes", "flatten", "alias", "slice", "unsqueeze", "expand", "t",
         "as_strided", "detach"}


class Seen(TorchDispatchMode):
    """The operators that are called, without views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = func.name()
        if name.partition("::")[2].partition(".")[0] not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gptj", "gpt2"])
@torch.inference_mode()
def test_operators_of_a_layer(family, quant, monkeypatch):
    """norm, QKV, rotary with norms and the write to the cache, attention, output, norm with the sum, gate and up with activation, down."""
    model = ftops.patch(tiny(family), quant=quant)
    ids = prompt(batch=2, length=5)[0]
    decoder = CausalDecoder(model, 2, 16, True)
    decoder.prefill(ids, None, None)
    original, seen = FusedLayer.forward, []

    def watched(self, *args, **kwargs):
        with Seen() as mode:
            out = original(self, *args, **kwargs)
        seen.append(mode.names)
        return out

    for kind in {type(module) for module in model.modules() if isinstance(module, FusedLayer)}:
        monkeypatch.setattr(kind, "forward", watched, raising=False)
    decoder.step(ids[:, -1:])
    assert len(seen) == model.config.num_hidden_layers
    for names in seen:
        assert all(name.startswith("ftops::") for name in names), names
        assert 7 <= len(names) <= MOST, names
