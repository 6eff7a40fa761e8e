"""Quantised models on a GPU: the CPU's logits within the dtype's error, the loop's tokens, and memory that is let go."""
from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ftops
from ftops.quant import FORMATS
from tests.families.tiny import prompt
from tests.patch.checks import fallen, logits

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SIZES = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1024,
         "head_dim": 128, "vocab_size": 120, "max_position_embeddings": 256, "eos_token_id": None, "pad_token_id": 0}


def llama(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().to(device, dtype)


def dequantised(name: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The model that the format stands for, with its weights in `dtype` (the values of those quantised in bfloat16)."""
    model = ftops.quantize(llama(dtype=torch.bfloat16), name).dequantize()
    return model.to(device, dtype)


@pytest.mark.parametrize("rows", [1, 9, 100])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_the_cpus(name, rows):
    """Few rows run the kernels, many the library; against the formula in float32, beside PyTorch's own bfloat16."""
    ids = prompt(1, rows)[0]
    exact = logits(dequantised(name, torch.float32, "cpu"), ids)
    theirs = logits(dequantised(name, torch.bfloat16, CUDA), ids).float().cpu()
    model = ftops.patch(llama(CUDA, torch.bfloat16), quant=name)
    ours = logits(model, ids).float().cpu()
    # fp8 and w8a8 also round many rows of x to eight bits: 2^-4 and 2^-8 of the largest.
    rounding = {"fp8": 2 ** -4, "w8a8": 2 ** -6}.get(name, 0) * exact.abs().max() if rows > 64 else 0
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding + 1e-3
    assert fallen(model) == {}


@pytest.mark.parametrize("name", FORMATS)
def test_captured_steps_give_the_tokens_of_steps_that_are_not(name):
    """The quantised linears in a CUDA graph: greedy tokens, each the best of what a whole forward says, within a tie."""
    model = ftops.patch(llama(CUDA, torch.bfloat16), quant=name)
    ids = prompt(2, 8)[0].cuda()
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    scores = logits(model, tokens).float()[:, 7:-1]
    best, chosen = scores.amax(-1), scores.gather(-1, tokens[:, 8:, None]).squeeze(-1)
    assert tokens.shape == (2, 20)
    assert (best - chosen <= 2 ** -5 * scores.abs().max()).all()


def held() -> int:
    """Bytes of tensors, without what earlier tests have left to the collector and what cuBLAS keeps from its first call on."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_let_go(name):
    """What is held afterwards is the quantised weights, and on the way there never more than a layer beside the model."""
    with CUDA:
        config = LlamaConfig(**{**SIZES, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6})
        model = LlamaForCausalLM(config).bfloat16()
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    before = held()
    torch.cuda.reset_peak_memory_stats()
    ftops.patch(model, quant=name)
    most = torch.cuda.max_memory_allocated()
    freed, after = before - held(), ftops.report(model).weights
    assert freed >= 0.98 * (after[0] - after[1])
    # The largest weight in float32, and what rounding it takes, is what may be there beside the model.
    assert most - before <= 4 * layer


@pytest.mark.parametrize("name", FORMATS)
def test_moved_to_the_gpu_and_back(name):
    model = ftops.patch(llama(), quant=name)
    theirs, held = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.allclose(logits(model.cuda()).cpu(), theirs, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(model.cpu()), theirs)
    assert all(torch.equal(held[key].view(torch.uint8), value.view(torch.uint8)) for key, value in model.state_dict().items())


def test_from_pretrained_never_has_the_whole_model_in_16_bits(tmp_path):
    config = LlamaConfig(**{**SIZES, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16})
    with CUDA:
        original = LlamaForCausalLM(config).bfloat16()
    original.save_pretrained(tmp_path, max_shard_size="50MB")
    whole = sum(parameter.nbytes for parameter in original.parameters())
    del original
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ftops.QuantConfig("int4"), device_map="cuda")
    assert torch.cuda.max_memory_allocated() - before < 0.6 * whole
    assert logits(ftops.patch(model)).isfinite().all()
