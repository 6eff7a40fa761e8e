"""Beam search as transformers defines it, on tensors of fixed size, so that a step of it can be captured as one of sampling is.

A request has K beams, rows K b to K b + K - 1. Each step keeps the best continuations of all its beams together, twice K and more, so that
K of them go on even if others end; the K that go on each name the beam that they continue, and the decoder is told which: it keeps one
copy of what beams share. Ended sequences compete by their log-probability over length ** length_penalty.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ftops.generation import rules
from ftops.generation.rules import Given
from ftops.generation.session import Decoder, Session

LOST = -1.0e9  # transformers' score of what may not win


class BeamDecoder(Decoder):
    """A decoder that can let rows go on from what others have kept."""

    def reorder(self, parents: torch.Tensor) -> None:
        """Row r continues row parents[r], int64 [rows], both of the same request."""


@dataclass(frozen=True)
class BeamOptions:
    """beams a request; how sequences of different lengths compare; when to stop: True, with K ended sequences; False, when no running one
    would win if it ended now; "never", when none can win any more. diversity_rate: a continuation is chosen by its score plus the rate
    times its rank, from 0, among those of its own beam, as in FasterTransformer; the score that it goes on with is without. Below 0, beams
    come from more different ones (Li et al., "A Simple, Fast Diverse Decoding Algorithm for Neural Generation", 2016, gamma = -rate)."""

    beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    diversity_rate: float = 0.0


@dataclass(frozen=True)
class Beams:
    """The best sequences of each request, [requests count, prompt + N] int64, best first; scores [requests count]: their log-probability
    over length ** length_penalty; parents [requests count, N] int32: the row that each token continued, -1 behind the end."""

    sequences: torch.Tensor
    scores: torch.Tensor
    parents: torch.Tensor


class BeamSession(Session):
    """The state of one batch of requests, `batch` being all their beams. `news` says at every step whether all have their answers."""

    decoder: BeamDecoder

    def __init__(self, decoder: BeamDecoder, batch: int, capacity: int, options: BeamOptions) -> None:
        super().__init__(decoder, batch, capacity)
        self.options, requests, beams = options, batch // options.beams, options.beams
        with torch.inference_mode(False):
            device = decoder.device
            self._score = torch.zeros((requests, beams), device=device)
            self._best, self._best_score = self.ids.view(requests, beams, capacity).clone(), self._score.clone()
            self._best_length = torch.zeros((requests, beams), dtype=torch.int64, device=device)
            self._best_parent = self._best_length.clone()
            self._parents = torch.zeros((capacity, batch), dtype=torch.int64, device=device)
            self._rows = torch.arange(batch, device=device).view(requests, beams)
            self._full = torch.zeros((requests, beams), dtype=torch.bool, device=device)
            self._hopeful = torch.ones((requests, 1), dtype=torch.bool, device=device)
            self._done = torch.zeros(1, dtype=torch.bool, device=device)
            self._fill = torch.zeros((), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        logits = super().prefill(ids, mask, positions)
        self._score.fill_(LOST)[:, 0] = 0  # all beams are alike, so that the first alone continues
        self.ids[:, ids.shape[1]:] = self._fill
        self._best.copy_(self.ids.view_as(self._best))
        self._best_score.fill_(LOST)
        self._best_length.zero_()
        self._full.zero_()
        self._hopeful.fill_(True)
        self._done.zero_()
        return logits

    def fill_with(self, token: int) -> None:
        """What follows the end of a sequence. Before `prefill`."""
        with torch.inference_mode():
            self._fill.fill_(token)

    @torch.inference_mode()
    def choose(self, given: Given, logits: torch.Tensor, logprobs: bool) -> torch.Tensor:
        """Continues the beams by logits[B K, V]. Returns the log-probabilities [B K, V] of each token after all rules."""
        requests, beams = self._score.shape
        words, eos = logits.shape[1], given.get("eos")
        scores = rules.penalised(given, torch.log_softmax(logits.float(), -1), self.ids, self.filled, self.drawn)
        # Each end token, and the last of each stop sequence, ends one continuation of a beam at most: K of them are left to go on.
        keep = max(2, 1 + sum(len(given[name]) for name in ("eos", "stop") if name in given)) * beams
        chosen_by, score, parent, token = self._candidates(scores.view(requests, beams, words) + self._score[..., None], keep)
        candidates = _of(self.ids.view(requests, beams, -1), parent).index_copy(2, self.filled, token[..., None])
        made = self.drawn + 1
        ends = (made >= given["limit"].view(requests, beams)[:, :1]).expand_as(token)
        if eos is not None:
            ends = ends | (token[..., None] == eos).any(-1)
        if "stop" in given:
            ends = ends | rules.completed(given["stop"], candidates.flatten(0, 1), self.filled + 1, made).any(-1).view_as(ends)

        lost = ends.float() * LOST
        onward = torch.topk(chosen_by + lost, beams)[1]
        parents = parent + self._rows[:, :1]
        self._finish(score, candidates, parents, ends, made)
        self._score.copy_(_of(score + lost, onward))
        self._go_on(given, _of(parents, onward).flatten(), _of(token, onward), _of(candidates, onward))
        self._decide(given, ends)
        self.news.copy_(torch.stack((self.tokens[:, 0], self.ended.long())))
        return scores

    def _candidates(self, scores: torch.Tensor, keep: int) -> tuple[torch.Tensor, ...]:
        """The `keep` continuations of scores[B,K,V] that go on, best first, each [B,keep]: what they were chosen by, score, beam, token."""
        words, rate = scores.shape[2], self.options.diversity_rate
        if not rate:
            score, index = torch.topk(scores.flatten(1), keep)
            return score, score, index // words, index % words
        own, tokens = torch.topk(scores, min(keep, words))
        ranked = own + rate * torch.arange(own.shape[2], device=own.device)
        chosen_by, index = torch.topk(ranked.flatten(1), keep)
        return chosen_by, own.flatten(1).gather(1, index), index // own.shape[2], tokens.flatten(1).gather(1, index)

    def _finish(self, score: torch.Tensor, candidates: torch.Tensor, parents: torch.Tensor, ends: torch.Tensor, made: torch.Tensor) -> None:
        """The best K of the sequences that had ended and of those that end now, among the first K continuations."""
        options = self.options
        beams = options.beams
        ends = ends & (torch.arange(ends.shape[1], device=ends.device) < beams)
        score = score / made.float() ** options.length_penalty
        if options.early_stopping is True:
            score = score + self._full.all(-1, keepdim=True).float() * LOST
        score = score + (~self._hopeful).float() * LOST + (~ends).float() * LOST
        merged = torch.cat((self._best_score, score), 1)
        order = torch.topk(merged, beams)[1]
        lengths = torch.cat((self._best_length, made.expand_as(score)), 1)
        for state, both in ((self._best, torch.cat((self._best, candidates), 1)), (self._best_score, merged), (self._best_length, lengths),
                            (self._best_parent, torch.cat((self._best_parent, parents), 1)),
                            (self._full, torch.cat((self._full, ends), 1))):
            state.copy_(torch.where(self._done, state, _of(both, order)))

    def _go_on(self, given: Given, parents: torch.Tensor, token: torch.Tensor, sequences: torch.Tensor) -> None:
        self._parents.index_copy_(0, self.drawn, parents[None])
        self.ids.copy_(sequences.view_as(self.ids))
        self.tokens.copy_(token.view(-1, 1))
        self.filled.add_(1)
        self.drawn.add_(1)
        for name in ("seen", "counts"):
            if name in given:
                given[name].copy_(given[name][parents])
        rules.remember(given, token.flatten())
        self.decoder.reorder(parents)

    def _decide(self, given: Given, ends: torch.Tensor) -> None:
        """Whether a running beam can still change the answer; if none can, for no request, all is done."""
        options = self.options
        never = options.early_stopping == "never" and options.length_penalty > 0
        farthest = given["limit"].view_as(self._score)[:, :1] if never else self.drawn
        reachable = self._score.amax(1, keepdim=True) / farthest.float() ** options.length_penalty
        worst = torch.where(self._full, self._best_score.amin(1, keepdim=True), LOST)
        self._hopeful.logical_and_((reachable > worst).any(-1, keepdim=True))
        over = ~self._hopeful.any() | ends.all()
        if options.early_stopping is True:
            over = over | self._full.all()
        self._done.logical_or_(over)
        self.ended.copy_(self._done.expand_as(self.ended))

    def best(self, prompt: int, count: int) -> Beams:
        """The `count` best sequences of each request."""
        with torch.inference_mode():
            length = self._best_length[:, :count].flatten()
            longest = int(length.max())
            rows, parents = self._best_parent[:, :count].flatten(), []
            for step in reversed(range(longest)):
                parents.insert(0, torch.where(step < length, rows, -1))
                rows = torch.where(step < length, self._parents[step - 1, rows], rows)
            found = self._best[:, :count, : prompt + longest].flatten(0, 1), self._best_score[:, :count].flatten(), torch.stack(parents, 1)
        return Beams(found[0].clone(), found[1].clone(), found[2].int())


def _of(x: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """x[B,n,...] at beams[B,m] of each request: [B,m,...]."""
    index = beams.view(*beams.shape, *(1,) * (x.dim() - 2))
    return torch.take_along_dim(x, index, 1)
