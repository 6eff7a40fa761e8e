"""`sample` row by row from its definition, in float64, with a Philox of its own in NumPy."""
from __future__ import annotations

import math

import numpy as np
import torch


def philox(count: int, seed: int, offset: int) -> np.ndarray:
    """Words of counters 0 .. count - 1: uint64 [count, 4]. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011."""
    word = np.uint64(0xFFFFFFFF)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    counter = [np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64),
               *(np.full(count, part, np.uint64) for part in (offset & 0xFFFFFFFF, offset >> 32 & 0xFFFFFFFF))]
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [second >> np.uint64(32) ^ counter[1] ^ key[0], second & word, first >> np.uint64(32) ^ counter[3] ^ key[1], first & word]
        key = [(part + np.uint64(weyl)) & word for part, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return np.stack(counter, 1)


def distribution(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None, typical_p: float | None = None) -> np.ndarray:
    """The probabilities float64 [V] with which the tokens of one row are drawn."""
    x = logits.double().numpy()
    if temperature == 0 or top_k == 1:
        return (np.arange(len(x)) == np.argmax(x)).astype(np.float64)
    p = np.exp((x - x.max()) / temperature)
    if top_k is not None:
        p[x < np.sort(x)[::-1][min(top_k, len(x)) - 1]] = 0
    if top_p is not None:
        _, place = np.unique(-x, return_inverse=True)
        mass = np.bincount(place, p)
        above = (np.cumsum(mass) - mass) / p.sum()
        p = np.where((above < top_p)[place] | (x == x.max()), p, 0)
    if min_p is not None:
        p[np.exp((x - x.max()) / temperature) < min_p] = 0
    p /= p.sum()
    if typical_p is not None:
        with np.errstate(divide="ignore"):
            surprise = -np.log(p)
        distance = np.abs(surprise - (p[p > 0] * surprise[p > 0]).sum())
        order = np.argsort(distance, kind="stable")
        kept = order[: int((np.cumsum(p[order]) - p[order] < typical_p).sum())]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
    return p / p.sum()


def sample(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None, seed=0, offset=0):
    """argmax of ln p + Gumbel noise."""
    def of_row(option, row):
        return option[row].item() if isinstance(option, torch.Tensor) else option

    tokens = []
    for row, x in enumerate(logits.cpu()):
        options = (of_row(option, row) for option in (temperature, top_k, top_p, min_p, typical_p))
        with np.errstate(divide="ignore"):
            weight = np.log(distribution(x, *options))
        own_seed = seed + row if isinstance(seed, int) else of_row(seed, row)
        u = (philox(math.ceil(len(x) / 4), own_seed, of_row(offset, row)).reshape(-1)[: len(x)] + 0.5) / 2.0 ** 32
        tokens.append(int(np.argmax(weight - np.log(-np.log1p(-u)))))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)
