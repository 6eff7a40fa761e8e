"""Many requests over one model and one cache, each of which gets the tokens that it would get alone.

A thread of the engine's own makes the steps, from the first request to the last and no longer: whoever reads an answer slowly, or not at
all, holds up nobody else, and on a GPU the next step is always launched before the last one is looked at. It ends when there is nothing
left to do, so that an engine that nobody closes leaves no thread behind. What other threads may touch, and what they may read, is kept
under one lock; tensors are the thread's alone.
"""
from __future__ import annotations

import atexit
import contextlib
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftops.engine.batch import Batch, PagedDecoder
from ftops.engine.handle import Handle
from ftops.engine.pages import Pages
from ftops.engine.scheduler import Plan, Request, Scheduler
from ftops.generation import rules
from ftops.generation.options import Options
from ftops.generation.session import Reader

# Steps for which prompts gather before they are read beside answers, where a step is a replay: reading launches every kernel by itself, as
# a step that is no replay does, and that took the host 14.5 ms for an 8B model, however few tokens there were.
PATIENCE = 4


@dataclass(frozen=True)
class Stats:
    """Requests now; pages now: free + cached + held are all; since the beginning: how often a request was put back, tokens of prompts that
    were found in the cache, steps, and tokens of answers."""

    waiting: int
    running: int
    pages: int
    free_pages: int
    cached_pages: int
    held_pages: int
    preemptions: int
    prefix_tokens: int
    steps: int
    tokens: int


class Engine:
    """Serves `most` requests at a time, of `length` tokens each at most, prompt and answer; `queue` more may wait.

    chunk: tokens of prompts that one step reads. Use it as a context manager, or `close` it.
    """

    def __init__(self, decoder: PagedDecoder, most: int, queue: int, length: int, chunk: int) -> None:
        self._decoder, self._length = decoder, length
        patience = PATIENCE if decoder.capturable else 0
        self._scheduler = Scheduler(Pages(decoder.pages, decoder.page_size), most, queue, chunk, patience)
        self._batch = Batch(decoder, most, length + 1)
        self._reader = Reader(self._batch, depth=2)
        self._lock = threading.Lock()
        self._handles: dict[Request, Handle] = {}  # those that have not ended
        self._rows: list[Handle] = []
        self._leaving: set[Handle] = set()  # rows of requests that have ended
        self._sent: list[list[Handle]] = []  # whose tokens each of the reader's copies has
        self._cancelled: list[Handle] = []
        self._asked: Counter[tuple[frozenset[str], bool]] = Counter()  # rules and log-probabilities, of how many rows
        self._steps, self._tokens, self._closed, self._exiting = 0, 0, False, False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._at_work = False

    def submit(self, tokens: Sequence[int], options: Options, logprobs: bool = False) -> Handle:
        """Queues a prompt. Raises ValueError for one that can never be served, QueueFull, or RuntimeError after `close` or a failure."""
        limit = int(options.max_new_tokens)
        if len(tokens) + limit > self._length:
            raise ValueError(f"submit: a prompt of {len(tokens)} tokens and max_new_tokens {limit} exceed the {self._length} tokens of "
                             "max_length; shorten one of them, or make the engine with a larger max_length")
        request = Request(tokens, limit)
        handle = Handle(request, options, logprobs, self._lock, self._cancel)
        with self._lock:
            if self._error is not None:
                raise RuntimeError(f"submit: the engine failed, {type(self._error).__name__}: {self._error}; make another") from self._error
            if self._closed:
                raise RuntimeError("submit: the engine is closed; make another")
            self._scheduler.submit(request)
            self._handles[request] = handle
            if not self._at_work:
                self._at_work = True
                self._thread = threading.Thread(target=self._run, name="ftops.Engine", daemon=True)
                atexit.register(self._at_exit)  # before the interpreter takes the thread's world away
                self._thread.start()
        return handle

    def stats(self) -> Stats:
        with self._lock:
            scheduler, pages = self._scheduler, self._scheduler.pages
            return Stats(len(scheduler.waiting), len(scheduler.reading) + len(scheduler.running) + len(scheduler.ending), pages.count,
                         pages.free, pages.idle, pages.count - pages.available, scheduler.preemptions, scheduler.prefix_tokens, self._steps,
                         self._tokens)

    def close(self) -> None:
        """Cancels every request, waits for the step at hand and lets the cache go. Again is harmless."""
        with self._lock:
            self._closed = True
            for handle in self._handles.values():
                self._cancel_one(handle)
            thread = self._thread
        if thread is not None:
            thread.join()
        self._batch = self._reader = self._decoder = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cancel(self, handle: Handle) -> None:
        with self._lock:
            self._cancel_one(handle)

    def _cancel_one(self, handle: Handle) -> None:
        """The handle ends at once; what it has of the cache is let go by the thread, which may be about to use it. The lock is held."""
        if not handle.done:
            handle.end("cancelled")
            self._cancelled.append(handle)

    def _run(self) -> None:
        """The thread: steps, until there is nothing left to do."""
        device = self._decoder.device
        try:
            with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                while self._turn():
                    pass
        except BaseException as error:  # whatever it is, it must reach those who wait
            with self._lock:
                self._error, self._at_work = error, False
                for handle in list(self._handles.values()):
                    handle.fail(error)
                    self._retire(handle)
        if not self._exiting:
            atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        self._exiting = True
        self.close()

    def _turn(self) -> bool:
        """One step, and the news of the one before. False, and the thread is to end, if there is nothing to do."""
        plan = self._plan(preempt=not self._sent)
        if plan is None:  # what is put back must have all of its tokens
            self._read(0)
            plan = self._plan(preempt=True)
        with self._lock:
            if not self._handles and not self._sent:
                self._at_work = False
                return False
        drawn = self._launch(plan)
        self._read(1 if drawn and self._decoder.capturable else 0)
        return True

    def _plan(self, preempt: bool) -> Plan | None:
        with self._lock:
            for handle in self._cancelled:
                self._retire(handle)
            self._cancelled.clear()
            return self._scheduler.plan(preempt)

    def _launch(self, plan: Plan) -> bool:
        """Orders all that is planned; whether tokens are drawn."""
        batch, handles = self._batch, self._handles
        back = {handles[request] for request in plan.put_back}
        self._remove({handle for handle in self._leaving | back if handle.row is not None})
        self._leaving.clear()
        if plan.grown:
            batch.grow([handles[request].row for request in plan.grown], [len(request.pages) - 1 for request in plan.grown],
                       [request.pages[-1] for request in plan.grown])
        if plan.running:
            batch.step(plan.running)
        if plan.chunks:
            logits, begun = batch.read(plan.chunks), [chunk.request for chunk in plan.chunks if chunk.last]
            if begun:
                self._begin([handles[request] for request in begun], logits)
        if self._rows:
            self._steps += 1
            batch.draw(frozenset().union(*(names for names, _ in self._asked)), any(logprobs for _, logprobs in self._asked))
            self._reader.send()
            self._sent.append(list(self._rows))
        self._remove({handles[request] for request in plan.last})
        return bool(plan.running or plan.chunks)

    def _begin(self, handles: Sequence[Handle], logits: torch.Tensor) -> None:
        """These have been read, and get a row."""
        rows = []
        for handle in handles:
            request = handle.request
            tokens = torch.tensor(request.tokens)
            prompt, answer = tokens[None, : request.prompt], tokens[request.prompt:]
            given = rules.build(handle.options, prompt, torch.ones_like(prompt, dtype=torch.bool), self._decoder.words)
            given.pop("pad", None)
            for token in answer[:, None]:  # of one that was put back
                rules.remember(given, token)
            handle.row, handle.names = len(self._rows), frozenset(given)
            self._asked[handle.names, handle.logprobs] += 1
            self._rows.append(handle)
            rows.append(given)
        self._batch.add([handle.request for handle in handles], rows, logits)

    def _remove(self, handles: set[Handle]) -> None:
        """These no longer have a row."""
        if not handles:
            return
        moves = self._batch.remove([handle.row for handle in handles])
        for source, target in moves:
            self._rows[target] = self._rows[source]
            self._rows[target].row = target
        del self._rows[self._batch.count:]
        for handle in handles:
            handle.row = None
        self._asked -= Counter((handle.names, handle.logprobs) for handle in handles)

    def _read(self, keep: int) -> None:
        """Takes the tokens of all steps but the last `keep`."""
        while len(self._sent) > keep:
            news, handles = self._reader.read(), self._sent.pop(0)
            tokens, (ended, logprobs) = news[0].long().tolist(), news[1:].tolist()
            stopped = {handle for handle, token in zip(handles, tokens, strict=False)
                       if handle.watches and not handle.done and handle.stops(token)}
            with self._lock:
                for handle, token, end, logprob in zip(handles, tokens, ended, logprobs, strict=False):
                    if handle.done:
                        continue
                    self._scheduler.feed(handle.request, token)
                    handle.take(token, logprob)
                    self._tokens += 1
                    if end or handle in stopped:
                        request = handle.request
                        full = len(request.answer) == request.limit and handle not in stopped and token not in handle.options.eos
                        handle.end("length" if full else "stop")
                        self._retire(handle)

    def _retire(self, handle: Handle) -> None:
        """The request has its answer: its pages may serve others from the next step on, before which its row leaves. The lock is held."""
        if self._handles.pop(handle.request, None) is not None:
            self._scheduler.finish(handle.request)
            if handle.row is not None:
                self._leaving.add(handle)
