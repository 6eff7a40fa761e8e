"""What a request can ask for, checked once, and as tensors of one entry a row."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

Number = float | torch.Tensor
Integer = int | torch.Tensor
Words = Sequence[Sequence[int]]

# name: (lowest, highest, whether the lowest itself is allowed, value that asks for nothing)
_FLOATS = {
    "temperature": (0.0, float("inf"), True, None), "top_p": (0.0, 1.0, False, None), "min_p": (0.0, 1.0, True, None),
    "typical_p": (0.0, 1.0, False, None), "top_p_decay": (0.0, 1.0, False, None), "top_p_min": (0.0, 1.0, True, None),
    "repetition_penalty": (0.0, float("inf"), False, 1.0), "presence_penalty": (float("-inf"), float("inf"), True, 0.0),
    "frequency_penalty": (float("-inf"), float("inf"), True, 0.0),
}
_INTEGERS = {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 1, "top_p_reset_ids": 0, "no_repeat_ngram_size": 0, "seed": None,
             "prompt_lookup_num_tokens": 0}


@dataclass(frozen=True)
class Options:
    """Each number may be a tensor [B] of one a request; None, 0 penalties and empty lists ask for nothing.

    temperature 0 is greedy decoding. top_p_decay, top_p_min, top_p_reset_ids: after each token top_p becomes max(top_p * decay, min), and
    what it was when the token is the reset id. repetition_penalty divides positive logits (multiplies negative ones) of tokens of prompt
    and answer; presence_penalty and frequency_penalty are taken off once, or once for each time, for tokens of the answer.
    bad_words: token sequences that may not be completed; sequence_bias: {sequence: added to its last token}; logit_bias: {token: added},
    or a tensor [V] or [B,V]. A row ends with an eos_token_id, which min_new_tokens forbids, or with a `stop` sequence of tokens, or of text
    (then `tokenizer` is needed); afterwards it has pad_token_id, or without one it goes on until all rows have ended.
    Row b draws with seed[b], or seed + b. prompt_lookup_num_tokens: how many tokens, up to 15, a step guesses from the text so far and
    checks at once: the tokens are the same, sooner where the answer repeats the prompt; not with penalties, words, callables or streams.
    processors: callables (ids[B,S], logits[B,V]) -> logits, before all else; criteria: callables
    (ids, logits) -> bool [B], which end rows. Both are called on the host at every step, which then has to wait for it.
    """

    max_new_tokens: Integer = 128
    min_new_tokens: Integer = 0
    temperature: Number = 0.0
    top_k: Integer | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    top_p_decay: Number | None = None
    top_p_min: Number | None = None
    top_p_reset_ids: Integer | None = None
    repetition_penalty: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    no_repeat_ngram_size: Integer = 0
    logit_bias: Mapping[int, float] | torch.Tensor | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | None = None
    bad_words: Words = ()
    stop: Sequence[Sequence[int] | str] = ()
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    seed: Integer = 0
    prompt_lookup_num_tokens: int = 0
    tokenizer: Any = None
    processors: Sequence[Callable[..., torch.Tensor]] = ()
    criteria: Sequence[Callable[..., torch.Tensor]] = ()

    def asks(self, name: str) -> bool:
        """Whether option `name` asks for anything."""
        value = getattr(self, name)
        nothing = _FLOATS[name][3] if name in _FLOATS else 0
        return value is not None and (isinstance(value, torch.Tensor) or value != nothing)

    @property
    def greedy(self) -> bool:
        return not isinstance(self.temperature, torch.Tensor) and self.temperature == 0

    @property
    def eos(self) -> list[int]:
        ids = self.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def stop_tokens(self) -> list[list[int]]:
        return [list(words) for words in self.stop if not isinstance(words, str)]

    @property
    def stop_strings(self) -> list[str]:
        return [words for words in self.stop if isinstance(words, str)]


def parse(given: Mapping[str, Any], batch: int, words: int, caller: str = "generate") -> Options:
    """Options from the keyword arguments of `caller`, for `batch` rows and a vocabulary of `words`. Raises TypeError or ValueError."""
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(f"{caller}: {name} is no option here; ftops.generation.Options has {', '.join(known)}")
    options = Options(**given)
    for name, (low, high, closed, _) in _FLOATS.items():
        value = getattr(options, name)
        for one in _numbers(caller, name, value, batch):
            if not (low <= one <= high) or (one == low and not closed):
                raise _invalid(caller, name, one, f"{low:g} to {high:g}" if closed else f"above {low:g}, up to {high:g}")
    for name, low in _INTEGERS.items():
        value = getattr(options, name)
        if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.is_floating_point()):
            raise _invalid(caller, name, value, "integers")
        for one in _numbers(caller, name, value, batch):
            if low is not None and one < low:
                raise _invalid(caller, name, one, f"{low} or more")
    for name, groups in (("bad_words", options.bad_words), ("stop", options.stop), ("sequence_bias", options.sequence_bias or {}),
                         ("eos_token_id", [options.eos]), ("logit_bias", [] if isinstance(options.logit_bias, torch.Tensor)
                                                           else [list(options.logit_bias or {})])):
        if isinstance(groups, str) or not isinstance(groups, (Sequence, Mapping)):
            raise _invalid(caller, name, repr(groups), "a list, of sequences of token ids" + (" or texts" if name == "stop" else ""))
        for group in groups:
            if name != "eos_token_id" and name != "logit_bias" and (not isinstance(group, Sequence) or not len(group)):
                raise _invalid(caller, name, f"{group!r} among others", "sequences that are not empty")
            if not (name == "stop" and isinstance(group, str)) and not all(isinstance(word, int) and 0 <= word < words for word in group):
                raise _invalid(caller, name, group, f"token ids, 0 to {words - 1}")
    if isinstance(options.logit_bias, torch.Tensor) and options.logit_bias.shape not in ((words,), (batch, words)):
        raise _invalid(caller, "logit_bias", tuple(options.logit_bias.shape), f"({words},), ({batch}, {words}), or {{token: bias}}")
    if options.stop_strings and options.tokenizer is None:
        raise ValueError(f"{caller}: stop has text, {options.stop_strings[0]!r}, and tokenizer is None; pass tokenizer=, or token ids")
    if options.asks("min_new_tokens") and not options.eos:
        raise ValueError(f"{caller}: min_new_tokens is given but there is no eos_token_id that it could forbid; pass one, or leave it out")
    if any(options.asks(name) for name in ("top_p_decay", "top_p_min", "top_p_reset_ids")) and options.top_p is None:
        raise ValueError(f"{caller}: top_p_decay, top_p_min and top_p_reset_ids change top_p, which is None; pass it too")
    return options


def _numbers(caller: str, name: str, value: Any, batch: int) -> list[float]:
    if value is None:
        return []
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise _invalid(caller, name, repr(value), f"a number, or a tensor of {batch}")
        return [value]
    if value.shape != (batch,):
        raise _invalid(caller, name, f"of shape {tuple(value.shape)}", f"a number, or a tensor of {batch}")
    return value.tolist()


def _invalid(caller: str, name: str, got: object, allowed: str) -> ValueError:
    return ValueError(f"{caller}: {name} is {got}; allowed: {allowed}")
