"""Who is served next: plain Python over requests and pages, without a tensor, so that it can be tried by itself.

    waiting -> reading -> running -> ending
               in chunks  a token    its last token is on its way to the host
                          a step

A step gives one more token to every running request, and reads up to `chunk` tokens of prompts. Requests begin in the order in which they
came: while the first in the queue does not fit, nobody passes it. A request that begins gets pages for all of its tokens at once, those
that are known already from others, and leaves one free for each request that is at work. When a running request needs a page and there is
none, the youngest request gives its pages back and waits in front of the queue: its tokens stay, and are read again like a prompt. Every
request fits when it is alone, and the oldest one is never put back for another, so that each comes to its end.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from ftops.engine.pages import Pages, digest


class QueueFull(RuntimeError):
    """As many requests wait as the engine allows."""


class Request:
    """tokens: the prompt and what is known of the answer, which ends at `limit` tokens at the latest.

    drawn: tokens of the answer that have been ordered; cached: tokens whose keys and values are in `pages` after what has been ordered.
    """

    def __init__(self, tokens: Sequence[int], limit: int) -> None:
        self.tokens, self.prompt, self.limit = list(tokens), len(tokens), limit
        self.number = self.drawn = self.cached = 0
        self.pages: list[int] = []
        self.names: list[bytes] = []

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt:]


@dataclass(frozen=True)
class Chunk:
    """tokens[start:end] of a request are read; `last` if its next token is drawn behind them."""

    request: Request
    start: int
    end: int
    last: bool


@dataclass
class Plan:
    """One step, in this order: `put_back` leave; `grown` have one page more, their last; all running ones go on by a token; `chunks` are
    read; the requests whose prompt ends with one begin to run; `last` have had their last token and leave."""

    put_back: list[Request] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    last: list[Request] = field(default_factory=list)


class Scheduler:
    """`most` requests at a time over `pages`; `queue` wait at most; `chunk` tokens of prompts a step.

    patience: for how many steps prompts of fewer than `chunk` tokens wait for others to be read with them, while answers go on.
    """

    def __init__(self, pages: Pages, most: int, queue: int, chunk: int, patience: int = 0) -> None:
        self.pages, self.most, self.queue, self.chunk, self.patience = pages, most, queue, chunk, patience
        self.waiting: deque[Request] = deque()
        self.reading: list[Request] = []
        self.running: list[Request] = []
        self.ending: list[Request] = []
        self.preemptions = self.prefix_tokens = self._count = self._waited = 0

    def needs(self, request: Request) -> int:
        """Pages for all tokens of the request but the last, which nothing is drawn behind."""
        return -(-(request.prompt + request.limit - 1) // self.pages.size)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ValueError for one that can never fit and QueueFull, before anything is changed."""
        if self.needs(request) > self.pages.count:
            raise ValueError(
                f"submit: a prompt of {request.prompt} tokens and max_new_tokens {request.limit} need {self.needs(request)} pages of "
                f"{self.pages.size} tokens, and the cache has {self.pages.count}; shorten one of them, or make the engine with a larger "
                "cache_tokens")
        if len(self.waiting) >= self.queue:
            raise QueueFull(f"submit: {len(self.waiting)} requests wait already, as many as max_waiting allows; read some answers first, "
                            "or make the engine with a larger max_waiting")
        self._count += 1
        request.number = self._count
        self.waiting.append(request)

    def plan(self, preempt: bool = True) -> Plan | None:
        """The next step, counted as done. None, and nothing is changed, if a request would have to be put back and `preempt` is False.

        What is put back must have all its ordered tokens: read them before preempt is True.
        """
        plan, size = Plan(), self.pages.size
        plan.grown = [request for request in self.running if request.cached == len(request.pages) * size]
        while len(plan.grown) > self.pages.available:
            if not preempt:
                return None
            youngest = max((*self.reading, *self.running), key=lambda request: request.number)
            self._put_back(youngest)
            plan.put_back.append(youngest)
            plan.grown = [request for request in plan.grown if request is not youngest]
        for request in plan.grown:
            request.pages.append(self.pages.take())
        plan.running = list(self.running)
        for request in plan.running:
            request.cached += 1
        plan.chunks = self._read()
        for request in self.running:
            request.drawn += 1
        plan.last = [request for request in self.running if request.drawn == request.limit]
        if plan.last:
            self.running = [request for request in self.running if request.drawn < request.limit]
            self.ending += plan.last
        return plan

    def feed(self, request: Request, token: int) -> None:
        """The next token of the answer is known, and with it that the keys and values of all before it are in the cache."""
        request.tokens.append(token)
        cached = len(request.tokens) - 1
        if cached % self.pages.size == 0:
            self._remember(request, cached - self.pages.size, cached)

    def finish(self, request: Request) -> None:
        """The request is done with, wherever it is."""
        for group in (self.waiting, self.reading, self.running, self.ending):
            if request in group:
                group.remove(request)
        self.pages.release(request.pages)
        request.pages = []

    def _put_back(self, request: Request) -> None:
        (self.running if request in self.running else self.reading).remove(request)
        self.pages.release(request.pages)
        request.pages, request.cached = [], 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _read(self) -> list[Chunk]:
        """The chunks of this step, the oldest request's first. Pages that they fill are known at once: whoever comes behind in the same
        step may share them, since a layer writes all its keys and values before it reads any."""
        chunks, left, reading = [], self.chunk, list(self.reading)
        if self.running and self._waited < self.patience and self._unread() < self.chunk:
            self._waited += 1
            return chunks
        self._waited = 0
        while left:
            if not reading:
                if not self._begin():
                    break
                reading = [self.reading[-1]]
            request = reading.pop(0)
            start = request.cached
            request.cached = end = min(start + left, len(request.tokens))
            left -= end - start
            self._remember(request, start, end)
            last = end == len(request.tokens)
            if last:
                self.reading.remove(request)
                self.running.append(request)
            chunks.append(Chunk(request, start, end, last))
        return chunks

    def _unread(self) -> int:
        """Tokens that could be read now, as far as they count."""
        room, unread = self.most - len(self.reading) - len(self.running), sum(len(one.tokens) - one.cached for one in self.reading)
        for request in islice(self.waiting, room):
            if unread >= self.chunk:
                break
            unread += len(request.tokens)
        return unread

    def _begin(self) -> bool:
        """Takes the first of the queue in, if it fits."""
        at_work = len(self.reading) + len(self.running)
        if not self.waiting or at_work >= self.most:
            return False
        request, pages = self.waiting[0], self.pages
        self._name(request, len(request.tokens))
        shared = pages.find(request.names[: (len(request.tokens) - 1) // pages.size])  # one token must be read, to draw behind it
        needed = -(-len(request.tokens) // pages.size) - len(shared)
        if needed + sum(not pages.holders(page) for page in shared) + at_work > pages.available:
            return False
        self.waiting.popleft()
        pages.hold(shared)
        request.pages = [*shared, *(pages.take() for _ in range(needed))]
        request.cached = len(shared) * pages.size
        self.prefix_tokens += request.cached
        self.reading.append(request)
        return True

    def _name(self, request: Request, end: int) -> None:
        """Names for all full pages of tokens[:end]."""
        size, names = self.pages.size, request.names
        while (len(names) + 1) * size <= end:
            names.append(digest(names[-1] if names else b"", request.tokens[len(names) * size : (len(names) + 1) * size]))

    def _remember(self, request: Request, start: int, end: int) -> None:
        """The pages that were filled by tokens start to end - 1 can be shared from now on."""
        self._name(request, end)
        for index in range(start // self.pages.size, end // self.pages.size):
            self.pages.remember(request.pages[index], request.names[index])
