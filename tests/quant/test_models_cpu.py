"""int8 on a CPU: reading half the bytes must be worth it."""
from __future__ import annotations

import copy
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ftops


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_step_of_a_300m_llama_takes_little_more_than_half_the_time(one_thread):
    """Beside transformers' eager layers in bfloat16, one token after 32; least processor time of steps taken in turn."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=8,
                         head_dim=64, vocab_size=32000, max_position_embeddings=512, attn_implementation="eager")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.03, 0.03)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
    assert 290e6 < sum(parameter.numel() for parameter in model.parameters()) < 310e6
    models = {"eager": model, "int8": ftops.patch(copy.deepcopy(model), quant=ftops.QuantConfig("int8", head="int8"))}
    caches, token = {}, torch.zeros((1, 1), dtype=torch.int64)

    def step(model: PreTrainedModel, cache: object) -> float:
        began = time.process_time()
        model(token, past_key_values=cache, use_cache=True)
        return time.process_time() - began

    with torch.inference_mode():
        for name, one in models.items():
            caches[name] = one(torch.arange(32)[None], use_cache=True).past_key_values
            step(one, caches[name])
        times = {name: [] for name in models}
        for _ in range(8):
            for name, one in models.items():
                times[name].append(step(one, caches[name]))
    least = {name: 1e3 * min(taken) for name, taken in times.items()}
    print(f"eager {least['eager']:.1f} ms, int8 {least['int8']:.1f} ms, {least['eager'] / least['int8']:.2f} x")
    assert least["eager"] >= 1.8 * least["int8"]
