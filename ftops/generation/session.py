"""Tensors at fixed addresses for one batch size and length, and the CUDA graphs of a decode step that were captured over them."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from ftops.generation import rules
from ftops.generation.capture import capture
from ftops.generation.rules import Given


class Decoder(Protocol):
    """A model with its cache for one batch size and a fixed number of tokens. Nothing it keeps moves between prompts."""

    device: torch.device
    words: int  # of the vocabulary
    capturable: bool  # whether `step` may run inside of a CUDA graph

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """Forgets what was there, reads ids[B,S] of which mask[B,S] are tokens, and returns the logits [B,V] after the last."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends tokens[B,1] and returns the logits [B,V] after them."""

    def hidden_states(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Inside of it, the list gets what the head reads of each prompt: [B,S,hidden], the last layer's output after the final norm."""

    def shape(self) -> tuple[object, ...]:
        """What a captured step hangs on besides addresses."""


@dataclass
class Captured:
    graph: torch.cuda.CUDAGraph
    given: Given
    logits: torch.Tensor
    scores: torch.Tensor | None


class Session:
    """The state of one batch while it is generated. `news` [2,B] int64 holds the last tokens and which rows have ended.

    Only `prefill` and `advance` touch the device; neither waits for it.
    """

    def __init__(self, decoder: Decoder, batch: int, capacity: int) -> None:
        self.decoder, self.batch, self.capacity = decoder, batch, capacity
        with torch.inference_mode(False):
            def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
                return torch.zeros(shape, dtype=dtype, device=decoder.device)

            self.ids, self.filled, self.drawn = zeros(batch, capacity), zeros(1), zeros(1)
            self.tokens, self.ended, self.news = zeros(batch, 1), zeros(batch, dtype=torch.bool), zeros(2, batch)
            self.logprobs = zeros(batch, capacity, dtype=torch.float32)
        self._captured: dict[tuple, Captured] = {}

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """Puts the prompt ids[B,S] in place and returns the logits [B,V] after it."""
        self.ids.zero_()
        self.ids[:, : ids.shape[1]] = ids
        self.filled.fill_(ids.shape[1])
        self.drawn.zero_()
        self.ended.zero_()
        return self.decoder.prefill(ids, mask, positions)

    @torch.inference_mode()
    def choose(self, given: Given, logits: torch.Tensor, logprobs: bool) -> torch.Tensor:
        """Draws a token from logits[B,V] for each row and writes down what follows from it. Returns the scores [B,V] it was drawn by."""
        scores = rules.penalised(given, logits, self.ids, self.filled, self.drawn)
        tokens = rules.draw(given, scores, self.drawn)
        if logprobs:
            self.logprobs.index_copy_(1, self.drawn, torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None]))
        if "pad" in given:
            tokens = torch.where(self.ended, given["pad"], tokens)
        self.ids.index_copy_(1, self.filled, tokens[:, None])
        self.filled.add_(1)
        self.drawn.add_(1)
        self.tokens.copy_(tokens[:, None])
        rules.remember(given, tokens)
        self.ended.logical_or_(rules.ended(given, tokens, self.ids, self.filled, self.drawn))
        self.news.copy_(torch.stack((tokens, self.ended.long())))
        return scores

    @torch.inference_mode()
    def forward(self) -> torch.Tensor:
        """The logits [B,V] after the last tokens."""
        return self.decoder.step(self.tokens)

    def end(self, rows: torch.Tensor) -> None:
        """Rows [B] bool have their last token."""
        with torch.inference_mode():
            self.ended.logical_or_(rows)

    def adopt(self, given: Given, logprobs: bool, whole: bool) -> tuple[Given, Captured | None]:
        """The tensors of `given` at the addresses of a graph that has been captured for their like, and that graph; or both as they are.

        whole: the graph chooses tokens as well; otherwise it is the decoder's step alone.
        """
        captured = self._captured.get(self._key(given, logprobs, whole))
        if captured is None:
            return given, None
        with torch.inference_mode():
            for name, tensor in given.items():
                captured.given[name].copy_(tensor)
        return captured.given, captured

    def capture(self, given: Given, logprobs: bool, whole: bool) -> Captured:
        """One decode step as a CUDA graph. Every kernel in it must have run before."""
        with capture(self.decoder.device) as graph:
            logits = self.forward()
            scores = self.choose(given, logits, logprobs) if whole else None
        self._captured[self._key(given, logprobs, whole)] = captured = Captured(graph, given, logits, scores)
        return captured

    def _key(self, given: Given, logprobs: bool, whole: bool) -> tuple:
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in given.items()) if whole else ()
        return whole, logprobs and whole, self.decoder.shape(), shapes


class Reader:
    """Tokens on their way to the host: `send` copies a session's news behind the work so far, `read` gives the oldest copy.

    On a GPU up to `depth` copies are on their way, so that the next step is launched before the last one has been looked at.
    """

    def __init__(self, session: Session, depth: int) -> None:
        self._news, self._turn = session.news, 0
        self.waiting: list[Callable[[], torch.Tensor]] = []
        self._copies: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        if self._news.is_cuda:
            self._copies = [(torch.empty_like(self._news, device="cpu", pin_memory=True), torch.cuda.Event()) for _ in range(depth)]

    def send(self) -> None:
        if not self._copies:
            news = self._news.clone()
            self.waiting.append(lambda: news)
            return
        copy, event = self._copies[self._turn % len(self._copies)]
        self._turn += 1
        copy.copy_(self._news, non_blocking=True)
        event.record(torch.cuda.current_stream(self._news.device))
        self.waiting.append(lambda: (event.synchronize(), copy.clone())[1])

    def read(self) -> torch.Tensor:
        """[2,B] int64: tokens, and which rows have ended."""
        return self.waiting.pop(0)()
