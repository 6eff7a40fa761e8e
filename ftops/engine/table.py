"""The rules of many requests as one set of tensors, a row each: a row that does not ask for a rule has the value that changes nothing."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ftops.generation.rules import Given

# What `rules.build` makes with a dimension of one a row. The others are of all rows there, and get one here.
_ROWS = {"limit", "temperature", "seed", "top_p", "min_p", "typical_p", "top_k", "top_p_initial", "top_p_decay", "top_p_min",
         "top_p_reset_ids", "repetition", "seen", "presence", "frequency", "counts", "ngram", "least"}
# Changes nothing; 0 where not said. A mass of 2 keeps every token, where one of 1 loses those that rounding hides.
_NOTHING = {"top_p": 2.0, "top_p_initial": 2.0, "typical_p": 2.0, "top_p_decay": 1.0, "top_p_reset_ids": -1, "repetition": 1.0, "eos": -1}
_SEQUENCES = {"stop", "biased_words", "bad_words"}  # of tokens, the last of each in the last column
_LOOK_BACK = "ngram_offsets"  # of all rows: as far back as any of them looks


class Table:
    """Tensors [rows, ...] at fixed addresses for as long as no request comes with longer sequences than any before; `moved` counts that."""

    def __init__(self, rows: int, words: int, device: torch.device) -> None:
        self._rows, self._words, self._device = rows, words, device
        self._tensors: Given = {}
        self._asked: list[set[str]] = [set() for _ in range(rows)]  # where a row may be another than what changes nothing
        self.moved = 0

    def put(self, row: int, given: Given) -> None:
        """What `rules.build` made for one request, on the CPU, becomes row `row`."""
        for name in self._asked[row] - given.keys():
            self._tensors[name][row].fill_(self._nothing(name))
        self._asked[row] = given.keys() - {_LOOK_BACK}
        for name, value in given.items():
            if name == _LOOK_BACK:
                if name not in self._tensors or len(value) > len(self._tensors[name]):
                    self._tensors[name], self.moved = upload(value, self._device), self.moved + 1
                continue
            if name in _ROWS or (name == "bias" and value.dim() == 2):
                value = value[0]
            place = self._room(name, value)[row]
            if place.numel() == 1:
                place.fill_(value.item())
                continue
            whole = torch.full(place.shape, self._nothing(name), dtype=place.dtype)
            if name in _SEQUENCES:
                whole[: len(value)] = -1  # in front of a sequence anything goes
                whole[: len(value), place.shape[1] - value.shape[1]:] = value
            else:
                whole[: len(value)] = value
            place.copy_(upload(whole, self._device))

    def move(self, moves: Sequence[tuple[int, int]], sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Rows `targets` become what rows `sources` are, these being the pairs `moves`."""
        for source, target in moves:
            self._asked[target] = set(self._asked[source])
        for name, tensor in self._tensors.items():
            if name != _LOOK_BACK:
                tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def rows(self, names: frozenset[str], count: int) -> Given:
        """The first `count` rows of the rules `names`."""
        return {name: self._tensors[name] if name == _LOOK_BACK else self._tensors[name][:count] for name in sorted(names)}

    def _nothing(self, name: str) -> float:
        # A stop sequence of a token that is no word is never said; a sequence that adds 0 may be of any token.
        return self._words if name in ("stop", "top_k") else _NOTHING.get(name, 0)

    def _room(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The tensor of `name`, made larger if a row of it does not hold `value`."""
        have = self._tensors.get(name)
        if have is not None and all(one >= other for one, other in zip(have.shape[1:], value.shape, strict=True)):
            return have
        sizes = tuple(value.shape)
        if name not in _ROWS and name not in ("bias", "biased", "bad", "no_eos"):  # lists: by doubling, so that this does not happen often
            sizes = tuple(1 << (size - 1).bit_length() for size in sizes)
        if have is not None:
            sizes = tuple(map(max, sizes, have.shape[1:]))
        with torch.inference_mode(False):
            room = torch.full((self._rows, *sizes), self._nothing(name), dtype=value.dtype, device=self._device)
        if have is not None:
            if name in _SEQUENCES:
                real = have[..., -1:] != self._nothing(name) if name == "stop" else torch.ones_like(have[..., -1:], dtype=torch.bool)
                room[:, : have.shape[1]] = torch.where(real, -1, self._nothing(name))
                room[:, : have.shape[1], sizes[1] - have.shape[2]:] = have
            else:
                room[tuple(slice(0, size) for size in have.shape)] = have
        self._tensors[name], self.moved = room, self.moved + 1
        return room


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
