"""What can be wrong with a call of ftops.generate, ftops.stream and the turn of a conversation, said before anything is changed."""
from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ftops.generation import Options
from ftops.generation.options import parse
from ftops.integrations.transformers.decoder import positions_of, unfit


def checked(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any], *,
            streamed: bool = True) -> Options:
    """Everything that can be wrong with a call. Ids of end and padding come from the model's generation_config unless given.

    streamed: rows have to advance together.
    """
    reason = unfit(model)
    if reason is not None:
        raise ValueError(f"generate: {type(model).__name__} cannot be served: {reason}")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise ValueError("generate: input_ids is " + (f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else
                                                      type(ids).__name__) + "; allowed: int64 [B,S] with at least one token a row")
    if ids.device != model.device:
        raise ValueError(f"generate: input_ids is on {ids.device} but the model on {model.device}; move it, input_ids.to(model.device)")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(f"generate: attention_mask is {type(mask).__name__}; allowed: a tensor {tuple(ids.shape)}, or None")
    if mask is not None and (mask.shape != ids.shape or mask.device != ids.device):
        raise ValueError(f"generate: attention_mask is {tuple(mask.shape)} on {mask.device}; allowed: {tuple(ids.shape)} on {ids.device}")
    words = model.config.get_text_config(decoder=True).vocab_size
    wrong = ids[(ids < 0) | (ids >= words)]  # on a GPU the embedding would find out by an assertion, after which nothing runs there
    if wrong.numel():
        raise ValueError(f"generate: input_ids has {int(wrong[0])} among others; allowed: 0 to {words - 1}, the model's vocabulary")
    config = model.generation_config
    given = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id} | options
    parsed = parse(given, len(ids), words)
    if parsed.pad_token_id is None and parsed.eos:
        parsed = parse({**given, "pad_token_id": parsed.eos[0]}, len(ids), words)
    if streamed and parsed.prompt_lookup_num_tokens:
        raise ValueError("generate: prompt_lookup_num_tokens is given, with which rows do not advance together; leave it out where tokens "
                         "are streamed")
    check_length(model, ids, parsed)
    return parsed


def check_length(model: PreTrainedModel, ids: torch.Tensor, options: Options) -> None:
    longest = positions_of(model)
    if longest and ids.shape[1] + most(options) > longest:
        raise ValueError(f"generate: input_ids of {ids.shape[1]} tokens and max_new_tokens {most(options)} exceed the {longest} positions "
                         f"of this {type(model).__name__}; shorten one of them")


def most(options: Options) -> int:
    return int(options.max_new_tokens.max()) if isinstance(options.max_new_tokens, torch.Tensor) else options.max_new_tokens


def is_whole(value: object, low: int, high: int | None = None) -> bool:
    """Whether it is an integer of low to high, or without an end; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= (value if high is None else high)
