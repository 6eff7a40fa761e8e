"""The requests that are at work, as rows of tensors at fixed addresses, and what one step does to them.

Rows 0 to count - 1 are requests; what lies behind them up to the size of a graph takes part and leaves no trace in the cache.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ftops.engine.scheduler import Chunk, Request
from ftops.engine.table import Table, upload
from ftops.generation import rules
from ftops.generation.capture import Graphs
from ftops.generation.rules import Given


@dataclass(frozen=True)
class Prompts:
    """Parts of N prompts, one behind the other, T tokens in all, that attend to the Tk tokens that their requests then have in the cache.

    ids, positions, slots[T] int64: the tokens, their place in their request and in the cache; kept[Tk] int64: where the cache holds what is
    attended to; starts_q, starts_kv[N + 1] int32 and longest_q, longest_kv as of `ops.attention_varlen`; last[M] int64, M >= 1: the tokens
    behind which something is drawn.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    kept: torch.Tensor
    starts_q: torch.Tensor
    starts_kv: torch.Tensor
    longest_q: int
    longest_kv: int
    last: torch.Tensor


class PagedDecoder(Protocol):
    """A model with a cache of `pages` pages of `page_size` tokens. Nothing it keeps moves."""

    device: torch.device
    words: int  # of the vocabulary
    pages: int
    page_size: int
    capturable: bool  # whether `step` may run inside of a CUDA graph

    def step(self, tokens: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        """Appends tokens[B,1] as the last of lengths[B] int32 tokens a row, whose pages are page_table[B,n] int32; the logits [B,V] after
        them. A row of length 0 is none."""

    def read(self, prompts: Prompts) -> torch.Tensor:
        """Reads parts of prompts and returns the logits [M,V] after their `last` tokens."""


class Batch:
    """`rows` requests of fewer than `capacity` tokens. `news` [3,rows] float64: last token, whether it is the last, its log-probability.

    Only `forward`, `choose` and `read` are much work; no method waits for the device.
    """

    def __init__(self, decoder: PagedDecoder, rows: int, capacity: int) -> None:
        self.decoder, self.count, device = decoder, 0, decoder.device
        with torch.inference_mode(False):
            def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
                return torch.zeros(shape, dtype=dtype, device=device)

            self.ids, self.tokens, self.filled, self.drawn = zeros(rows, capacity), zeros(rows, 1), zeros(rows), zeros(rows)
            self.page_table = zeros(rows, -(-capacity // decoder.page_size), dtype=torch.int32)
            self.news = zeros(3, rows, dtype=torch.float64)
            self._count, self._place, self._logits = zeros(1), torch.arange(rows, device=device), None
        self.table = Table(rows, decoder.words, device)
        self._forwards = Graphs(device, decoder.capturable, 1)
        # What rows ask for together may change with every request, and a graph of what comes once costs more than it saves.
        self._choices = Graphs(device, decoder.capturable, 8)
        self._moved = 0

    def size(self, count: int) -> int:
        """How many rows a step over `count` requests has: where steps are captured, one of few sizes."""
        return min(1 << (count - 1).bit_length(), len(self.ids)) if self.decoder.capturable else count

    def add(self, requests: Sequence[Request], given: Sequence[Given], logits: torch.Tensor) -> None:
        """Requests whose prompts are read become the next rows: their rules, and the logits [M,V] that their next tokens are drawn from."""
        device, first, end = self.decoder.device, self.count, self.count + len(requests)
        longest, most = max(len(request.tokens) for request in requests), max(len(request.pages) for request in requests)
        ids, pages = torch.zeros((len(requests), longest), dtype=torch.int64), torch.zeros((len(requests), most), dtype=torch.int32)
        for row, request in enumerate(requests):
            ids[row, : len(request.tokens)] = torch.tensor(request.tokens)
            pages[row, : len(request.pages)] = torch.tensor(request.pages)
        self.ids[first:end, :longest].copy_(upload(ids, device))
        self.page_table[first:end, :most].copy_(upload(pages, device))
        self.filled[first:end].copy_(upload(torch.tensor([len(request.tokens) for request in requests]), device))
        self.drawn[first:end].copy_(upload(torch.tensor([len(request.tokens) - request.prompt for request in requests]), device))
        for row, one in enumerate(given, first):
            self.table.put(row, one)
        self._buffer(logits)[first:end].copy_(logits)
        self._set_count(end)

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Rows leave and the last ones take their places: (from, to) of each."""
        left = self.count - len(rows)
        gone = set(rows)
        moves = list(zip((row for row in range(left, self.count) if row not in gone), (row for row in gone if row < left), strict=True))
        if moves:
            sources, targets = upload(torch.tensor(moves), self.decoder.device).unbind(1)
            for tensor in (self.ids, self.tokens, self.filled, self.drawn, self.page_table):
                tensor.index_copy_(0, targets, tensor.index_select(0, sources))
            self.table.move(moves, sources, targets)
        self._set_count(left)
        return moves

    def grow(self, rows: Sequence[int], columns: Sequence[int], pages: Sequence[int]) -> None:
        """Row rows[i] goes on in pages[i], its columns[i]-th."""
        places = upload(torch.tensor([rows, columns, pages]), self.decoder.device)
        self.page_table.index_put_((places[0], places[1]), places[2].int())

    @torch.inference_mode()
    def forward(self, size: int, columns: int) -> None:
        """The model over the first `size` rows, none of which has more than `columns` pages."""
        lengths = torch.where(self._place[:size] < self._count, self.filled[:size], 0).int()
        logits = self.decoder.step(self.tokens[:size], lengths, self.page_table[:size, :columns])
        self._buffer(logits)[:size].copy_(logits)

    @torch.inference_mode()
    def choose(self, size: int, names: frozenset[str], logprobs: bool) -> None:
        """Draws a token for each of the first `size` rows by the rules `names`, and writes down what follows from it."""
        given, logits = self.table.rows(names, size), self._logits[:size]
        ids, filled, drawn = self.ids[:size], self.filled[:size], self.drawn[:size]
        tokens = rules.draw(given, rules.penalised(given, logits, ids, filled, drawn), drawn)
        if logprobs:
            self.news[2, :size] = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0]
        ids.scatter_(1, filled[:, None], tokens[:, None])
        filled.add_(1).clamp_(max=ids.shape[1] - 1)  # a row that is no request goes on counting
        drawn.add_(1)
        self.tokens[:size].copy_(tokens[:, None])
        rules.remember(given, tokens)
        self.news[0, :size] = tokens
        self.news[1, :size] = rules.ended(given, tokens, ids, filled, drawn)

    def step(self, requests: Sequence[Request]) -> None:
        """`forward` over all rows, which are these requests'."""
        size = self.size(self.count)
        columns = self.page_table.shape[1] if self.decoder.capturable else max(len(request.pages) for request in requests)
        self._forwards.run(size, lambda: self.forward(size, columns))

    def draw(self, names: frozenset[str], logprobs: bool) -> None:
        """`choose` for all rows."""
        if self.table.moved != self._moved:
            self._moved = self.table.moved
            self._choices.forget()
        size = self.size(self.count)
        self._choices.run((size, names, logprobs), lambda: self.choose(size, names, logprobs))

    def read(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The chunks of prompts through the model; the logits [M,V] behind the last tokens of those that end, of any token if none does."""
        return self.decoder.read(self._prompts(chunks))

    def _prompts(self, chunks: Sequence[Chunk]) -> Prompts:
        size, device = self.decoder.page_size, self.decoder.device
        slots, kept, starts_q, starts_kv, last = [], [], [0], [0], []
        for chunk in chunks:
            pages = torch.tensor(chunk.request.pages[: -(-chunk.end // size)])
            places = (pages[:, None] * size + torch.arange(size)).flatten()
            slots.append(places[chunk.start : chunk.end])
            kept.append(places[: chunk.end])
            starts_q.append(starts_q[-1] + chunk.end - chunk.start)
            starts_kv.append(starts_kv[-1] + chunk.end)
            if chunk.last:
                last.append(starts_q[-1] - 1)
        ids = torch.tensor([token for chunk in chunks for token in chunk.request.tokens[chunk.start : chunk.end]])
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        whole = upload(torch.stack((ids, positions, torch.cat(slots))), device)
        starts = upload(torch.tensor([starts_q, starts_kv], dtype=torch.int32), device)
        return Prompts(*whole, upload(torch.cat(kept), device), *starts, max(chunk.end - chunk.start for chunk in chunks),
                       max(chunk.end for chunk in chunks), upload(torch.tensor(last or [0]), device))

    def _set_count(self, count: int) -> None:
        self.count = count
        self._count.fill_(count)

    def _buffer(self, logits: torch.Tensor) -> torch.Tensor:
        """Where logits of all rows are kept, in the dtype that the model gives."""
        if self._logits is None:
            with torch.inference_mode(False):
                self._logits = torch.zeros((len(self.ids), logits.shape[1]), dtype=logits.dtype, device=logits.device)
        return self._logits
