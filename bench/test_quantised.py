"""Quantised weights on a CPU at one row beside Hugging Face's eager layers, a 300 M Llama of random weights."""
from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ftops
from bench.method import CLOCK
from bench.record import OURS, Record

ROUNDS, PROMPT = 9, 32


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["int8", "int4"])
@torch.inference_mode()
def test_step_on_a_cpu(format: str, dtype: torch.dtype, one_thread: None, keep: Callable[[Record], None], benchmark: Any) -> None:
    """One token after 32, the head quantised too; processor time of steps in turn."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=8,
                         head_dim=64, vocab_size=32000, max_position_embeddings=512, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval().to(dtype)
    models = {OURS: ftops.patch(copy.deepcopy(model), quant=ftops.QuantConfig(format, head=format)), "Hugging Face, eager": model}
    token = torch.zeros((1, 1), dtype=torch.int64)
    caches = {name: one(torch.arange(PROMPT)[None], use_cache=True).past_key_values for name, one in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}

    def step(one: PreTrainedModel, name: str) -> float:
        began = time.process_time()
        one(token, past_key_values=caches[name], use_cache=True)
        return time.process_time() - began

    def one_round() -> None:
        for name, one in models.items():
            seconds[name].append(step(one, name))
        CLOCK.seconds += seconds[OURS][-1]

    one_round()
    for taken in seconds.values():
        taken.clear()
    benchmark.pedantic(one_round, rounds=ROUNDS)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    keep(Record("quantised", "one thread of a CPU, Llama of 300 M, one token", f"{format}, {str(dtype)[6:]}", medians,
                timed="processor time", rounds=ROUNDS))
