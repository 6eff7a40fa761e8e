"""A machine for a scheduler: pages with tokens in them in place of keys and values, and steps that check what they are told to do."""
from __future__ import annotations

import random

from ftops.engine.pages import Pages
from ftops.engine.scheduler import Plan, Request, Scheduler


def word(tokens: list[int]) -> int:
    """What a model would say behind `tokens`."""
    return sum((place + 7) * token for place, token in enumerate(tokens[-5:])) % 50


class Machine:
    """lag: steps whose tokens are not read before the next one is ordered, as on a GPU."""

    def __init__(self, pages: int, size: int, most: int, queue: int, chunk: int, lag: int, patience: int = 0) -> None:
        self.scheduler = Scheduler(Pages(pages, size), most, queue, chunk, patience)
        self.cache: list[list[int | None]] = [[None] * size for _ in range(pages)]
        self.lag, self.chunk, self.size, self.steps = lag, chunk, size, 0
        self.sent: list[list[tuple[Request, int]]] = []
        self.drawn: dict[Request, list[int]] = {}  # by the machine, which the host learns later
        self.ends: dict[Request, int] = {}  # tokens after which a request ends by itself
        self.begun: list[Request] = []
        self.done: list[Request] = []

    def submit(self, tokens: list[int], limit: int, end: int) -> Request:
        request = Request(tokens, limit)
        self.scheduler.submit(request)
        self.drawn[request], self.ends[request] = [], end
        return request

    def cancel(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.done.append(request)
        self.ends[request] = -1

    def turn(self) -> Plan:
        """A step, and what is read behind it."""
        plan = self.scheduler.plan(preempt=not self.sent)
        if plan is None:
            self.read(0)
            plan = self.scheduler.plan()
        for request in plan.put_back:
            assert request.answer == self.drawn[request], "put back with tokens on their way"
        assert sum(chunk.end - chunk.start for chunk in plan.chunks) <= self.chunk
        news = []
        for request in plan.running:
            said = [*request.tokens[: request.prompt], *self.drawn[request]]
            assert request.cached == len(said), "one token a step"
            self._write(request, said, request.cached - 1, request.cached)
            news.append(self._draw(request, said))
        for chunk in plan.chunks:  # a layer writes everything before it reads anything
            self._write(chunk.request, chunk.request.tokens, chunk.start, chunk.end, check=False)
        for chunk in plan.chunks:
            self._check(chunk.request, chunk.request.tokens, chunk.end)
            if chunk.last:
                assert chunk.request.answer == self.drawn[chunk.request]
                if chunk.request not in self.begun:
                    self.begun.append(chunk.request)
                news.append(self._draw(chunk.request, chunk.request.tokens))
        if news:
            self.sent.append(news)
            self.steps += 1
        self.read(self.lag if news else 0)
        return plan

    def read(self, keep: int) -> None:
        while len(self.sent) > keep:
            for request, token in self.sent.pop(0):
                if self.ends[request] < 0:
                    continue
                self.scheduler.feed(request, token)
                if len(request.answer) in (request.limit, self.ends[request]):
                    self.cancel(request)

    def check(self) -> None:
        """Nobody's page is lost or held by a stranger, and the queue is in order."""
        scheduler, pages = self.scheduler, self.scheduler.pages
        at_work = [*scheduler.reading, *scheduler.running, *scheduler.ending]
        holders = [0] * pages.count
        for request in at_work:
            assert len(set(request.pages)) == len(request.pages)
            for page in request.pages:
                holders[page] += 1
        assert holders == [pages.holders(page) for page in range(pages.count)]
        assert pages.available == holders.count(0)
        assert len(scheduler.reading) + len(scheduler.running) <= scheduler.most
        numbers = [request.number for request in scheduler.waiting]
        assert numbers == sorted(numbers)
        assert not numbers or all(request.number < numbers[0] for request in at_work), "somebody was passed"

    def _draw(self, request: Request, said: list[int]) -> tuple[Request, int]:
        token = word(said)
        self.drawn[request].append(token)
        return request, token

    def _write(self, request: Request, tokens: list[int], start: int, end: int, check: bool = True) -> None:
        for place in range(start, end):
            self.cache[request.pages[place // self.size]][place % self.size] = tokens[place]
        if check:
            self._check(request, tokens, end)

    def _check(self, request: Request, tokens: list[int], end: int) -> None:
        found = [self.cache[request.pages[place // self.size]][place % self.size] for place in range(end)]
        assert found == tokens[:end], "attends to the tokens of others"


def traffic(machine: Machine, requests: int, seed: int) -> list[Request]:
    """Random requests, some with the same beginnings, some cancelled, until all have ended."""
    chance = random.Random(seed)
    room, made = machine.scheduler.pages.count * machine.size, []
    beginnings = [[chance.randrange(50) for _ in range(chance.randrange(1, room // 2))] for _ in range(4)]
    idle = 0
    while len(made) < requests or machine.scheduler.waiting or machine.scheduler.reading or machine.scheduler.running or machine.sent:
        if len(made) < requests and chance.random() < 0.4 and len(machine.scheduler.waiting) < machine.scheduler.queue:
            tokens = chance.choice(beginnings)[: chance.randrange(1, room)] + [chance.randrange(50) for _ in range(chance.randrange(1, 9))]
            limit = chance.randrange(1, max(2, room - len(tokens) + 1))
            made.append(machine.submit(tokens, limit, chance.randrange(1, limit + 1) if chance.random() < 0.5 else 0))
        if made and chance.random() < 0.03:
            request = chance.choice(made)
            if request not in machine.done:
                machine.cancel(request)
        plan = machine.turn()
        machine.check()
        idle = 0 if plan.running or plan.chunks else idle + 1
        work = machine.scheduler.waiting or machine.scheduler.reading or machine.scheduler.running
        assert not work or idle < 3, "nothing happens"
    return made
