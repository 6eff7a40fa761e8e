"""Who is served next, without a model: nobody is passed, starved, or given another's page, and no page is lost."""
from __future__ import annotations

import pytest

from ftops.engine.pages import Pages, digest
from ftops.engine.scheduler import QueueFull, Request, Scheduler
from tests.engine.simulated import Machine, traffic, word

SHAPES = {"short of pages": (9, 4, 6, 12), "one token a page": (40, 1, 4, 7), "many": (60, 4, 16, 30), "small chunks": (24, 3, 5, 2),
          "one at a time": (12, 4, 1, 8)}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_traffic(shape, lag):
    """Thousands of requests: every step is checked for who may do what, and every answer is the one that the prompt has alone."""
    pages, size, most, chunk = SHAPES[shape]
    put_back = shared = 0
    for seed in range(8):
        machine = Machine(pages, size, most, 10, chunk, lag, patience=3 * lag)
        made = traffic(machine, 40, seed)
        for request in made:
            said = request.tokens[: request.prompt]
            for token in request.answer:
                assert token == word(said)
                said = [*said, token]
        assert set(machine.done) == set(made)
        first = [request.number for request in machine.begun]
        assert first == sorted(first), "not in the order in which they came"
        left = machine.scheduler.pages
        assert left.available == pages and not machine.scheduler.ending
        put_back, shared = put_back + machine.scheduler.preemptions, shared + machine.scheduler.prefix_tokens
    assert shared
    assert put_back or shape in ("many", "one at a time")


def test_same_beginnings_are_read_once():
    """Among requests that come together, one that is running, and one that has gone; and only as far as they are the same."""
    machine = Machine(40, 4, 8, 8, 100, 0)
    common = list(range(10, 23))  # three pages and a token
    machine.submit([*common, 1], 3, 0)
    machine.submit([*common, 2], 3, 0)
    plan = machine.turn()
    assert [(chunk.start, chunk.end) for chunk in plan.chunks] == [(0, 14), (12, 14)]
    machine.submit([*common[:9], 3, 4], 3, 0)
    assert [(chunk.start, chunk.end) for chunk in machine.turn().chunks] == [(8, 11)]
    while machine.scheduler.running:
        machine.turn()
    machine.submit(common[:12], 2, 0)  # of pages alone: the last one is read again, since something must be drawn behind it
    assert [(chunk.start, chunk.end) for chunk in machine.turn().chunks] == [(8, 12)]
    assert machine.scheduler.prefix_tokens == 12 + 8 + 8


def test_an_answer_is_a_beginning_too():
    """The next turn of a conversation finds what the last one said."""
    machine = Machine(40, 4, 8, 8, 100, 0)
    request = machine.submit([1, 2, 3], 10, 0)
    while request not in machine.done:
        machine.turn()
    machine.submit([*request.tokens, 9, 9], 1, 0)
    assert machine.turn().chunks[0].start == 12


def test_a_long_prompt_is_read_in_chunks_beside_running_requests():
    machine = Machine(100, 4, 8, 8, 10, 0)
    running = machine.submit([1], 20, 0)
    machine.turn()
    machine.submit(list(range(35)), 5, 0)
    for count, size in enumerate((10, 10, 10, 5), 1):
        plan = machine.turn()
        assert plan.running == [running]
        assert [chunk.end - chunk.start for chunk in plan.chunks] == [size]
        assert len(running.answer) == 1 + count


def test_short_prompts_are_read_together():
    """Beside running answers, where that is what a step costs; not when they fill a chunk, nor when nobody runs."""
    machine = Machine(100, 4, 9, 9, 10, 0, patience=3)
    machine.submit([1], 50, 0)
    assert len(machine.turn().chunks) == 1
    read = []
    for number in range(12):
        if number in (0, 2, 5):
            machine.submit([7, 8, 9], 20, 0)
        if number == 9:
            machine.submit(list(range(30)), 5, 0)
        read.append(len(machine.turn().chunks))
    assert read == [0, 0, 0, 2, 0, 0, 0, 1, 0, 1, 1, 1]


def test_short_requests_do_not_pass_a_long_one():
    """However many of them come while it waits for pages."""
    machine = Machine(10, 4, 8, 50, 100, 0)
    for _ in range(3):
        machine.submit([1, 2, 3], 8, 0)
    machine.turn()
    long = machine.submit(list(range(30)), 4, 0)
    short = [machine.submit([5, 6], 2, 0) for _ in range(20)]
    while long not in machine.done:
        machine.turn()
        assert long in machine.begun or not any(request in machine.begun for request in short)


def test_the_youngest_is_put_back_and_goes_on_where_it_was():
    machine = Machine(5, 4, 8, 8, 100, 0)
    old, young = machine.submit([1, 2, 3, 4, 5, 6, 7], 12, 0), machine.submit([8, 9], 8, 0)
    put_back = []
    while young not in machine.done:
        put_back += machine.turn().put_back
    assert put_back == [young]
    assert len(old.answer) == 12 and len(young.answer) == 8
    assert machine.scheduler.preemptions == 1


def test_the_page_that_waited_longest_goes_first():
    """And of one request its last page, without which the others still serve."""
    pages = Pages(4, 2)
    name = b""
    taken = [pages.take() for _ in range(3)]
    for page in taken:
        name = digest(name, [1, 2])
        pages.remember(page, name)
    pages.release(taken)
    assert (pages.free, pages.idle, pages.available) == (1, 3, 4)
    pages.take()
    assert [pages.take(), pages.take()] == [taken[2], taken[1]]
    assert pages.find([digest(b"", [1, 2])]) == [taken[0]]
    pages.take()
    with pytest.raises(IndexError, match="all are held"):
        pages.take()


def test_refusals_change_nothing():
    scheduler = Scheduler(Pages(4, 4), 2, 1, 8)
    with pytest.raises(ValueError, match=r"a prompt of 10 tokens and max_new_tokens 8 need 5 pages of 4 tokens, and the cache has 4"):
        scheduler.submit(Request(range(10), 8))
    scheduler.submit(Request(range(9), 8))
    with pytest.raises(QueueFull, match="1 requests wait already, as many as max_waiting allows"):
        scheduler.submit(Request([1], 1))
    assert len(scheduler.waiting) == 1 and scheduler.pages.free == 4
