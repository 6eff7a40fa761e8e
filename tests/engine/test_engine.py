"""Many requests over one model: each gets the tokens that it gets alone, whatever the others do, and nothing is left behind."""
from __future__ import annotations

import random
import threading
import time
import weakref
from functools import cache

import pytest
import torch

import ftops
from ftops.engine import QueueFull, batch
from ftops.integrations.transformers import engine as engines
from ftops.integrations.transformers.archs import ARCHS
from tests.engine.recorded import Recorded
from tests.engine.requests import REQUESTS, Letters, alone, held, mixed, small
from tests.families.tiny import causal, tiny


@cache
def model():
    return small()


@cache
def all_of_them():
    return mixed(REQUESTS, seed=1)


@cache
def lone(number: int) -> list[int]:
    return alone(model(), *all_of_them()[number])


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    deadline = time.monotonic() + 5  # a thread that has nothing left to do may be on its last line
    while time.monotonic() < deadline and any(thread.name == "ftops.Engine" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "ftops.Engine"]


def assert_nothing_held(engine: ftops.Engine) -> None:
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.held_pages) == (0, 0, 0)
    assert stats.free_pages + stats.cached_pages == stats.pages


@pytest.mark.parametrize("ahead", [False, True])
def test_every_answer_is_its_lone_answer(ahead, monkeypatch):
    """Requests with every rule there is, a third cancelled at some point, in a cache that is too small for them.

    ahead: as on a GPU, in steps of few sizes that are launched again on the tensors of the first, before the last one is looked at.
    """
    if ahead:
        monkeypatch.setattr(batch, "Graphs", Recorded)
        monkeypatch.setattr(Recorded, "replays", 0)
        monkeypatch.setattr(engines, "fixed", lambda _: True)
    requests, chance = all_of_them(), random.Random(1)
    with ftops.Engine(model(), max_requests=12, max_waiting=REQUESTS, cache_tokens=100, page_size=2, chunk=24) as engine:
        with held(engine):
            handles = [engine.submit(prompt, **options) for prompt, options in requests]
        cancelled = {number: chance.randrange(6) for number in sorted(chance.sample(range(REQUESTS), REQUESTS // 3))}
        read: dict[int, list[int]] = {}
        for number, count in cancelled.items():
            read[number] = [token for token, _ in zip(handles[number], range(count), strict=False)]
            handles[number].cancel()
        answers = [handle.result(60) for handle in handles]
        stats = engine.stats()
        assert_nothing_held(engine)
    assert stats.preemptions > 3 and stats.prefix_tokens > 300 and stats.tokens == sum(len(answer.tokens) for answer in answers)
    assert not ahead or Recorded.replays > stats.steps // 2
    for number, ((_, options), answer) in enumerate(zip(requests, answers, strict=True)):
        expected = lone(number)
        if answer.reason == "cancelled":
            assert number in cancelled
            assert answer.tokens[: len(read[number])] == read[number]
            expected = expected[: len(answer.tokens)]
        assert answer.tokens == expected, options
    assert {answer.reason for answer in answers} == {"stop", "length", "cancelled"}


def test_lists_that_are_longer_than_any_before(monkeypatch):
    """Graphs of the shorter ones do not go on looking where those were."""
    monkeypatch.setattr(batch, "Graphs", Recorded)
    monkeypatch.setattr(engines, "fixed", lambda _: True)
    free = alone(model(), [9, 10], {"max_new_tokens": 12})
    with ftops.Engine(model()) as engine:
        for stop in ([[free[6]]], [[free[6]]], [[free[6]]], [[free[4]]], [[1], [1, 2], [1, 2, 3], free[1:3]], [free[2:7], [free[5]]]):
            options = {"max_new_tokens": 12, "stop": stop}
            assert engine.submit([9, 10], **options).result().tokens == alone(model(), [9, 10], options)


@pytest.mark.parametrize("family", [family for family in ARCHS if causal(family)])
def test_every_family(family):
    """Windows that are shorter than a request among them, and prompts that are read in pieces."""
    one = ftops.patch(tiny(family))
    requests = mixed(6, seed=3, most=12)
    with ftops.Engine(one, max_requests=4, chunk=10, page_size=8) as engine:
        answers = [handle.result(60).tokens for handle in [engine.submit(prompt, **options) for prompt, options in requests]]
    assert answers == [alone(one, prompt, options) for prompt, options in requests]
    assert ftops.report(one).fallbacks == 0


def test_tokens_and_text_come_while_others_run():
    prompt, options = [5, 6, 7], {"temperature": 1.0, "seed": 4}
    with ftops.Engine(model()) as engine:
        other = engine.submit(prompt, max_new_tokens=120)
        text = engine.submit(prompt, max_new_tokens=9, **options).text(Letters())
        pieces = [next(text)]
        assert not other.done
        pieces += text
        answer = engine.submit(prompt, max_new_tokens=9, **options).result()
        assert pieces == [Letters().decode([token]) for token in answer.tokens]
        assert list(other)[:4] == other.result().tokens[:4]
        assert list(other) == []


def test_logprobs_are_those_of_the_lone_answer():
    prompt, options = list(range(20, 31)), {"max_new_tokens": 12, "temperature": 0.9, "seed": 2, "repetition_penalty": 1.2}
    expected = ftops.generate(model(), torch.tensor([prompt]), return_logprobs=True, **options)
    with ftops.Engine(model()) as engine:
        silent = engine.submit(prompt, **options)
        answer = engine.submit(prompt, return_logprobs=True, **options).result()
        assert silent.result().logprobs is None
    assert answer.tokens == silent.result().tokens == expected.sequences[0, 11:].tolist()
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected.logprobs[0], rtol=1e-4, atol=1e-4)
    assert answer.cumulative_logprob == pytest.approx(expected.cumulative_logprobs.item(), rel=1e-4)


def test_why_an_answer_ended():
    free = alone(model(), [9, 10], {"max_new_tokens": 10})
    letters = Letters().decode(free)
    with ftops.Engine(model()) as engine:
        ways = {"length": {}, "eos": {"eos_token_id": free[3]}, "tokens": {"stop": [free[2:4]]},
                "text": {"stop": [letters[2:5]], "tokenizer": Letters()}}
        answers = {name: engine.submit([9, 10], max_new_tokens=10, **options).result() for name, options in ways.items()}
    assert (answers["length"].tokens, answers["length"].reason) == (free, "length")
    for name, length in (("eos", free.index(free[3]) + 1), ("tokens", 4), ("text", 5)):
        assert (answers[name].tokens, answers[name].reason) == (free[:length], "stop")


def test_a_pause_between_requests():
    """An engine with nothing to do has no thread, and starts again."""
    engine = ftops.Engine(model(), page_size=4)
    first = engine.submit(range(3, 20), max_new_tokens=4).result()
    while any(thread.name == "ftops.Engine" for thread in threading.enumerate()):
        time.sleep(0.001)
    assert engine.submit(torch.arange(3, 20), max_new_tokens=4).result() == first
    assert engine.stats().prefix_tokens == 16
    engine.close()


def test_close_ends_and_wakes_all():
    engine = ftops.Engine(model(), max_requests=2)
    handles = [engine.submit([3, 4, 5], max_new_tokens=125) for _ in range(6)]
    read = []
    readers = [threading.Thread(target=lambda one=one: read.append(len(list(one)))) for one in handles]
    for reader in readers:
        reader.start()
    cache_of = weakref.ref(engine._decoder)
    while engine.stats().steps < 3:
        time.sleep(0.001)
    engine.close()
    assert cache_of() is None
    for reader in readers:
        reader.join(5)
    answers = [handle.result(0) for handle in handles]
    assert sorted(read) == sorted(len(answer.tokens) for answer in answers)
    assert answers[0].tokens == alone(model(), [3, 4, 5], {"max_new_tokens": 125})[: len(answers[0].tokens)] != []
    assert {answer.reason for answer in answers[2:]} == {"cancelled"} and answers[5].tokens == []
    assert_nothing_held(engine)
    engine.close()
    with pytest.raises(RuntimeError, match="submit: the engine is closed"):
        engine.submit([1], max_new_tokens=1)


def test_cancel_frees_what_a_request_held():
    with ftops.Engine(model(), max_requests=1, max_waiting=2) as engine:
        first, second = (engine.submit([3, 4, 5], max_new_tokens=120) for _ in range(2))
        assert next(first) == alone(model(), [3, 4, 5], {"max_new_tokens": 1})[0]
        first.cancel()
        first.cancel()
        assert first.result(0).reason == "cancelled"
        next(second)
        second.cancel()
        assert list(second) == second.result().tokens[1:]
        assert engine.submit([8], max_new_tokens=3).result().reason == "length"
        assert_nothing_held(engine)


def test_an_error_in_a_step_reaches_everybody(monkeypatch):
    engine = ftops.Engine(model(), max_requests=2)
    steps = iter(range(5))
    step = engine._decoder.step
    monkeypatch.setattr(engine._decoder, "step", lambda *given: step(*given) if next(steps, None) is not None else 1 / 0)
    handles = [engine.submit([3, 4, 5], max_new_tokens=50) for _ in range(4)]
    for handle in handles:
        with pytest.raises(RuntimeError, match="the engine failed: ZeroDivisionError: division by zero"):
            handle.result(60)
    assert len(alone(model(), [3, 4, 5], {"max_new_tokens": 5})) == 5
    with pytest.raises(RuntimeError, match="the engine failed: ZeroDivisionError"):
        list(handles[0])
    with pytest.raises(RuntimeError, match="submit: the engine failed, ZeroDivisionError: division by zero; make another"):
        engine.submit([1], max_new_tokens=1)
    assert_nothing_held(engine)
    engine.close()


def test_a_layer_that_is_changed_meanwhile():
    """Its original could not read the pages; better no answer than a wrong one."""
    one = small()
    with ftops.Engine(one) as engine:
        engine.submit([3, 4], max_new_tokens=2).result()
        one.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="a layer of the model was changed while the engine ran over it"):
            engine.submit([3, 4], max_new_tokens=2).result()


def test_a_full_queue_is_refused(monkeypatch):
    with ftops.Engine(model(), max_requests=1, max_waiting=2) as engine:
        gate = threading.Event()
        read = engine._batch.read
        monkeypatch.setattr(engine._batch, "read", lambda chunks: (gate.wait(), read(chunks))[1])
        handles = [engine.submit([3, 4, 5], max_new_tokens=5)]
        while engine.stats().running == 0:
            time.sleep(0.001)
        handles += [engine.submit([3, 4, 5], max_new_tokens=5) for _ in range(2)]
        with pytest.raises(QueueFull, match="submit: 2 requests wait already, as many as max_waiting allows"):
            engine.submit([3, 4, 5], max_new_tokens=5)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s; 0 tokens so far"):
            handles[0].result(0.01)
        gate.set()
        assert len({tuple(handle.result().tokens) for handle in handles}) == 1


WRONG = {
    "no tokens": ({"prompt_ids": []}, "prompt_ids is [[][]]; allowed: one or more token ids, 0 to 119"),
    "a number": ({"prompt_ids": 5}, "prompt_ids is 5; allowed: one or more token ids"),
    "no word": ({"prompt_ids": [1, 120]}, "allowed: one or more token ids, 0 to 119"),
    "a batch": ({"prompt_ids": torch.ones(1, 3, dtype=torch.int64)}, r"prompt_ids is torch.int64 \(1, 3\)"),
    "an option": ({"top_p": 2.0}, "submit: top_p is 2.0"),
    "no option": ({"topp": 0.5}, "submit: topp is no option"),
    "callables": ({"processors": [lambda ids, logits: logits]}, "processors is given, but an engine serves many requests in one step"),
    "too long": ({"max_new_tokens": 126}, "exceed the 128 tokens of max_length"),
    "too long for the cache": ({"max_new_tokens": 90}, "need 23 pages of 4 tokens, and the cache has 20"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_cannot_be_served(name):
    given, message = WRONG[name]
    with ftops.Engine(model(), cache_tokens=80, page_size=4) as engine:
        with pytest.raises((ValueError, TypeError), match=message):
            engine.submit(**{"prompt_ids": [1, 2, 3], **given})
        assert_nothing_held(engine)


def test_an_engine_that_cannot_be():
    with pytest.raises(ValueError, match=r"Engine: LlamaForCausalLM cannot be served: it has no ftops block; call ftops.patch\(model\)"):
        ftops.Engine(tiny("llama"))
    with pytest.raises(ValueError, match="cannot be served: it is no decoder"):
        ftops.Engine(ftops.patch(tiny("bert")))
    with pytest.raises(ValueError, match=r"it is in training mode; call model.eval\(\)"):
        ftops.Engine(small().train())
    for options, message in (({"chunk": 0}, "chunk is 0; allowed: 1 or more"),
                             ({"max_length": 200}, "max_length is 200; allowed: 1 to 128"),
                             ({"cache_tokens": 8}, "cache_tokens is 8; allowed: 16, which is one page, or more")):
        with pytest.raises(ValueError, match=f"Engine: {message}"):
            ftops.Engine(model(), **options)
