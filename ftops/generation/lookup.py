"""Prompt lookup: tokens that followed the same words earlier in the text are checked several at a time, and the tokens stay what they were.

A step reads the last token and D drafts behind it. What would have been drawn at each place is drawn there, by its own number of the noise:
drafts that are just that are kept, the first that is not is replaced, and those behind it are forgotten. So the answer is, token for token,
that of a loop without drafts, greedy or sampled. Saxena, "Prompt Lookup Decoding", 2023.
"""
from __future__ import annotations

import torch

from ftops import ops
from ftops.generation.loop import Loop
from ftops.generation.rules import Given
from ftops.generation.session import Decoder, Reader, Session

MOST = 15  # drafts: a step of ops.decode_attention has 16 new tokens at most
# What a token far ahead may hang on: itself, its place and the logits there, and nothing that the drafts before it would have changed.
SERVED = {"limit", "temperature", "seed", "top_k", "top_p", "min_p", "typical_p", "eos", "pad"}


class LookupDecoder(Decoder):
    """A decoder that reads tokens[B, 1 + D] in a step and gives logits [B, 1 + D, V]."""

    def keep(self, counts: torch.Tensor) -> None:
        """Of the last step's tokens, counts[B] int64 stay; the others are as if they had not been."""


class LookupSession(Session):
    """The state of one batch whose rows advance by 1 to 1 + D tokens a step. `news` [B, D + 3]: tokens, how many of them, row ended."""

    decoder: LookupDecoder

    def __init__(self, decoder: LookupDecoder, batch: int, capacity: int, drafts: int) -> None:
        super().__init__(decoder, batch, capacity)
        self.drafts = drafts
        with torch.inference_mode(False):
            self.at, self.made = torch.zeros_like(self.ended, dtype=torch.int64), torch.zeros_like(self.ended, dtype=torch.int64)
            self.tokens = self.tokens.repeat(1, 1 + drafts)
            self.news = self.tokens.new_zeros(batch, drafts + 3)
            self._ahead = torch.arange(1 + drafts, device=decoder.device)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        logits = super().prefill(ids, mask, positions)
        self.at.fill_(ids.shape[1])
        self.made.zero_()
        return logits

    @torch.inference_mode()
    def choose(self, given: Given, logits: torch.Tensor, logprobs: bool) -> torch.Tensor:
        """Draws at every place of logits[B, 1 + D, V], or after the prompt [B,V], and keeps what the drafts have foreseen."""
        first = logits.dim() == 2
        ahead = self._ahead[:1] if first else self._ahead
        number = self.made[:, None] + ahead
        tokens = draw(given, logits, number)
        foreseen = (tokens[:, :-1] == self.tokens[:, 1 : len(ahead)]).long().cumprod(-1).sum(-1)
        end = number + 1 >= given["limit"][:, None]
        if "eos" in given:
            end = end | (tokens[..., None] == given["eos"]).any(-1)
        counts = torch.where(self.ended, 0, torch.minimum(foreseen, (end.long().cumsum(-1) == 0).sum(-1)) + 1)
        last = (counts - 1).clamp(min=0)[:, None]
        self.ended.logical_or_(end.gather(1, last)[:, 0])
        self.ids.scatter_(1, self.at[:, None] + ahead, tokens)  # those that do not count lie behind the end, until others take their place
        self.at.add_(counts)
        self.made.add_(counts)
        if not first:
            self.decoder.keep(counts)
        self.tokens.copy_(torch.cat((tokens.gather(1, last), self._drafted(given)), 1))
        self.news[:, : len(ahead)] = tokens
        self.news[:, -2] = counts
        self.news[:, -1] = self.ended
        return logits

    def _drafted(self, given: Given) -> torch.Tensor:
        """[B,D]: what followed the last two tokens where they were said last, or else the last one; anything where they are new."""
        place = torch.arange(self.capacity, device=self.ids.device)
        one = (self.ids == self.ids.gather(1, self.at[:, None] - 1)) & (place < self.at[:, None] - 1)
        two = one & (self.ids.roll(1, 1) == self.ids.gather(1, (self.at[:, None] - 2).clamp(min=0))) & (place > 0)
        best = torch.where(two, place + self.capacity, torch.where(one, place, -1)).amax(1) % self.capacity
        return self.ids.gather(1, (best[:, None] + self._ahead[1:]).clamp(max=self.capacity - 1))


def draw(given: Given, logits: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Tokens [B,T] from logits[B,T,V] ([B,V]: T is 1), each by the noise of its number[B,T]."""
    rows = {name: given[name].repeat_interleave(number.shape[1]) for name in ("temperature", "seed", "top_k", "top_p", "min_p", "typical_p")
            if name in given}
    return ops.sample(logits.view(-1, logits.shape[-1]), offset=number.flatten(), **rows).view(number.shape)


class LookupLoop(Loop):
    """Iterate for the news of each step."""

    def _take(self, reader: Reader) -> torch.Tensor:
        news = reader.read()
        self.lengths += news[:, -2]
        self.ended = self.ended | news[:, -1].bool()
        return news
