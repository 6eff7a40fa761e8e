"""A step that launches more than it needs: every operator of a layer of a decode step is one of ours, and one launch, and they are few."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ftops
from ftops import block
from ftops.integrations.transformers.decoder import CausalDecoder
from ftops.integrations.transformers.layer import FusedLayer
from tests.families.tiny import prompt, tiny

MOST = 8
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gptj", "gpt2")
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


@contextmanager
def operators(names: list[str]) -> Iterator[None]:
    with Seen() as mode:
        yield
    names += mode.names


@contextmanager
def launches(names: list[str]) -> Iterator[None]:
    """The kernels, copies and fills that the GPU runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        yield
        torch.cuda.synchronize()
    names += [event.name.removeprefix("ftops::numba_kernels::")[:40] for event in seen.events() if event.device_type == DeviceType.CUDA]


def of_each_layer(model: torch.nn.Module, watch: Callable, capacity: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `watch` sees of every layer in the second step of a decoder, which has loaded and allocated all it needs."""
    ids = prompt(batch=2, length=5)[0].to(model.device)
    decoder = CausalDecoder(model, 2, capacity, True)
    decoder.prefill(ids, None, None)
    decoder.step(ids[:, -1:])
    original, seen = FusedLayer.forward, []

    def watched(self, *args, **kwargs):
        seen.append([])
        with watch(seen[-1]):
            return original(self, *args, **kwargs)

    for kind in {type(module) for module in model.modules() if isinstance(module, FusedLayer)}:
        monkeypatch.setattr(kind, "forward", watched, raising=False)
    decoder.step(ids[:, -1:])
    assert len(seen) == model.config.num_hidden_layers
    return seen


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_operators_of_a_layer(family, quant, monkeypatch):
    """norm, QKV, rotary with norms and the write to the cache, attention, output, norm with the sum, gate and up with activation, down."""
    for names in of_each_layer(ftops.patch(tiny(family), quant=quant), operators, 16, monkeypatch):
        assert all(name.startswith("ftops::") for name in names), names
        assert 6 <= len(names) <= MOST, names


NORMED = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("family", NORMED)
@torch.inference_mode()
def test_operators_of_a_layer_whose_norms_are_within_linears(family, quant, monkeypatch):
    """norm and QKV, rotary and the write to the cache, attention, output with the sum, norm and gate and up, down with the sum."""
    monkeypatch.setattr(block, "NORMED_ROWS", dict.fromkeys((None, "int8", "int4"), (0, 16)))
    for names in of_each_layer(ftops.patch(tiny(family), quant=quant), operators, 16, monkeypatch):
        assert all(name.startswith("ftops::") for name in names) and len(names) == 6, names


@pytest.mark.parametrize("quant", ["w8a8", "fp8"])
@torch.inference_mode()
def test_norms_of_rows_that_are_rounded_are_within_linears(quant):
    """Rows of a prompt are read once for norm and rounding; the one norm that is left is the model's last."""
    model, ids = ftops.patch(tiny("llama"), quant=quant), prompt(batch=2, length=40)[0]
    for rows, norms in ((80, 1), (64, 1 + 2 * model.config.num_hidden_layers)):
        with operators(names := []):
            model(ids.view(-1)[:rows].view(2, -1), use_cache=False)
        assert sum("rms_norm" in name for name in names) == norms, names


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [None, "int8"])
@torch.inference_mode()
def test_launches_of_a_layer_whose_norms_are_within_linears(quant, monkeypatch):
    monkeypatch.setattr(block, "NORMED_ROWS", dict.fromkeys((None, "int8", "int4"), (0, 16)))
    for names in of_each_layer(ftops.patch(tiny("llama", "cuda", torch.bfloat16), quant=quant), launches, 512, monkeypatch):
        assert len(names) == 6, names


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gptj"])
@torch.inference_mode()
def test_launches_of_a_layer(family, monkeypatch):
    """In a cache so long that attention splits the keys over several blocks, whose results meet in the same launch. Not GPT-2's: its
    weights lie as [in, out], which cuBLAS multiplies, with a fill of its own before some products."""
    for names in of_each_layer(ftops.patch(tiny(family, "cuda", torch.bfloat16)), launches, 512, monkeypatch):
        assert 6 <= len(names) <= MOST, names
