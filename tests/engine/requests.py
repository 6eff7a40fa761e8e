"""A model small enough for hundreds of answers, what requests may ask of it, and the answer that each has alone."""
from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import ftops
from tests.families.tiny import COMMON, VOCABULARY


def small(device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A patched Llama of two layers."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**COMMON | {"initializer_range": 0.3}, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, intermediate_size=96, max_position_embeddings=128)
    return ftops.patch(transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype).eval())


class Letters:
    """A tokenizer whose token i is one letter."""

    def decode(self, tokens, **_):
        return "".join(chr(0x4E00 + token) for token in tokens)


# How many the test of answers and their lone answers sends: FTOPS_REQUESTS=10000 pytest tests/engine -k lone_answer
REQUESTS = int(os.environ.get("FTOPS_REQUESTS", "200"))

# Each a way to ask; together every rule of a request, alone and beside others.
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 9, "min_p": 0.02},
    {"temperature": 1.0, "typical_p": 0.7},
    {"temperature": 1.5, "top_p": 0.9, "top_p_decay": 0.8, "top_p_min": 0.1, "top_p_reset_ids": 7},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 2.0, "frequency_penalty": 1.0},
    {"temperature": 1.0, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 4},
    {"logit_bias": {5: 3.0, 8: float("-inf")}},
    {"temperature": 0.8, "sequence_bias": {(11,): 1.5, (12, 13): 4.0}, "bad_words": [[20], [21, 22], [23, 24, 25]]},
    {"temperature": 1.2, "eos_token_id": [30, 31, 32, 33, 34], "min_new_tokens": 4},
    {"temperature": 1.2, "stop": [[40], [41, 42]], "eos_token_id": 50},
    {"temperature": 1.0, "stop": ["".join(map(chr, (0x4E00 + 60, 0x4E00 + 61))), chr(0x4E00 + 62), chr(0x4E00 + 63)]},
]


def mixed(count: int, seed: int, longest: int = 24, most: int = 18) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts, a third of which begin alike, and options."""
    chance = random.Random(seed)
    beginnings = [[chance.randrange(3, VOCABULARY) for _ in range(longest)] for _ in range(3)]
    requests = []
    for number in range(count):
        prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(1, 9))]
        if number % 3:
            prompt = chance.choice(beginnings)[: chance.randrange(longest)] + prompt
        options = {**WAYS[number % len(WAYS)], "max_new_tokens": chance.randrange(1, most), "seed": chance.randrange(5)}
        if "stop" in options and number >= 40:  # ever more of them, and longer ones
            options["stop"] = [*options["stop"], *([70 + more] * (1 + more) for more in range(min(number // 40, 6)))]
        if any(isinstance(words, str) for words in options.get("stop", ())):
            options["tokenizer"] = Letters()
        requests.append((prompt, options))
    return requests


def alone(model: PreTrainedModel, prompt: list[int], options: dict[str, Any]) -> list[int]:
    """The answer of `ftops.generate`."""
    return ftops.generate(model, torch.tensor([prompt], device=model.device), **options)[0, len(prompt):].tolist()


@contextmanager
def held(engine: ftops.Engine) -> Iterator[None]:
    """What is submitted within begins together: requests meet, and want for pages, however fast the engine is and whoever submits."""
    go, turn = threading.Event(), engine._turn
    engine._turn = lambda: go.wait(60) and turn()
    try:
        yield
    finally:
        go.set()
