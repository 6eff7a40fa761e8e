"""Patched models on a GPU, beyond what tests/families compares there: memory, moves, device maps, caches elsewhere, CUDA graphs."""
from __future__ import annotations

import functools

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import causal, prompt, tiny
from tests.patch.checks import assert_same_values, fallen, logits, values
from tests.patch.test_accelerate import layer_paths

pytestmark = pytest.mark.gpu
DECODERS = [family for family in ARCHS if causal(family)]
CUDA = torch.device("cuda")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-3)


def test_peak_memory_is_the_model_and_one_layer():
    config = LlamaConfig(hidden_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8, intermediate_size=4096,
                         vocab_size=1000)
    with CUDA:
        model = LlamaForCausalLM(config)
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ftops.patch(model)
    assert torch.cuda.max_memory_allocated() - before <= layer
    assert torch.cuda.memory_allocated() - before < 0.01 * layer
    torch.cuda.reset_peak_memory_stats()
    ftops.unpatch(model)
    assert torch.cuda.max_memory_allocated() - before <= layer


@pytest.mark.parametrize("family", ARCHS)
def test_moved_to_the_gpu_and_back(family):
    model = ftops.patch(tiny(family))
    theirs, weights = logits(model), values(model)
    assert close(logits(model.cuda()), theirs)
    assert torch.equal(logits(model.cpu()), theirs)
    assert_same_values(model, weights)
    halves = [logits(m.to(CUDA, torch.float16)).float().cpu() for m in (model, tiny(family))]
    ours, unpatched = ((half - theirs).abs().max() for half in halves)
    assert ours <= 2 * unpatched
    assert fallen(model) == {}


def across(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """As device_map="auto" lays out a model that is too large: the last layer's weights stay on the CPU and come when needed."""
    layers = layer_paths(model, family)
    places: dict[str, int | str] = {path: 0 for path in layers}
    for path, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if not path.startswith(tuple(f"{layer}." for layer in layers)):
            places[path.rpartition(".")[0]] = 0
    places[layers[-1]] = "cpu"
    return dispatch_model(model, places, main_device=0)


@pytest.mark.parametrize("family", ARCHS)
def test_across_cpu_and_gpu(family):
    ids, mask = prompt(padding="left")
    theirs = logits(tiny(family), ids, attention_mask=mask)[mask.bool()]
    model = ftops.patch(across(tiny(family), family))
    ours = logits(model, ids, attention_mask=mask.cuda())[mask.bool()]
    assert close(ours, theirs)
    rows = [row for row in ftops.report(model) if row.kind == ARCHS[family].layer]
    assert [row.swapped_to is None for row in rows] == [False] * (len(rows) - 1) + [True]
    assert fallen(model) == {}


@pytest.mark.parametrize("family", DECODERS)
def test_generate_across_cpu_and_gpu(family):
    ids, mask = prompt(padding="left")
    options = {"max_new_tokens": 8, "do_sample": False}
    theirs = tiny(family).generate(ids, attention_mask=mask, **options)
    model = ftops.patch(across(tiny(family), family))
    assert model.generate(ids.cuda(), attention_mask=mask.cuda(), **options).tolist() == theirs.tolist()


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_caches_elsewhere(family, cache):
    """Keys and values that wait on the host and come back on another stream give the tokens of those that stay on the GPU."""
    if family == "mistral" and cache == "offloaded_static":
        pytest.skip("transformers itself fails where every layer slides")
    ids, mask = (t.cuda() for t in prompt(padding="left"))
    model = tiny(family, CUDA)
    options = {"max_new_tokens": 10, "do_sample": False, "disable_compile": True}
    # transformers before 5.23 does not wait for its own copies, and by itself gets wrong tokens from an offloaded static cache.
    theirs = model.generate(ids, attention_mask=mask, cache_implementation="static" if "static" in cache else None, **options)
    ours = ftops.patch(model).generate(ids, attention_mask=mask, cache_implementation=cache, **options)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("family", [family for family in DECODERS if not ARCHS[family].window])
def test_decode_step_in_a_cuda_graph(family):
    """One step over a static cache, captured once and replayed for every token, gives the tokens of eager steps."""
    model = ftops.patch(tiny(family, CUDA))
    ids = prompt(batch=2, length=8)[0].cuda()
    token = torch.zeros((2, 1), dtype=torch.long, device=CUDA)

    def step(cache: StaticCache) -> None:
        token.copy_(model(token, past_key_values=cache).logits.argmax(-1))

    found = []
    with torch.inference_mode():
        for captured in (False, True):
            cache, tokens = StaticCache(config=model.config, max_cache_len=32), []
            token.copy_(model(ids, past_key_values=cache).logits[:, -1:].argmax(-1))
            run = functools.partial(step, cache)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(cache)
                run = graph.replay
            for _ in range(6):
                run()
                tokens.append(token.flatten().tolist())
            found.append(tokens)
    assert found[0] == found[1]
    assert fallen(model) == {}


@pytest.mark.parametrize("family", ARCHS)
def test_autocast(family):
    model = tiny(family, CUDA)
    ids = prompt()[0].cuda()
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        theirs = model(ids).logits
        assert torch.equal(ftops.patch(model)(ids).logits, theirs)
    assert fallen(model)["autocast"] >= model.config.num_hidden_layers


@pytest.mark.parametrize("family", ARCHS)
def test_gradients(family):
    model = tiny(family, CUDA)
    ids = prompt()[0].cuda()
    theirs = model(ids, labels=ids).loss
    ours = ftops.patch(model)(ids, labels=ids).loss
    assert torch.equal(ours, theirs)
    ours.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_warmup_compiles_what_generate_needs(monkeypatch):
    """After warmup no kernel is compiled any more."""
    from ftops.numba_kernels import launch
    model = ftops.patch(tiny("llama", CUDA, torch.bfloat16))
    ftops.warmup(model, batch_sizes=(1, 2), max_length=40)

    def refuse(spec: object, *_: object) -> None:
        raise AssertionError(f"{spec} was compiled after warmup")

    monkeypatch.setattr(launch, "cubin", refuse)
    ids, mask = (t.cuda() for t in prompt(padding="left"))
    model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("family", DECODERS)
def test_layers_on_two_gpus(family):
    ids, mask = prompt(padding="left")
    theirs = tiny(family).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    model, layers = tiny(family), layer_paths(tiny(family), family)
    places = {path: index * 2 // len(layers) for index, path in enumerate(layers)}
    for path, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if not path.startswith(tuple(f"{layer}." for layer in layers)):
            places[path.rpartition(".")[0]] = 0
    model = ftops.patch(dispatch_model(model, places))
    assert model.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=8, do_sample=False).tolist() == theirs.tolist()
    assert fallen(model) == {}
