"""A request as its owner sees it: tokens or text as they come, an end at any time, and the whole answer."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ftops.engine.scheduler import Request
from ftops.generation.options import Options
from ftops.generation.text import Text

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Answer:
    """tokens: the end token included. reason: "stop" for an end token or something to stop at, "length" for max_new_tokens, "cancelled"
    also where the engine was closed. logprobs: of each token under the model's own distribution, if they were asked for."""

    tokens: list[int]
    reason: Reason
    logprobs: list[float] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        return None if self.logprobs is None else sum(self.logprobs)


class Handle:
    """Iterate, once, for the tokens of the answer; `text` instead for its text. Any thread may, and may `cancel`.

    If the engine fails, iterating and `result` raise RuntimeError from what went wrong.
    """

    def __init__(self, request: Request, options: Options, logprobs: bool, lock: threading.Lock,
                 cancel: Callable[[Handle], None]) -> None:
        self.request, self.options = request, options
        self.row: int | None = None  # the engine's, and so are all but the public methods
        self.names: frozenset[str] = frozenset()
        self._tokens: list[int] = []
        self._logprobs: list[float] | None = [] if logprobs else None
        self._reason: Reason | None = None
        self._error: BaseException | None = None
        self._told, self._readers, self._cancel = 0, 0, cancel
        self._news = threading.Condition(lock)
        self._stop = Text(options.tokenizer, options.stop_strings) if options.stop_strings else None

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._news:
            self._readers += 1
            self._news.wait_for(lambda: self._told < len(self._tokens) or self.done)
            self._readers -= 1
            if self._told < len(self._tokens):
                self._told += 1
                return self._tokens[self._told - 1]
            self._check()
            raise StopIteration

    def text(self, tokenizer: Any) -> Iterator[str]:
        """The text that tokens add to the answer, special tokens left out; characters come whole."""
        text = Text(tokenizer)
        for token in self:
            piece = text.add(token)
            if piece:
                yield piece
        rest = text.rest()
        if rest:
            yield rest

    def result(self, timeout: float | None = None) -> Answer:
        """The whole answer, once it is there. Raises TimeoutError after `timeout` seconds without."""
        with self._news:
            if not self._news.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"result: no answer within {timeout} s; {len(self._tokens)} tokens so far")
            self._check()
            return Answer(list(self._tokens), self._reason, None if self._logprobs is None else list(self._logprobs))

    def cancel(self) -> None:
        """Ends the request: the tokens that are there are the answer. Harmless if it has ended."""
        self._cancel(self)

    @property
    def done(self) -> bool:
        return self._reason is not None or self._error is not None

    @property
    def watches(self) -> bool:
        """Whether there is text to stop at."""
        return self._stop is not None

    def stops(self, token: int) -> bool:
        """Whether the text with this token holds something to stop at."""
        self._stop.add(token)
        return self._stop.stops()

    def take(self, token: int, logprob: float) -> None:
        """One more token. The lock is held in this and what follows."""
        self._tokens.append(token)
        if self._logprobs is not None:
            self._logprobs.append(logprob)
        if self._readers:  # not those who wait for the end
            self._news.notify_all()

    def end(self, reason: Reason) -> None:
        if not self.done:
            self._reason = reason
            self._news.notify_all()

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self._error = error
            self._news.notify_all()

    @property
    def logprobs(self) -> bool:
        return self._logprobs is not None

    def _check(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"the engine failed: {type(self._error).__name__}: {self._error}") from self._error
