"""A generation that is read while it runs: tokens or text, step by step, and an end at any time."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from ftops.generation.loop import Generated, Loop
from ftops.generation.session import Session
from ftops.generation.text import Text


class Stream:
    """Iterate, once, for the tokens of each step, int64 [B]; rows that have ended have pad_token_id.

    Nothing runs before the first step is asked for, and on a GPU one step is always ahead of what is read. `cancel` ends rows; so does
    leaving the loop, which ends them all. `result` is what has been made, also after that.
    """

    def __init__(self, session: AbstractContextManager[Session], make: Callable[[Session], Loop]) -> None:
        self._steps, self._loop, self._result = self._run(session, make), None, None

    def _run(self, session: AbstractContextManager[Session], make: Callable[[Session], Loop]) -> Iterator[torch.Tensor]:
        with session as own:
            self._loop = make(own)
            try:
                yield from self._loop
            finally:
                self._result = self._loop.result()  # before another call may use the session

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._steps

    def text(self, tokenizer: Any) -> Iterator[list[str]]:
        """Iterate this instead for the text that each step adds to each row, special tokens left out; characters come whole."""
        rows: list[Text] | None = None
        for tokens in self._steps:
            if rows is None:
                rows, before = [Text(tokenizer) for _ in tokens], torch.zeros(len(tokens), dtype=torch.bool)
            ended = self.ended
            yield [row.add(int(token)) + (row.rest() if end else "") if not gone else ""
                   for row, token, end, gone in zip(rows, tokens, ended, before, strict=True)]
            before = ended

    @property
    def ended(self) -> torch.Tensor:
        """bool [B]: rows that have had their last token. None before the first step."""
        return None if self._loop is None else self._loop.ended

    def cancel(self, rows: list[int] | None = None) -> None:
        """Ends these rows, or all: the tokens that have been read are their last."""
        if rows is None or self._loop is None:
            self._steps.close()
        else:
            self._loop.cancel(rows)

    def result(self) -> Generated:
        """What has been made so far. Raises RuntimeError before the first step."""
        if self._result is not None:
            return self._result
        if self._loop is None:
            raise RuntimeError("Stream: result before the first step; iterate first")
        return self._loop.result()
