"""What becomes of logits before a token is drawn, and when a row has ended: torch ops on fixed tensors, which a CUDA graph can hold.

In this order, transformers' where it has them: logit_bias, sequence_bias, repetition, presence and frequency penalty, no_repeat_ngram,
bad_words, min_new_tokens, then the filters of `ops.sample`. `build` makes the tensors of the rules that are asked for, and only those:
their names and shapes say which graph serves a request.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ftops import ops
from ftops.generation.options import Options

Given = dict[str, torch.Tensor]
NEVER = float("-inf")


def build(options: Options, ids: torch.Tensor, counted: torch.Tensor, words: int) -> Given:
    """The tensors of the rules that `options` ask for, on the device of ids[B,S]; counted[B,S]: which of them repetition_penalty sees."""
    batch, device = ids.shape[0], ids.device

    def rows(value: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(value, device=device).to(dtype).expand(batch).contiguous()

    seed = options.seed if isinstance(options.seed, torch.Tensor) else torch.arange(options.seed, options.seed + batch)
    given: Given = {"limit": rows(options.max_new_tokens, torch.int64), "temperature": rows(options.temperature, torch.float32),
                    "seed": rows(seed, torch.int64)}
    if not options.greedy:
        for name in ("top_p", "min_p", "typical_p"):
            if options.asks(name):
                given[name] = rows(getattr(options, name), torch.float32)
        if options.asks("top_k"):
            given["top_k"] = rows(options.top_k, torch.int64)
        if any(options.asks(name) for name in ("top_p_decay", "top_p_min", "top_p_reset_ids")):
            given["top_p_initial"] = given["top_p"].clone()
            given["top_p_decay"] = rows(1.0 if options.top_p_decay is None else options.top_p_decay, torch.float32)
            given["top_p_min"] = rows(0.0 if options.top_p_min is None else options.top_p_min, torch.float32)
            given["top_p_reset_ids"] = rows(-1 if options.top_p_reset_ids is None else options.top_p_reset_ids, torch.int64)
    if options.asks("repetition_penalty"):
        given["repetition"] = rows(options.repetition_penalty, torch.float32)[:, None]
        seen = torch.zeros((batch, words + 1), dtype=torch.bool, device=device)
        given["seen"] = seen.scatter_(1, ids.masked_fill(~counted, words), True)[:, :words].contiguous()
    if options.asks("presence_penalty") or options.asks("frequency_penalty"):
        given["presence"] = rows(options.presence_penalty, torch.float32)[:, None]
        given["frequency"] = rows(options.frequency_penalty, torch.float32)[:, None]
        given["counts"] = torch.zeros((batch, words), dtype=torch.float32, device=device)
    if options.asks("no_repeat_ngram_size"):
        given["ngram"] = rows(options.no_repeat_ngram_size, torch.int64)[:, None]
        # How far back a graph looks is part of its shape.
        given["ngram_offsets"] = torch.arange(1, max(2, int(given["ngram"].max())), device=device)
    if options.logit_bias is not None:
        given["bias"] = _dense(options.logit_bias, words, device)
    if options.sequence_bias:
        given |= _sequences("biased", list(options.sequence_bias), list(options.sequence_bias.values()), words, device)
    if options.bad_words:
        given |= _sequences("bad", options.bad_words, [NEVER] * len(options.bad_words), words, device)
    if options.stop_tokens:
        given["stop"] = _aligned(options.stop_tokens, device)
    if options.eos:
        given["eos"] = torch.tensor(options.eos, device=device)
        if options.asks("min_new_tokens"):
            given["least"] = rows(options.min_new_tokens, torch.int64)[:, None]
            given["no_eos"] = _dense(dict.fromkeys(options.eos, NEVER), words, device)
    if options.pad_token_id is not None:
        given["pad"] = torch.tensor(options.pad_token_id, device=device)
    return given


def penalised(given: Given, logits: torch.Tensor, ids: torch.Tensor, filled: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """logits[B,V] after all rules but the filters; ids[B,C] of which `filled` are there, `drawn` of them drawn, both [1] or [B].

    Of `given`, what holds words or sequences may have a dimension more in front, of one a row, and so may it in `ended`.
    """
    if not given.keys() & {"bias", "biased", "repetition", "presence", "ngram", "bad", "least"}:
        return logits
    x = logits.float()
    if "bias" in given:
        x = x + given["bias"]
    if "biased" in given:
        x = _add_wherecompleted(x, given, "biased", ids, filled)
    if "repetition" in given:
        x = torch.where(given["seen"], torch.where(x < 0, x * given["repetition"], x / given["repetition"]), x)
    if "presence" in given:
        x = x - given["presence"] * (given["counts"] > 0) - given["frequency"] * given["counts"]
    if "ngram" in given:
        x = x + _repeated(given, ids, filled, x.shape[1])
    if "bad" in given:
        x = _add_wherecompleted(x, given, "bad", ids, filled)
    if "least" in given:
        x = torch.where(drawn.view(-1, 1) < given["least"], x + given["no_eos"], x)
    return x


def draw(given: Given, logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Token ids [B]."""
    filters = {name: given[name] for name in ("top_k", "top_p", "min_p", "typical_p") if name in given}
    return ops.sample(logits, temperature=given["temperature"], seed=given["seed"], offset=drawn.expand(len(logits)), **filters)


def remember(given: Given, tokens: torch.Tensor) -> None:
    """Counts what was drawn, for the penalties of the next step."""
    if "seen" in given:
        given["seen"].scatter_(1, tokens[:, None], True)
    if "counts" in given:
        given["counts"].scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.float32))
    if "top_p_initial" in given:
        lower = torch.maximum(given["top_p"] * given["top_p_decay"], given["top_p_min"])
        given["top_p"].copy_(torch.where(tokens == given["top_p_reset_ids"], given["top_p_initial"], lower))


def ended(given: Given, tokens: torch.Tensor, ids: torch.Tensor, filled: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """bool [B]: the row has its last token, `tokens` being in ids and counted already."""
    end = drawn >= given["limit"]
    if "eos" in given:
        end = end | (tokens[:, None] == given["eos"]).any(-1)
    if "stop" in given:
        end = end | completed(given["stop"], ids, filled, drawn).any(-1)
    return end


def _dense(bias: dict[int, float] | torch.Tensor, words: int, device: torch.device) -> torch.Tensor:
    if isinstance(bias, torch.Tensor):
        return bias.to(device=device, dtype=torch.float32)
    dense = torch.zeros(words, device=device)
    if bias:
        dense[torch.tensor(list(bias), device=device)] = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
    return dense


def _aligned(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """[N, longest], the last token of each in the last column, -1 before the first."""
    longest = max(map(len, sequences))
    return torch.tensor([[-1] * (longest - len(sequence)) + list(sequence) for sequence in sequences], device=device)


def _sequences(name: str, sequences: Sequence[Sequence[int]], values: Sequence[float], words: int, device: torch.device) -> Given:
    single = {sequence[0]: value for sequence, value in zip(sequences, values, strict=True) if len(sequence) == 1}
    longer = [(sequence, value) for sequence, value in zip(sequences, values, strict=True) if len(sequence) > 1]
    given = {name: _dense(single, words, device)}
    if longer:
        given[f"{name}_words"] = _aligned([sequence for sequence, _ in longer], device)
        given[f"{name}_values"] = torch.tensor([value for _, value in longer], dtype=torch.float32, device=device)
    return given


def completed(sequences: torch.Tensor, ids: torch.Tensor, filled: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """bool [B, N]: the last of ids[:, :filled] are sequences[N, L] or [B, N, L], all of it among the last `within`."""
    back = torch.arange(sequences.shape[-1], 0, -1, device=ids.device)
    latest = ids.gather(1, (filled.view(-1, 1) - back).clamp(min=0).expand(len(ids), -1))
    latest = torch.where(back <= within.view(-1, 1), latest, -2)
    return ((latest[:, None] == sequences) | (sequences < 0)).all(-1)


def _add_wherecompleted(x: torch.Tensor, given: Given, name: str, ids: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """x plus the value of each sequence at its last token, where all before it has just been said."""
    x = x + given[name]
    if f"{name}_words" not in given:
        return x
    words, values = given[f"{name}_words"], given[f"{name}_values"]
    said = completed(words[..., :-1], ids, filled, filled)
    return x.scatter_add(1, words[..., -1].expand(len(x), -1), torch.where(said, values, 0.0))


def _repeated(given: Given, ids: torch.Tensor, filled: torch.Tensor, words: int) -> torch.Tensor:
    """-inf [B,V] for tokens that would complete an n-gram for the second time, n = ngram[B,1] (0: none)."""
    n, place, filled = given["ngram"], torch.arange(ids.shape[1], device=ids.device), filled.view(-1, 1)
    again = (place < filled) & (place >= n - 1) & (n > 0)
    for back in range(1, len(given["ngram_offsets"]) + 1):
        same = ids.roll(back, 1) == ids.gather(1, (filled - back).clamp(min=0).expand(len(ids), 1))
        again = again & (same | (back > n - 1))
    again = again & (filled >= n - 1)
    ban = torch.zeros((len(ids), words), device=ids.device)
    return ban.scatter_reduce_(1, ids, torch.where(again, NEVER, 0.0), "amin")
