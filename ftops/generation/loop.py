"""The loop: a prompt, then one token a step for every row, given to whoever iterates while the next step already runs."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ftops.generation import rules
from ftops.generation.options import Options
from ftops.generation.session import Decoder, Reader, Session
from ftops.generation.text import Text

__all__ = ["Decoder", "Generated", "Loop"]


@dataclass(frozen=True)
class Generated:
    """What a call made. sequences[B, S + N] int64: prompt and answer; lengths[B]: tokens of each answer, its end token counted.

    logprobs[B,N] float32: of each token of the answer under the model's own distribution, 0 behind the end; cumulative_logprobs[B]: their
    sums. logits[B,N,V]: the model's, before any option; scores[B,N,V]: after all of them but temperature and filters.
    context_hidden_states[B,S,hidden]: of the prompt, what the head reads: after the final norm, 0 at padding. None where not asked for.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    logprobs: torch.Tensor | None = None
    cumulative_logprobs: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    context_hidden_states: torch.Tensor | None = None


class Loop:
    """Iterate for the tokens of each step, int64 [B] on the host; `ended` tells which rows have had their last one.

    `cancel` ends rows early. `result` after the last step. With processors or criteria, or text to stop at, the host looks at every token
    before the next step begins; otherwise one step is always ahead, and what that makes behind the end is cut off. The first `told` tokens
    of ids are left out of the result.
    """

    def __init__(self, session: Session, options: Options, ids: torch.Tensor, mask: torch.Tensor | None = None,
                 positions: torch.Tensor | None = None, counted: torch.Tensor | None = None, *, logprobs: bool = False,
                 logits: bool = False, scores: bool = False, hidden_states: bool = False, told: int = 0) -> None:
        self._session, self._options, self._ids, self._mask, self._positions = session, options, ids, mask, positions
        self._logprobs, self._logits, self._scores = logprobs, [] if logits else None, [] if scores else None
        self._hear_hidden, self._hidden, self._told = hidden_states, None, told
        self._counted = counted if counted is not None else torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.ended = torch.zeros(len(ids), dtype=torch.bool)
        self.lengths = torch.zeros(len(ids), dtype=torch.int64)
        self._text = [Text(options.tokenizer, options.stop_strings) for _ in ids] if options.stop_strings else []
        limit = options.max_new_tokens
        self._limit = int(limit.max()) if isinstance(limit, torch.Tensor) else limit

    def cancel(self, rows: list[int] | None = None) -> None:
        """Ends these rows, or all: the tokens that are made already are the last."""
        ending = torch.zeros_like(self.ended)
        ending[rows if rows is not None else slice(None)] = True
        self._end(ending)

    def __iter__(self) -> Iterator[torch.Tensor]:
        session, options = self._session, self._options
        attentive = bool(options.processors or options.criteria)
        reader = Reader(session, depth=2)
        given = rules.build(options, self._ids, self._counted, session.decoder.words)
        with session.decoder.hidden_states() if self._hear_hidden else nullcontext() as heard:
            logits = session.prefill(self._ids, self._mask, self._positions)
        if heard:
            hidden = heard[0][:, heard[0].shape[1] - (self._ids.shape[1] - self._told) :]
            self._hidden = hidden.masked_fill(~self._counted[:, self._told :, None], 0)
        given, graph = session.adopt(given, self._logprobs, not attentive)  # after the prompt, which says whether there is padding
        for count in range(self._limit):
            if count and graph is not None:
                graph.graph.replay()
                logits = graph.logits
            elif count:
                logits = session.forward()
            if self._logits is not None:
                self._logits.append(logits.float().clone())
            scores = self._choose(given, logits) if not count or graph is None or attentive else graph.scores
            if self._scores is not None:
                self._scores.append(scores.float().clone())
            reader.send()
            if graph is None and count == 1 and session.decoder.capturable and self._limit > 2:
                graph = session.capture(given, self._logprobs, not attentive)
            if len(reader.waiting) > (0 if attentive or self._text or not count else 1) or not session.news.is_cuda:
                yield self._take(reader)
                if self.ended.all():
                    return
        while reader.waiting and not self.ended.all():
            yield self._take(reader)

    def result(self) -> Generated:
        """All that was made so far."""
        session, made, prompt = self._session, int(self.lengths.max()), self._ids.shape[1]
        with torch.inference_mode():
            behind = torch.arange(made, device=session.ids.device) >= self.lengths.to(session.ids.device)[:, None]
            answer = session.ids[:, prompt : prompt + made]
            if self._options.pad_token_id is not None:
                answer = answer.masked_fill(behind, self._options.pad_token_id)
            logprobs = session.logprobs[:, :made].masked_fill(behind, 0) if self._logprobs else None
        # Made outside of inference mode, so that the caller may do with them what he likes.
        sequences = torch.cat((self._ids[:, self._told :], answer), 1)
        logprobs = None if logprobs is None else logprobs.clone()
        return Generated(sequences, self.lengths.clone(), logprobs, None if logprobs is None else logprobs.sum(-1),
                         *(torch.stack(steps[:made], 1) if steps and made else None for steps in (self._logits, self._scores)),
                         self._hidden)

    def _choose(self, given: rules.Given, logits: torch.Tensor) -> torch.Tensor:
        session, options = self._session, self._options
        if options.processors:
            seen, logits = self._seen(), logits.to(torch.float32, copy=True)
            with torch.no_grad():
                for process in options.processors:
                    logits = process(seen, logits)
        return session.choose(given, logits, self._logprobs)

    def _seen(self) -> torch.Tensor:
        """Prompt and answer so far, [B,S]; a copy, and no inference tensor."""
        return self._session.ids[:, : self._ids.shape[1] + int(self.lengths.max())].clone()

    def _take(self, reader: Reader) -> torch.Tensor:
        """The tokens of one step, once they are there."""
        tokens, ended = reader.read()
        self.lengths += ~self.ended
        before, self.ended = self.ended, self.ended | ended.bool()
        stopped = torch.zeros_like(self.ended)
        for row, text in enumerate(self._text):
            if not before[row]:
                text.add(int(tokens[row]))
                stopped[row] = text.stops()
        if self._options.criteria:
            seen = self._seen()
            for criterion in self._options.criteria:
                stopped |= torch.as_tensor(criterion(seen, None)).cpu().expand(len(stopped))
        if (stopped & ~self.ended).any():
            self._end(stopped)
        return tokens

    def _end(self, rows: torch.Tensor) -> None:
        self.ended = self.ended | rows
        self._session.end(rows.to(self._session.ended.device))
