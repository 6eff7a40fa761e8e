"""One token out of each row of logits, at the row's own temperature, filters and seed; exact, and the same whatever the batchmates.

    kept    top_k: x_i >= the k-th largest x.    min_p: p_i >= min_p max p.    top_p: the mass of all j with x_j > x_i is < top_p,
            where p = softmax(x / T) over what top_k keeps. Equal logits are kept or dropped together.
    token = argmax over kept i of x_i / T - ln E_i,    E_i = -ln(1 - u_i),    u_i = (r_i + 1/2) / 2^32       (Gumbel, 1954)
            r_i = word i % 4 of Philox-4x32-10 with key seed and counter (i // 4, 0, offset)                (Salmon et al., 2011)
    T = 0 or top_k = 1: the largest logit, and of equals the first.

-ln E_i is a Gumbel variate, so token i comes with probability p_i / sum of the kept p. Noise belongs to (seed, offset, i), so the token
does not hang on how the row is walked.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch

from ftops.op import DTYPES, Case, check_beside, check_tensors, invalid, register, straight
from ftops.samples import randn

GREEDY_BELOW = 1e-5  # temperatures below count as 0: 1 / T would leave float32
_WORD = 0xFFFFFFFF


def philox(blocks: int, seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10 of counters (0 .. blocks - 1, 0, offset) under key seed[B], offset[B] int64: int64 [B, 4 blocks], 32 bits each."""
    def half(x: torch.Tensor, shift: int) -> torch.Tensor:
        return (x >> shift) & _WORD

    def multiply(x: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:  # high and low word, int64 being a bit too narrow
        high = (x * (by >> 16) + ((x * (by & 0xFFFF)) >> 16)) >> 16
        return high & _WORD, (x * by) & _WORD

    index = torch.arange(blocks, device=seed.device).expand(len(seed), blocks)
    a, b, c, d = index, torch.zeros_like(index), half(offset, 0)[:, None].expand_as(index), half(offset, 32)[:, None].expand_as(index)
    low, high = half(seed, 0)[:, None], half(seed, 32)[:, None]
    for _ in range(10):
        (a_high, a_low), (c_high, c_low) = multiply(a, 0xD2511F53), multiply(c, 0xCD9E8D57)
        a, b, c, d = c_high ^ b ^ low, c_low, a_high ^ d ^ high, a_low
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return torch.stack((a, b, c, d), -1).flatten(1)


def noise(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-log2 E of the words r. -log1p(-u), because the small E decide and must not be rounded to multiples of 2^-24."""
    return -torch.log2(-torch.log1p(-((words.to(dtype) + 0.5) * 2.0 ** -32)))


def keep(x: torch.Tensor, scale: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None,
         typical_p: torch.Tensor | None = None) -> torch.Tensor:
    """bool [B,V]: what the filters keep of x[B,V], scale[B,1] = 1 / (T ln 2), applied in transformers' order.

    typical_p: the tokens whose -ln p is nearest to the entropy, until their mass reaches it (Meister et al., 2023).
    """
    kept = torch.ones_like(x, dtype=torch.bool)
    if top_k is not None:
        place = top_k.clamp(1, x.shape[1]).long()[:, None] - 1
        kept = x >= x.sort(-1, descending=True).values.gather(1, place)
    top = x.amax(-1, keepdim=True)
    if top_p is not None:
        kept &= _until(x, torch.exp2((x - top) * scale).masked_fill(~kept, 0), top_p)
    if min_p is not None:
        kept &= (x - top) * scale >= torch.log2(min_p)[:, None].to(x.dtype)
    if typical_p is not None:
        p = torch.softmax((x * scale * 0.6931471805599453).masked_fill(~kept, float("-inf")), -1)
        surprise = -torch.log(p)
        entropy = (p * surprise.masked_fill(p == 0, 0)).sum(-1, keepdim=True)
        # transformers keeps the token that crosses the limit, and so does "mass before it < limit".
        kept &= _until(-(surprise - entropy).abs(), p, typical_p)
    return kept


def _until(order: torch.Tensor, mass: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """bool: the mass of everything of a larger `order` is less than `limit` of the whole. Equals stand and fall together."""
    order, index = order.sort(-1, descending=True)
    mass = mass.gather(1, index)
    before = mass.cumsum(-1) - mass
    count = (before < limit[:, None] * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp(min=1)
    lowest = order.gather(1, count - 1)
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, index, order >= lowest)


def reference(x: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
              min_p: torch.Tensor | None, seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.masked_fill(x.isnan(), float("-inf"))
    first = x.argmax(-1)
    greedy = temperature < GREEDY_BELOW
    if top_k is not None:
        greedy = greedy | (top_k == 1)
    if bool(greedy.all()):
        return first
    scale = (1 / (temperature.masked_fill(greedy, 1).to(x.dtype) * 0.6931471805599453))[:, None]
    scores = x * scale + noise(philox(-(-x.shape[1] // 4), seed, offset.expand(len(x))), x.dtype)[:, : x.shape[1]]
    if top_k is not None or top_p is not None or min_p is not None:
        scores = scores.masked_fill(~keep(x, scale, top_k, top_p, min_p), float("-inf"))
    return torch.where(greedy, first, scores.argmax(-1))


def _cuda() -> Callable[..., Any]:
    from ftops.numba_kernels.sample import launch
    return launch


SAMPLE = register("sample(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor seed, "
                  "Tensor offset) -> Tensor", cpu=reference, cuda=_cuda,
                  fake=lambda x, *_: torch.empty(x.shape[:1], dtype=torch.int64, device=x.device))
_sample = straight(SAMPLE)


def sample(logits: torch.Tensor, *, temperature: float | torch.Tensor = 1.0, top_k: int | torch.Tensor | None = None,
           top_p: float | torch.Tensor | None = None, min_p: float | torch.Tensor | None = None,
           typical_p: float | torch.Tensor | None = None, seed: int | torch.Tensor = 0, offset: int | torch.Tensor = 0) -> torch.Tensor:
    """Token ids [B] int64 drawn from logits[B,V] (float32, float16, bfloat16; any strides; -inf and NaN are never drawn).

    Each option is a number, or a tensor of one a row: temperature >= 0 (0 is greedy), top_k >= 1, top_p and typical_p in (0, 1],
    min_p in [0, 1]; integers int32 or int64, the others float32. Row b draws with seed[b], or with seed + b where seed is a number, at
    `offset`, which numbers the draws of one seed. The same row, options, seed and offset give the same token in any batch. typical_p
    sorts the logits, which takes longer than all the rest. Values of tensors are not checked. Raises ValueError.
    """
    op = "sample"
    check_tensors(op, logits=logits)
    if logits.dim() != 2 or not logits.shape[1]:
        raise invalid(op, "logits.shape", tuple(logits.shape), "[B,V] with V >= 1")
    batch, device = logits.shape[0], logits.device
    for name, value, low, high in (("temperature", temperature, 0, float("inf")), ("top_k", top_k, 1, float("inf")),
                                   ("top_p", top_p, 0, 1), ("min_p", min_p, 0, 1), ("typical_p", typical_p, 0, 1),
                                   ("seed", seed, float("-inf"), float("inf")), ("offset", offset, float("-inf"), float("inf"))):
        if value is None or isinstance(value, torch.Tensor):
            continue
        if not isinstance(value, Real):
            raise invalid(op, name, f"a {type(value).__name__}", "a number, or a tensor of one a row")
        if not low <= value <= high or (value == 0 and name in ("top_p", "typical_p")):
            raise invalid(op, name, value, "above 0, up to 1" if name in ("top_p", "typical_p") else f"{low} to {high}")
    rows = {"temperature": per_row(op, "temperature", temperature, batch, device, torch.float32),
            **{name: None if value is None else per_row(op, name, value, batch, device, kind)
               for name, value, kind in (("top_k", top_k, torch.int64), ("top_p", top_p, torch.float32), ("min_p", min_p, torch.float32))}}
    if isinstance(seed, int):
        seed = torch.arange(seed, seed + batch, device=device)
    seed, offset = per_row(op, "seed", seed, batch, device, torch.int64), per_row(op, "offset", offset, batch, device, torch.int64)
    if typical_p is not None:
        typical = per_row(op, "typical_p", typical_p, batch, device, torch.float32)
        wide = logits.float()
        scale = 1 / (rows["temperature"].clamp(min=GREEDY_BELOW) * 0.6931471805599453)
        kept = keep(wide, scale[:, None], rows["top_k"], rows["top_p"], rows["min_p"], typical)
        greedy = (rows["temperature"] < GREEDY_BELOW)[:, None]
        return _sample(logits.masked_fill(~(kept | greedy), float("-inf")), rows["temperature"], rows["top_k"], None, None, seed, offset)
    return _sample(logits, *rows.values(), seed, offset)


def per_row(op: str, name: str, value: float | torch.Tensor, batch: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`value` as a tensor [batch] of `dtype`, int64 or float32. Raises ValueError."""
    if not isinstance(value, torch.Tensor):
        return torch.full((1,), value, dtype=dtype, device=device).expand(batch)
    check_beside(op, device, **{name: value})
    if value.shape != (batch,) or value.dtype not in ((torch.int32, torch.int64) if dtype is torch.int64 else DTYPES):
        raise invalid(op, name, f"{value.dtype} {tuple(value.shape)}", f"a number, or {dtype} ({batch},)")
    return value.to(dtype)


def cases() -> Iterator[Case]:
    def draw(batch: int, words: int, spread: float = 3.0, **options: Any) -> Callable[..., Any]:
        def make(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kinds = {"top_k": torch.int64, "seed": torch.int64, "offset": torch.int64}
            return (randn((batch, words), device, dtype, spread),), {
                name: torch.tensor(value, dtype=kinds.get(name, torch.float32), device=device) if isinstance(value, list) else value
                for name, value in options.items()}
        return make

    yield Case("greedy", draw(3, 1000, temperature=0.0))
    yield Case("plain", draw(4, 1000, seed=7))
    yield Case("llama", draw(2, 128256, temperature=0.7, top_k=50, top_p=0.9, seed=3, offset=5))
    yield Case("top_k", draw(5, 5003, top_k=[1, 2, 50, 1024, 5003], seed=[1, 1, 1, 1, 1]))
    yield Case("top_p", draw(4, 32000, top_p=[0.1, 0.5, 0.9, 1.0], offset=[1, 2, 3, 4]))
    yield Case("min_p", draw(3, 32000, min_p=[0.0, 0.05, 1.0]))
    yield Case("mixed", draw(6, 50257, temperature=[0.0, 0.5, 1.0, 2.0, 1.0, 0.0], top_k=[5, 40, 50257, 2000, 3, 50257],
                             top_p=[1.0, 0.8, 0.95, 0.5, 1.0, 0.2], min_p=[0.0, 0.1, 0.0, 0.01, 0.0, 0.5], seed=[2 ** 40, 1, 2, 3, 4, -5]))
    yield Case("flat", draw(2, 40000, spread=0.01, top_p=0.9, seed=11))
    yield Case("peaked", draw(2, 40000, spread=30.0, top_p=0.9, top_k=3000))
    yield Case("typical", draw(3, 4096, typical_p=0.6, top_p=0.95, temperature=[1.0, 0.6, 0.0]))
    yield Case("one", draw(2, 1, top_p=0.5))
    yield Case("empty", draw(0, 100))
    yield Case("sliced", lambda device, dtype: ((randn((4, 7, 1003), device, dtype, 3.0)[:, -1],), {"top_k": 20, "top_p": 0.8}))
