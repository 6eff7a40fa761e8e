"""ftops.generate, and `model.generate` of a patched model: transformers prepares, the loop of ftops/generation generates.

transformers' own `generate` reads its configuration, makes its processors and criteria, and then calls `_sample`, which is here. What
these ask for and the loop has a word for is done on the device; other callables are called at every step; what remains, such as outputs
that the loop does not keep, transformers' own loop does, and that is said once.
"""
from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from ftops.generation import BeamOptions, Generated, Loop, Options, Stream
from ftops.integrations.transformers.beams import generate_beams, search
from ftops.integrations.transformers.checks import checked, most
from ftops.integrations.transformers.decoder import cache_dtype, fixed, forget, session, unfit
from ftops.integrations.transformers.speculation import speculate
from ftops.integrations.transformers.swap import Swapped, change_class, original_class, swapped_class
from ftops.integrations.transformers.translate import counted, translated, unserved
from ftops.progress import track

_LOG = logging.getLogger("ftops")
_SAID: set[str] = set()
BEAMS = ("num_return_sequences", "length_penalty", "early_stopping", "beam_diversity_rate")


def generate(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, return_logprobs: bool = False,
             return_logits: bool = False, return_hidden_states: bool = False, progress: bool = False,
             draft_model: PreTrainedModel | None = None, num_draft_tokens: int | None = None, num_beams: int = 1,
             **options: Any) -> torch.Tensor | Generated:
    """See `ftops.generate`."""
    more = return_logprobs or return_logits or return_hidden_states
    for_beams = {name: options.pop(name) for name in BEAMS if name in options}
    if num_beams != 1 and (draft_model is not None or options.get("prompt_lookup_num_tokens")):
        raise ValueError(f"generate: num_beams is {num_beams}, and drafts are of one sequence; leave one of them out")
    if num_beams != 1:
        return generate_beams(model, input_ids, attention_mask, options, num_beams, more, progress, **for_beams)
    if for_beams:
        raise ValueError(f"generate: {next(iter(for_beams))} is given and num_beams is 1; pass num_beams=4, say, or leave it out")
    if num_draft_tokens is not None and draft_model is None:
        raise ValueError("generate: num_draft_tokens is given and draft_model is None; pass a smaller patched decoder, or leave it out")
    if draft_model is not None or options.get("prompt_lookup_num_tokens"):
        return speculate(model, input_ids, attention_mask, options, draft_model, num_draft_tokens, more, progress)
    running = stream(model, input_ids, attention_mask, return_logprobs=return_logprobs, return_logits=return_logits,
                     return_hidden_states=return_hidden_states, **options)
    longest = most(Options(max_new_tokens=options.get("max_new_tokens", Options.max_new_tokens)))
    for _ in track(running, "generating", longest) if progress else running:
        pass
    made = running.result()
    return made if more else made.sequences


def stream(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, return_logprobs: bool = False,
           return_logits: bool = False, return_hidden_states: bool = False, **options: Any) -> Stream:
    """See `ftops.stream`."""
    parsed = checked(model, input_ids, attention_mask, options)
    return Stream(
        session(model, len(input_ids), input_ids.shape[1] + most(parsed)),
        lambda one: Loop(one, parsed, input_ids, attention_mask, logprobs=return_logprobs, logits=return_logits,
                         hidden_states=return_hidden_states))


class Generating(Swapped):
    """What a patched model does in place of transformers' `_sample`, greedy decoding included."""

    def _sample(self, input_ids: torch.Tensor, logits_processor: list, stopping_criteria: list, generation_config: Any,
                synced_gpus: bool = False, streamer: Any = None, **model_kwargs: Any) -> Any:
        reason = unfit(self) or unserved(self, input_ids, generation_config, synced_gpus, model_kwargs)
        options = None
        drawn_there = generation_config.do_sample and not fixed(self)  # on a CPU even the drawn tokens stay the same
        if reason is None and not drawn_there:
            options, reason = translated(input_ids, logits_processor, stopping_criteria, generation_config)
        if options is None:
            _say(reason)
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced_gpus,
                                   streamer=streamer, **model_kwargs)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        with session(self, len(input_ids), input_ids.shape[1] + most(options)) as one:
            loop = Loop(one, options, input_ids, mask, positions, counted(input_ids, logits_processor), **_kept(generation_config))
            for tokens in loop:
                if streamer is not None:
                    streamer.put(tokens)
            if streamer is not None:
                streamer.end()
            made = loop.result()
            if not generation_config.return_dict_in_generate:
                return made.sequences
            return GenerateDecoderOnlyOutput(sequences=made.sequences, scores=_steps(made.scores), logits=_steps(made.logits),
                                             past_key_values=one.decoder.copied(made.sequences.shape[1] - 1))

    def _beam_search(self, input_ids: torch.Tensor, logits_processor: list, stopping_criteria: list, generation_config: Any,
                     synced_gpus: bool = False, **model_kwargs: Any) -> Any:
        reason = unfit(self) or unserved(self, input_ids, generation_config, synced_gpus, model_kwargs)
        options = None
        if reason is None and generation_config.do_sample:
            reason = "beams that are sampled"
        if reason is None:
            options, reason = translated(input_ids, logits_processor, stopping_criteria, generation_config)
        if options is not None and (options.processors or options.criteria):
            options, reason = None, "beams with processors or criteria of the caller's"
        # On a CPU growing caches are faster, and transformers reorders those.
        if options is None or not (fixed(self) or cache_dtype(self) is not None):
            _say(reason)
            return super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced_gpus,
                                        **model_kwargs)
        beams = BeamOptions(generation_config.num_beams, generation_config.length_penalty, generation_config.early_stopping)
        # What transformers fills with: pad_token_id, unless that is 0 or None.
        fill = (options.pad_token_id or options.eos[0]) if options.eos else 0
        found, made = search(self, options, beams, generation_config.num_return_sequences, fill, input_ids,
                             model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), counted(input_ids, logits_processor),
                             **_kept(generation_config))
        if not generation_config.return_dict_in_generate:
            return found.sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=found.sequences, sequences_scores=found.scores if generation_config.output_scores else None,
            scores=_steps(made.scores), logits=_steps(made.logits), beam_indices=found.parents)


def _kept(config: Any) -> dict[str, bool]:
    """What the loop keeps of each step for the output that was asked for."""
    wanted = config.return_dict_in_generate
    return {"logits": bool(wanted and config.output_logits), "scores": bool(wanted and config.output_scores)}


def _steps(kept: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
    """kept[B,N,V] as transformers has it: N tensors [B,V]."""
    return None if kept is None else kept.unbind(1)


def _say(reason: str | None) -> None:
    """Once, that transformers' own loop runs, and why; None is no reason to say anything."""
    if reason is not None and reason not in _SAID:
        _SAID.add(reason)
        _LOG.warning("generate: %s; transformers' own loop does it", reason)


def swap_generate(model: torch.nn.Module) -> None:
    """Gives every decoder in `model` whose layers are all fused the loop for its `generate`."""
    for module in model.modules():
        if unfit(module) is None and not isinstance(module, Generating):
            change_class(module, swapped_class(Generating, type(module)))


def restore_generate(module: torch.nn.Module) -> None:
    """The module's own `generate` again; what was kept for the next call is let go."""
    forget(module)
    change_class(module, original_class(module))
