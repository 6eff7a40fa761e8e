"""Many requests through ftops.Engine, beside batches of as many equal ones that begin and end together, which nobody has to schedule."""
from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ftops
from bench.method import CLOCK
from bench.problem import small_sizes
from bench.record import OURS, Record
from bench.test_models import embedded, llama_8b

BATCHES = "ftops.generate, equal batches"
ONCE, PROMPT, ANSWER, ROUNDS = (8, 16, 16, 2) if small_sizes() else (256, 128, 128, 3)
FACTOR = 3  # times as many requests as are served at once
ALL, CROWDED = f"{FACTOR * ONCE} from first to last", "while others wait"


@pytest.mark.benchmark(timer=CLOCK)
@torch.inference_mode()
def test_many_requests(keep: Callable[[Record], None], benchmark: Any, device: torch.device) -> None:
    """Seconds a token of the answers, prompts and all. The engine's prompts and answers are half to one and a half times as long as those
    of the batches, evenly, and no two begin alike. Of all of them, first and last steps, of few rows, are a part that it has not when
    requests go on coming."""
    model = ftops.patch(embedded() if small_sizes() else llama_8b())
    words, chance = model.config.vocab_size, random.Random(0)

    def length(mean: int) -> int:
        return chance.randint(mean // 2, mean + mean // 2)

    def requests() -> list[tuple[list[int], int]]:
        return [([chance.randrange(3, words) for _ in range(length(PROMPT))], length(ANSWER)) for _ in range(FACTOR * ONCE)]

    def scheduled() -> dict[str, float]:
        """Of all, and of those while as many as can be are at work and others wait."""
        asked = requests()
        start = time.perf_counter()
        handles = [engine.submit(prompt, max_new_tokens=answer, eos_token_id=None) for prompt, answer in asked]
        (full, before), (over, after) = (reached(lambda now: now.running >= ONCE or not now.waiting), reached(lambda now: not now.waiting))
        made = sum(len(handle.result().tokens) for handle in handles)
        assert made == sum(answer for _, answer in asked)
        return {ALL: (time.perf_counter() - start) / made, CROWDED: (over - full) / max(after - before, 1)}

    def reached(state: Callable[[Any], bool]) -> tuple[float, int]:
        """When the engine is in this state, and the tokens that it has made by then."""
        while not state(engine.stats()):
            time.sleep(1e-3)
        return time.perf_counter(), engine.stats().tokens

    def together() -> float:
        ids = torch.randint(3, words, (ONCE, PROMPT), device=device)
        start = time.perf_counter()
        ftops.generate(model, ids, max_new_tokens=ANSWER, eos_token_id=[])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (ONCE * ANSWER)

    seconds: dict[str, list[float]] = {ALL: [], CROWDED: []}

    def one_round() -> None:
        for name, each in scheduled().items():
            seconds[name].append(each)
        CLOCK.seconds += seconds[ALL][-1]

    for _ in range(2):  # the second has the graphs
        together()
    equal = statistics.median(together() for _ in range(ROUNDS))
    with ftops.Engine(model, max_requests=ONCE, max_length=2 * (PROMPT + ANSWER)) as engine:
        for _ in range(2):
            scheduled()
        benchmark.pedantic(one_round, rounds=ROUNDS)
        print(engine.stats())
    for name, each in seconds.items():
        keep(Record("models", "many requests, a token", f"{ONCE} at once of {PROMPT} + {ANSWER} tokens, {name}",
                    {OURS: statistics.median(each), BATCHES: equal}, timed="host clock", rounds=ROUNDS))
