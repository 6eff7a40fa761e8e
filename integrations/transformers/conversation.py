"""ftops.conversation: a generation that goes on from what was said before, over the cache that this has left."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ftops.generation import Generated, Loop, Session, Stream
from ftops.integrations.transformers.checks import checked, is_whole, most
from ftops.integrations.transformers.decoder import CausalDecoder, fingerprint, positions_of, unfit

CAPACITY = 4096  # tokens a row, if nothing is said and the model allows them


class Conversation:
    """Turns of one batch of talks, over one cache and the graphs that were captured for it.

    ids[B,L], mask[B,L] int64: all that has been said, with 0 in the mask at padding and behind the end of a row that ended before others.
    A turn reads its own tokens and the last one said, and answers as if all of it had been the prompt: penalties and n-grams count what was
    said before, `stop` and the limits are of the answer, and the seed draws as it would there.
    """

    def __init__(self, model: PreTrainedModel, batch: int = 1, capacity: int | None = None) -> None:
        reason = unfit(model, stays=True)
        if reason is not None:
            raise ValueError(f"conversation: {type(model).__name__} cannot be served: {reason}")
        longest = positions_of(model)
        capacity = min(longest or CAPACITY, CAPACITY) if capacity is None else capacity
        for name, value, low, high in (("batch", batch, 1, None), ("capacity", capacity, 2, longest)):
            if not is_whole(value, low, high):
                raise ValueError(f"conversation: {name} is {value!r}; allowed: {low} " + (f"to {high}, the positions of this model" if high
                                                                                         else "or more"))
        self._model, self.batch, self.capacity = model, batch, capacity
        self._session, self._made_of = Session(CausalDecoder(model, batch, capacity, True), batch, capacity), fingerprint(model)
        self.ids = torch.zeros((batch, 0), dtype=torch.int64, device=model.device)
        self.mask = self.ids.clone()
        self._read, self._busy = 0, False

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, return_logprobs: bool = False,
                 return_logits: bool = False, return_hidden_states: bool = False, **options: Any) -> torch.Tensor | Generated:
        """The next turn: input_ids[B,S], of which attention_mask[B,S] are tokens, and the answer, int64 [B, S + N].

        S may be 0 once something was said: the answer then goes on. Options are those of `ftops.stream`, results those of `ftops.generate`.
        Raises TypeError or ValueError, and RuntimeError where the model has been changed.
        """
        running = self.stream(input_ids, attention_mask, return_logprobs=return_logprobs, return_logits=return_logits,
                              return_hidden_states=return_hidden_states, **options)
        for _ in running:
            pass
        made = running.result()
        return made if return_logprobs or return_logits or return_hidden_states else made.sequences

    def stream(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, return_logprobs: bool = False,
               return_logits: bool = False, return_hidden_states: bool = False, **options: Any) -> Stream:
        """`generate` as an iterator of the tokens of each step; what has been read when it ends or is cancelled has been said."""
        said = self.ids.shape[1]
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or len(input_ids) != self.batch:
            got = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"conversation: input_ids is {got}; allowed: [{self.batch},S], the batch size that it was made for")
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for name, tensor in (("input_ids", input_ids), ("attention_mask", new)):
            if tensor.shape != input_ids.shape or tensor.device != self.ids.device:
                raise ValueError(f"conversation: {name} is {tuple(tensor.shape)} on {tensor.device}; allowed: {tuple(input_ids.shape)} on "
                                 f"{self.ids.device}")
        ids, mask = torch.cat((self.ids, input_ids), 1), torch.cat((self.mask, new), 1)
        parsed = checked(self._model, ids, mask, options)
        if fingerprint(self._model) != self._made_of:
            raise RuntimeError("conversation: the model has been changed since it began (weights, dtype, device, hooks, or patched anew); "
                               "start another one, and give it `ids` as its first turn")
        if ids.shape[1] + most(parsed) > self.capacity:
            raise ValueError(f"conversation: {said} tokens said, {input_ids.shape[1]} new ones and max_new_tokens {most(parsed)} exceed "
                             f"its capacity of {self.capacity}; ask for fewer, rewind it, or start one with a larger capacity")
        running = Stream(self._turn(lambda: running.result(), self.ids, ids, mask), lambda one: Loop(
            one, parsed, ids, mask, logprobs=return_logprobs, logits=return_logits, hidden_states=return_hidden_states, told=said))
        return running

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` of what was said, as counted by `ids.shape[1]`."""
        self._idle()
        if not isinstance(length, int) or not 0 <= length <= self.ids.shape[1]:
            raise ValueError(f"conversation: length is {length!r}; allowed: 0 to {self.ids.shape[1]}, the tokens said")
        self.ids, self.mask, self._read = self.ids[:, :length], self.mask[:, :length], min(self._read, length)

    @contextmanager
    def _turn(self, result: Callable[[], Generated], before: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[Session]:
        self._idle()
        if self.ids is not before:
            raise RuntimeError("conversation: something else was said since this turn was asked for; ask for it again")
        # At least one token is read anew, since its logits are asked for.
        self._session.decoder.kept, self._busy = min(self._read, ids.shape[1] - 1), True
        try:
            yield self._session
        finally:
            self._busy = False
            made = result()
            answer = made.sequences[:, ids.shape[1] - before.shape[1] :]
            if answer.shape[1]:
                there = torch.arange(answer.shape[1], device=ids.device) < made.lengths.to(ids.device)[:, None]
                self.ids, self.mask = torch.cat((ids, answer), 1), torch.cat((mask, there.long()), 1)
                self._read = self.ids.shape[1] - 1  # the last one has been drawn, and not read

    def _idle(self) -> None:
        if self._busy:
            raise RuntimeError("conversation: its last turn is still being read; read it to its end, or cancel it")
