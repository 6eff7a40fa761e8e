"""Whole models of real shapes: Hugging Face as it comes, Hugging Face with a static cache and torch.compile, and patched.

The weights are random, made on the device: time does not depend on them, and no download is needed.
"""
from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, StaticCache

import ftops
from bench.method import CLOCK
from bench.problem import small_sizes
from bench.record import OURS, Record
from ftops.integrations.demo.load import load_causal_lm
from ftops.integrations.evaluate import weight_bytes

HF, COMPILED, OURS_COMPILED = "Hugging Face", "Hugging Face, static cache + compile", "ftops, static cache + compile"
PROMPT, FEW, MANY, CAPACITY = (128, 4, 36, 192) if not small_sizes() else (16, 2, 10, 64)
ROUNDS = 5
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}


def llama_8b() -> PreTrainedModel:
    return _random(AutoModelForCausalLM, transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, eos_token_id=None))


def gptj_6b() -> PreTrainedModel:
    return _random(AutoModelForCausalLM, transformers.GPTJConfig(eos_token_id=None))


def embedded() -> PreTrainedModel:
    return load_causal_lm()[0]


def bert_large() -> PreTrainedModel:
    return _random(AutoModel, transformers.BertConfig(vocab_size=30522, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                                      intermediate_size=4096))


def bert_small() -> PreTrainedModel:
    return _random(AutoModel, transformers.BertConfig(vocab_size=2000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
                                                      intermediate_size=1024))


DECODERS = {"embedded model": embedded} if small_sizes() else {
    "Llama-3.1-8B": llama_8b, "GPT-J 6B": gptj_6b, "embedded model": embedded}
ENCODERS = {"BERT, 4 layers": bert_small} if small_sizes() else {"BERT-large": bert_large}
# batch, tokens, whether half of them are padding
ENCODED = [(1, 32, False), (8, 32, True)] if small_sizes() else [(1, 128, False), (8, 128, False), (32, 384, False), (32, 384, True)]


def _random(auto: type, config: transformers.PreTrainedConfig) -> PreTrainedModel:
    device = "cpu" if small_sizes() else "cuda"
    with torch.device(device):
        return auto.from_config(config, dtype=torch.float32 if small_sizes() else torch.bfloat16).eval()


def step_bytes(model: PreTrainedModel) -> int:
    """Of the weights that a step must read: all but the rows of the table of tokens that it does not look up."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return weight_bytes(model) - (0 if head is not None and head.weight is table else table.nbytes)


@dataclass
class Pair:
    """A model, and a copy of it that is patched."""

    name: str
    theirs: PreTrainedModel
    ours: PreTrainedModel

    def check(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        """Relative errors of the logits of two rows, against the model in a wider dtype; asserts that ours is not twice Hugging Face's."""
        ids, mask = ids[:2], mask[:2]

        def outputs(model: PreTrainedModel) -> torch.Tensor:
            return model(ids, attention_mask=mask)[0][mask.bool()].double()

        exact = outputs(copy.deepcopy(self.theirs).to(WIDER[self.theirs.dtype]))
        errors = {name: float((outputs(model) - exact).norm() / exact.norm()) for name, model in ((OURS, self.ours), (HF, self.theirs))}
        assert errors[OURS] <= 2 * errors[HF]
        return errors


def _pair(name: str, make: Callable[[], PreTrainedModel]) -> Iterator[Pair]:
    transformers.logging.set_verbosity_error()
    theirs = make()
    yield Pair(name, theirs, ftops.patch(copy.deepcopy(theirs)))
    del theirs
    torch.compiler.reset()
    gc.collect()
    if not small_sizes():
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from _pair(request.param, DECODERS[request.param])


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from _pair(request.param, ENCODERS[request.param])


def _seconds(run: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if not small_sizes():
        torch.cuda.synchronize()


def _interleaved(benchmark: Any, sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each side's seconds; one measurement of each in every round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}

    def one_round() -> None:
        for name, side in sides.items():
            seconds[name].append(side())
        CLOCK.seconds += max(seconds[OURS][-1], 0.0)

    one_round()
    for measured in seconds.values():
        measured.clear()
    benchmark.pedantic(one_round, rounds=rounds)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("batch", [1, 16])
@torch.inference_mode()
def test_decode(batch: int, decoder: Pair, keep: Callable[[Record], None], benchmark: Any, device: torch.device) -> None:
    """A step of greedy `generate`, host work and all: the difference of a long and a short run, by their number of tokens."""
    ids = torch.randint(3, decoder.theirs.config.vocab_size, (batch, PROMPT), device=device)
    mask = torch.ones_like(ids)
    errors = decoder.check(ids, mask)
    torch.compiler.reset()  # or the second batch size would be compiled for any, and slower

    def step(model: PreTrainedModel, static: bool) -> Callable[[], float]:
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY) if static else None

        def generate(tokens: int) -> None:
            if cache is not None:
                cache.reset()
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                           pad_token_id=0, disable_compile=not static)

        return lambda: (_seconds(lambda: generate(MANY)) - _seconds(lambda: generate(FEW))) / (MANY - FEW)

    sides = {OURS: step(decoder.ours, False), HF: step(decoder.theirs, False)}
    if device.type == "cuda":  # where generate compiles by itself
        sides[COMPILED] = step(decoder.theirs, True)
        if batch == 1:  # a minute of compiling
            sides[OURS_COMPILED] = step(decoder.ours, True)
    seconds = _interleaved(benchmark, sides, ROUNDS)
    keep(Record("models", "decode, a step", f"{decoder.name}, batch {batch}", seconds, errors=errors, bytes=step_bytes(decoder.theirs),
                timed="host clock", rounds=ROUNDS))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("batch", "length", "padded"), ENCODED)
@torch.inference_mode()
def test_encode(batch: int, length: int, padded: bool, encoder: Pair, keep: Callable[[Record], None], benchmark: Any,
                device: torch.device) -> None:
    """One forward pass, of several in a row."""
    ids = torch.randint(3, encoder.theirs.config.vocab_size, (batch, length), device=device)
    mask = torch.ones_like(ids)
    if padded:
        ends = torch.randint(1, length + 1, (batch, 1), device=device)
        ends[0] = length
        mask = (torch.arange(length, device=device) < ends).long()
    errors = encoder.check(ids, mask)
    calls = 10 if batch < 32 else 3

    def encode(model: Callable[..., Any]) -> Callable[[], float]:
        return lambda: _seconds(lambda: [model(ids, attention_mask=mask) for _ in range(calls)]) / calls

    sides = {OURS: encode(encoder.ours), HF: encode(encoder.theirs)}
    if device.type == "cuda":
        sides["Hugging Face, compile"] = encode(torch.compile(encoder.theirs, mode="reduce-overhead", dynamic=False))
        if batch == 1:
            sides["ftops, compile"] = encode(torch.compile(encoder.ours, mode="reduce-overhead", dynamic=False))
    seconds = _interleaved(benchmark, sides, ROUNDS)
    weights = sum(p.numel() for name, p in encoder.theirs.named_parameters() if p.dim() == 2 and "embeddings" not in name)
    config, tokens = encoder.theirs.config, int(mask.sum())
    attention = 4 * config.num_hidden_layers * config.hidden_size * float((mask.sum(1) ** 2).sum())
    name = f"{encoder.name}, {batch} x {length}" + (", half padding" if padded else "")
    keep(Record("models", "encode", name, seconds, errors=errors, bytes=step_bytes(encoder.theirs),
                flops=2 * weights * tokens + attention, timed="host clock", rounds=ROUNDS))
