"""A decode step of whole models over batch sizes, contexts and weight formats, beside Hugging Face as it comes."""
from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import ftops
from bench.method import CLOCK
from bench.problem import small_sizes
from bench.record import OURS, Record
from bench.test_models import embedded, gptj_6b, llama_8b, step_bytes
from ftops.integrations.bench import timed, twin
from ftops.integrations.transformers.decoder import forget

HF = "Hugging Face"
FORMATS = [None, "int8", "int4", "fp8", "w8a8"]
BATCHES, CONTEXTS, ROUNDS = ([1, 2], [16], 2) if small_sizes() else ([1, 4, 16, 64, 256], [128, 2048, 16384], 5)
SETTLED = 6  # steps that compile, capture and fill what is then timed
STEPS = {OURS: 8, HF: 2}  # of a round: one reading of a long prompt serves all rounds
NEW = 1 + SETTLED + ROUNDS * STEPS[OURS]
MOST = 2 ** 18  # tokens of all prompts together, what reads in seconds
MODELS = {"embedded model": embedded} if small_sizes() else {"Llama-3.1-8B": llama_8b, "GPT-J 6B": gptj_6b}


@pytest.fixture(scope="module", params=MODELS)
def theirs(request: pytest.FixtureRequest) -> Iterator[tuple[str, PreTrainedModel]]:
    logging.set_verbosity_error()
    model = MODELS[request.param]()
    yield request.param, model
    del model
    _collect()


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def ours(request: pytest.FixtureRequest, theirs: tuple[str, PreTrainedModel]) -> Iterator[tuple[str | None, PreTrainedModel]]:
    model = ftops.patch(twin(theirs[1]), quant=request.param)
    yield request.param, model
    forget(model)
    del model
    _collect()


def _collect() -> None:
    gc.collect()
    if not small_sizes():
        torch.cuda.empty_cache()


def _steps(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> list[float]:
    """Seconds of a step, until its tokens are on the host: the mean of each round."""
    at = timed(model, ids, 1 + SETTLED + ROUNDS * steps)[1][SETTLED:]
    return [(at[round_ + steps] - at[round_]) / steps for round_ in range(0, ROUNDS * steps, steps)]


def _near(model: PreTrainedModel, original: PreTrainedModel, ids: torch.Tensor) -> float:
    """Cosine of what two layers make of `ids`. What 32 layers of random weights make of it says little: each makes a difference larger, so
    that bfloat16 beside bfloat16 has 0.998 at the end, and int4 0.36."""
    hidden = (one(ids, output_hidden_states=True).hidden_states[2].flatten().float() for one in (model, original))
    return float(torch.cosine_similarity(*hidden, dim=0))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("batch", BATCHES)
@torch.inference_mode()
def test_step(batch: int, context: int, theirs: tuple[str, PreTrainedModel], ours: tuple[str | None, PreTrainedModel],
              keep: Callable[[Record], None], benchmark: Any, device: torch.device) -> None:
    (name, original), (quant, model) = theirs, ours
    config = original.config
    if batch * context > MOST or context + NEW > config.max_position_embeddings:
        pytest.skip("longer than the model, or than a run should be")
    ids = torch.randint(3, config.vocab_size, (batch, context), device=device)
    assert _near(model, original, ids[:1, :128]) > (0.999 if quant is None else 0.9)
    sides = {OURS: model, **({HF: original} if quant is None else {})}
    seconds = {side: _steps(one, ids, STEPS[side]) for side, one in sides.items()}
    rounds = iter(seconds[OURS])

    def one_round() -> None:
        CLOCK.seconds += next(rounds)

    benchmark.pedantic(one_round, rounds=ROUNDS)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cache = 2 * batch * (context + NEW // 2) * heads * (config.hidden_size // config.num_attention_heads) * config.num_hidden_layers
    keep(Record("generation", f"{name}, {quant or str(original.dtype)[6:]}, a step", f"{batch} x {context}",
                {side: statistics.median(taken) for side, taken in seconds.items()},
                bytes=step_bytes(model) + cache * original.dtype.itemsize, timed="host clock", rounds=ROUNDS))
