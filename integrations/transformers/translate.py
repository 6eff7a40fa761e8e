"""What transformers asks of its loop, in the words of ftops': options on the device, or the reason why transformers' own loop must run."""
from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import logits_process as processors_of
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ftops.generation import Options


def unserved(model: PreTrainedModel, ids: torch.Tensor, config: Any, synced: bool, given: dict[str, Any]) -> str | None:
    """Why transformers' own loop must run, or None."""
    if synced:
        return "synced_gpus=True"
    if ids.device != model.device:
        return f"input_ids on {ids.device} and the model on {model.device}"
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                return f"{name} with return_dict_in_generate"
    if not given.get("use_cache", True):
        return "use_cache=False"
    if config.cache_implementation not in (None, "dynamic", "static"):
        return f"cache_implementation={config.cache_implementation!r}"
    if getattr(given.get("past_key_values"), "_is_user_defined", False):
        return "past_key_values of the caller's"
    if config.compile_config is not None:
        return "compile_config"
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size"
    if config.is_assistant:
        return "the model assists another"
    if not ids.shape[1] or given.get("inputs_embeds") is not None:
        return "inputs_embeds"
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast"
    if given.get("position_ids") is not None and given["position_ids"].shape != ids.shape:
        return f"position_ids of shape {tuple(given['position_ids'].shape)}"
    known = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
    extra = [name for name, value in given.items() if value is not None and name not in known]
    return f"argument {extra[0]}" if extra else None


# What the loop does itself, in its order, which is transformers'.
_ORDER = (processors_of.SequenceBiasLogitsProcessor, processors_of.RepetitionPenaltyLogitsProcessor,
          processors_of.NoRepeatNGramLogitsProcessor, processors_of.NoBadWordsLogitsProcessor, processors_of.MinLengthLogitsProcessor,
          processors_of.MinNewTokensLengthLogitsProcessor, processors_of.SuppressTokensLogitsProcessor,
          processors_of.TemperatureLogitsWarper, processors_of.TopKLogitsWarper, processors_of.TopPLogitsWarper,
          processors_of.MinPLogitsWarper, processors_of.TypicalLogitsWarper)


def translated(ids: torch.Tensor, processors: list, criteria: list, config: Any) -> tuple[Options | None, str | None]:
    """transformers' processors and criteria as options, or why not."""
    lengths = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
    eos = [word for one in criteria if type(one) is EosTokenCriteria for word in one.eos_token_id.tolist()]
    others = [one for one in criteria if not isinstance(one, MaxLengthCriteria) and type(one) is not EosTokenCriteria]
    if not lengths or min(lengths) <= ids.shape[1]:
        return None, "no max_length beyond the prompt"
    pad = config._pad_token_tensor if any(hasattr(one, "eos_token_id") for one in criteria) else None
    if eos and pad is None:
        return None, "no pad_token_id"
    asked: dict[str, Any] = {"max_new_tokens": min(lengths) - ids.shape[1], "eos_token_id": eos, "criteria": others,
                             "pad_token_id": None if pad is None else int(pad)}
    if config.do_sample:
        # The caller's seed, torch.manual_seed, gives each row its own.
        asked |= {"temperature": 1.0, "seed": torch.randint(2 ** 62, (len(ids),))}
    places = [_ORDER.index(type(one)) if type(one) in _ORDER else None for one in processors]
    warped = config.do_sample and config.return_dict_in_generate and config.output_scores  # transformers' scores are those after filters
    if warped or None in places or sorted(set(places)) != places or not all(_take(one, ids, eos, asked) for one in processors):
        for name in set(asked) - {"max_new_tokens", "eos_token_id", "criteria", "pad_token_id", "temperature", "seed"}:
            del asked[name]
        asked |= {"processors": list(processors), **({"temperature": 1.0} if config.do_sample else {})}
    return Options(**asked), None


def _take(one: Any, ids: torch.Tensor, eos: list[int], asked: dict[str, Any]) -> bool:
    """Writes what a processor asks for into `asked`; False if the loop cannot do just that."""
    if getattr(one, "min_tokens_to_keep", 1) != 1 or getattr(one, "filter_value", float("-inf")) != float("-inf"):
        return False
    kind = type(one).__name__
    if kind in ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"):
        least = one.min_length - ids.shape[1] if kind == "MinLengthLogitsProcessor" else one.min_new_tokens
        asked["min_new_tokens"] = max(asked.get("min_new_tokens", 0), least)
        return set(torch.as_tensor(one.eos_token_id).flatten().tolist()) == set(eos)
    if kind == "SuppressTokensLogitsProcessor":
        asked["logit_bias"] = dict.fromkeys(one.suppress_tokens.tolist(), float("-inf"))
    elif kind == "SequenceBiasLogitsProcessor":
        asked["sequence_bias"] = one.sequence_bias
    elif kind == "NoBadWordsLogitsProcessor":
        asked["bad_words"] = list(one.sequence_bias)
    else:
        option, attribute = {
            "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"), "NoRepeatNGramLogitsProcessor":
            ("no_repeat_ngram_size", "ngram_size"), "TemperatureLogitsWarper": ("temperature", "temperature"), "TopKLogitsWarper":
            ("top_k", "top_k"), "TopPLogitsWarper": ("top_p", "top_p"), "MinPLogitsWarper": ("min_p", "min_p"), "TypicalLogitsWarper":
            ("typical_p", "mass")}[kind]
        asked[option] = getattr(one, attribute)
    return True


def counted(ids: torch.Tensor, processors: list) -> torch.Tensor:
    """bool [B,S]: which tokens of the prompt the repetition penalty counts; before 5.23 transformers counts padding too."""
    ignored = next((one.prompt_ignore_length for one in processors
                    if isinstance(one, processors_of.RepetitionPenaltyLogitsProcessor)), None)
    if ignored is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return torch.arange(ids.shape[1], device=ids.device) >= torch.as_tensor(ignored, device=ids.device).view(-1, 1).expand(len(ids), 1)
