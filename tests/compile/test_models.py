"""Hugging Face models of every family compiled by name, patched and not: right values, and exactly the expected nodes swapped."""
from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

import ftops
from ftops.integrations.compile import replaced
from tests.accuracy import assert_accurate
from tests.compile.models import BACKEND, EXPECTED, decoding, model
from tests.compile.rewritten import Rewritten
from tests.families.places import FLOAT32, in_turn
from tests.families.tiny import TINY, prompt

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
ON_GPU = pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu)  # one dtype: Inductor takes half a minute a model


def places(*on_cpu: str) -> pytest.MarkDecorator:
    """Every family on a GPU. On a CPU the named ones stand for all: to trace a model takes seconds, Inductor's C++ of it ten more."""
    return pytest.mark.parametrize(("family", "device", "dtype"), [
        pytest.param(family, *place.values, id=f"{family}-{place.id}", marks=place.marks)
        for family in TINY for place in (FLOAT32, ON_GPU) if family in on_cpu or place is ON_GPU])


@pytest.fixture(autouse=True)
def no_counts() -> None:
    counters.clear()


def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=mask).logits[mask.bool()]


def check(theirs: PreTrainedModel, compiled: PreTrainedModel, device: str, padding: str | None = "left") -> None:
    """The compiled model is as near to float64 as Hugging Face's is."""
    ids, mask = (t.to(device) for t in prompt(padding=padding))
    with torch.inference_mode():
        assert_accurate(logits(compiled, ids, mask), logits(copy.deepcopy(theirs).double(), ids, mask), logits(theirs, ids, mask))


def test_every_family_is_expected():
    assert set(EXPECTED) == set(TINY)


@places("llama")
def test_unpatched(family, device, dtype):
    hf = model(family, device, dtype)
    check(hf, torch.compile(hf, backend=BACKEND, fullgraph=True), device)
    assert replaced() == EXPECTED[family]
    assert counters["stats"]["unique_graphs"] == 1


@places("gpt2")
def test_patched_under_inductor(family, device, dtype):
    """The block and its ops are traced whole, and no layer turns to the original to be."""
    hf, patched = model(family, device, dtype), ftops.patch(model(family, device, dtype))
    check(hf, torch.compile(patched, fullgraph=True), device)
    assert counters["stats"]["unique_graphs"] == 1
    assert ftops.report(patched).fallbacks == 0


@places("mistral", "qwen3", "gpt2", "gptj", "bert")
def test_patched_leaves_nothing_to_swap(family, device, dtype):
    hf = model(family, device, dtype)
    patched = Rewritten(ftops.patch(model(family, device, dtype)))
    check(hf, patched, device)
    assert (patched.found[0].replaced, patched.found[0].kept) == ({}, {})
    assert len(patched.nodes("attention")) == hf.config.num_hidden_layers


@pytest.mark.gpu
def test_patched_by_name():
    hf, patched = model("llama", *ON_GPU.values), ftops.patch(model("llama", *ON_GPU.values))
    check(hf, torch.compile(patched, backend=BACKEND, fullgraph=True), "cuda")
    assert replaced() == {}


@pytest.mark.parametrize("family", TINY)
def test_masks_and_lengths(family):
    """One program takes every mask, and a second one every other length: the swap fixes no size. They are looked at before Inductor,
    which takes longer than all the rest."""
    hf = model(family)
    compiled = Rewritten(hf)
    for padding in (None, "left", "holes"):
        check(hf, compiled, "cpu", padding)
    assert [found.replaced for found in compiled.found] == [EXPECTED[family]]
    if family in ("mistral", "gptj"):  # both norms and both ways to write attention; to trace sizes that vary takes seconds
        with torch.inference_mode():
            for length in (20, 9, 33):
                ids, mask = prompt(length=length, padding="left")
                torch.testing.assert_close(logits(compiled, ids, mask), logits(hf, ids, mask), atol=1e-4, rtol=1e-4)
        assert [found.replaced for found in compiled.found] == [EXPECTED[family]] * 2


@in_turn(2, patched=[False, True], family=["mistral", "llama", "gpt2"])
def test_generate(family, patched, device, dtype, monkeypatch):
    """`generate` compiles the decode step over its static cache, on a GPU as a CUDA graph; Mistral's sliding one overflows, and is
    compiled again for that."""
    if device == "cpu":  # as rewritten: Inductor's C++ of a model is tested above
        monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_, **__: graph.forward)
    hf, (ids, mask) = model(family, device, dtype), (t.to(device) for t in prompt(padding="left"))
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    compiling = CompileConfig(backend=BACKEND, fullgraph=True)
    compiling._compile_all_devices = True  # transformers compiles by itself on accelerators only
    with torch.inference_mode():
        theirs = hf.generate(ids, attention_mask=mask, disable_compile=True, **options)
        if patched:
            ftops.patch(hf)
        ours = hf.generate(ids, attention_mask=mask, compile_config=compiling, **options)
    assert theirs.tolist() == ours.tolist()
    graphs = 2 if family == "mistral" else 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert replaced() == ({} if patched else {op: graphs * count for op, count in decoding(family).items()})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_is_left_alone(family):
    """Loss and gradients are PyTorch's own, dropout included."""
    hf = model(family).train()
    ids, _ = prompt()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hf(ids[:, :-1], use_cache=False).logits.transpose(1, 2), ids[:, 1:])

    compiled = Rewritten(loss)
    gradients = []
    for run in (compiled, loss):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(run(ids), list(hf.parameters())))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    (found,) = compiled.found
    assert found.replaced == {}
    assert {reason.split(": ", 1)[1] for reason in found.kept} == {"a gradient is recorded; compile under torch.no_grad()"}
    assert sum(found.kept.values()) == sum(count for op, count in EXPECTED[family].items() if op != "residual")
