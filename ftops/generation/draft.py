"""Speculative decoding with a draft model: a smaller model writes D tokens ahead, and the model checks all of them in one step.

The draft model draws each token with the noise that the model will draw it with. So tokens that both find likely are drawn by both, and the
check of `lookup` holds unchanged: the answer is, token for token, the model's own under the same seed, greedy or sampled, not only one of
the same distribution. Rejection sampling (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023) accepts a
draft with probability 1 - d, where d is the total variation distance of the two distributions; common noise, the Gumbel coupling, with at
least (1 - d) / (1 + d) (Daliri et al., "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024): at d = 0.1 that
is 0.82 where 0.9 is possible. Kept are the seed's promise, a check without probabilities of the whole vocabulary, and one rule for drafts
of any kind.
"""
from __future__ import annotations

from typing import Protocol

import torch

from ftops.generation.lookup import LookupDecoder, LookupSession, draw
from ftops.generation.rules import Given


class DraftDecoder(Protocol):
    """A model of the same vocabulary with its cache, that can write over what it read too much."""

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """As of a `Decoder`."""

    def read(self, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Reads tokens[B,T], T 1 or 2, of which row b's last is number ends[b] of its text, and returns the logits [B,V] after them."""


class DraftSession(LookupSession):
    """A LookupSession whose drafts `draft` writes; on a GPU they and the check are one graph."""

    def __init__(self, decoder: LookupDecoder, draft: DraftDecoder, batch: int, capacity: int, drafts: int) -> None:
        super().__init__(decoder, batch, capacity, drafts)
        self.draft = draft

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        self.draft.prefill(ids, mask, positions)
        return super().prefill(ids, mask, positions)

    def _drafted(self, given: Given) -> torch.Tensor:
        # Two tokens first: when all drafts were right, the last of them has not been read by the model that wrote it.
        tokens, drafts = self.ids.gather(1, self.at[:, None] - 2 + self._ahead[:2]), []
        for ahead in range(self.drafts):
            tokens = draw(given, self.draft.read(tokens, self.at + ahead), self.made[:, None] + ahead)
            drafts.append(tokens)
        return torch.cat(drafts, 1)
