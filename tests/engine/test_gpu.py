"""The engine on a GPU, where a step is the replay of graphs and one is always ahead of what is read."""
from __future__ import annotations

import random

import pytest
import torch

import ftops
from tests.engine.requests import REQUESTS, alone, held, mixed, small

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [4, 48])
def test_every_answer_is_its_lone_answer(rows):
    """In buckets of every size, with requests that are cancelled, put back and share pages, and graphs that go on from round to round."""
    model, requests, chance = small("cuda"), mixed(REQUESTS, seed=5), random.Random(5)
    with ftops.Engine(model, max_requests=rows, max_waiting=REQUESTS, cache_tokens=84 + rows, page_size=2, chunk=64) as engine:
        for _ in range(2):
            with held(engine):
                handles = [engine.submit(prompt, **options) for prompt, options in requests]
            for number in sorted(chance.sample(range(REQUESTS), REQUESTS // 4)):
                for _ in zip(handles[number], range(chance.randrange(4)), strict=False):
                    pass
                handles[number].cancel()
            answers = [handle.result(120) for handle in handles]
        stats, sizes = engine.stats(), set(engine._batch._forwards._graphs)
        assert len(sizes) > 2 and sizes <= {1, 2, 4, 8, 16, 32, rows}
        assert engine._batch._choices._graphs
    assert stats.preemptions and stats.prefix_tokens
    assert (stats.waiting, stats.running, stats.held_pages) == (0, 0, 0)
    for (prompt, options), answer in zip(requests, answers, strict=True):
        expected = alone(model, prompt, options)
        assert answer.tokens == (expected[: len(answer.tokens)] if answer.reason == "cancelled" else expected), options
    assert ftops.report(model).fallbacks == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    """Greedy tokens are the lone ones until rounding parts them: the first is the same, and log-probabilities agree while tokens do."""
    model, requests = small("cuda", dtype), mixed(60, seed=6)
    with ftops.Engine(model, max_requests=16, page_size=16) as engine:
        handles = [engine.submit(prompt, max_new_tokens=8, return_logprobs=True) for prompt, _ in requests]
        answers = [handle.result(120) for handle in handles]
    same = 0
    for (prompt, _), answer in zip(requests, answers, strict=True):
        made = ftops.generate(model, torch.tensor([prompt], device="cuda"), max_new_tokens=8, return_logprobs=True)
        expected = made.sequences[0, len(prompt):].tolist()
        until = next((i for i, pair in enumerate(zip(answer.tokens, expected, strict=True)) if pair[0] != pair[1]), 8)
        torch.testing.assert_close(torch.tensor(answer.logprobs[:until]), made.logprobs[0, :until].cpu(), rtol=0.1, atol=0.1)
        same += until
    assert same > 0.8 * 8 * len(requests)


def test_another_thread_may_use_the_gpu_meanwhile():
    """Also while a graph is captured: by generate, by another engine, and for sums that are read at once."""
    model, requests = small("cuda"), mixed(40, seed=7)
    expected = [alone(model, prompt, options) for prompt, options in requests]
    with ftops.Engine(model, max_requests=8) as one, ftops.Engine(small("cuda"), max_requests=5) as other:
        handles = [engine.submit(prompt, **options) for prompt, options in requests for engine in (one, other)]
        while not handles[-1].done:
            assert alone(model, *requests[0]) == expected[0]
            assert torch.ones(1 << 20, device="cuda").sum().item() == 1 << 20
        answers = [handle.result(120).tokens for handle in handles]
    assert answers[::2] == answers[1::2] == expected


def test_close_gives_the_memory_back():
    model = small("cuda")
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    with ftops.Engine(model, cache_tokens=1 << 16) as engine:
        engine.submit([3, 4, 5], max_new_tokens=20).result(60)
        assert torch.cuda.memory_allocated() > before + (1 << 24)
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB a stream, which cuBLAS keeps for whoever comes next
    assert torch.cuda.memory_allocated() < before + (1 << 22)
