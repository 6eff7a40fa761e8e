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

from ftops.generation import BeamOptions, BeamSession, Generated, LookupLoop, LookupSession, Loop, Options, Stream, rules
from ftops.generation.lookup import MOST, SERVED
from ftops.generation.options import parse
from ftops.integrations.transformers.beams import BeamCausalDecoder
from ftops.integrations.transformers.decoder import SeveralDecoder, fixed, forget, session, unfit
from ftops.integrations.transformers.swap import Swapped, change_class, original_class, swapped_class
from ftops.integrations.transformers.translate import counted, translated, unserved
from ftops.progress import track

_LOG = logging.getLogger("ftops")
_SAID: set[str] = set()


def generate(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, return_logprobs: bool = False,
             return_logits: bool = False, return_hidden_states: bool = False, progress: bool = False,
             **options: Any) -> torch.Tensor | Generated:
    """See `ftops.generate`."""
    more = return_logprobs or return_logits or return_hidden_states
    if options.get("prompt_lookup_num_tokens"):
        return _looked_up(model, input_ids, attention_mask, more, progress, options)
    running = stream(model, input_ids, attention_mask, return_logprobs=return_logprobs, return_logits=return_logits,
                     return_hidden_states=return_hidden_states, **options)
    longest = most(Options(max_new_tokens=options.get("max_new_tokens", Options.max_new_tokens)))
    for _ in track(running, "generating", longest) if progress else running:
        pass
    made = running.result()
    return made if more else made.sequences


def _looked_up(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, more: bool, progress: bool,
               options: dict[str, Any]) -> torch.Tensor:
    parsed = checked(model, ids, mask, options, streamed=False)
    drafts, counted = parsed.prompt_lookup_num_tokens, torch.ones_like(ids, dtype=torch.bool)
    asked = rules.build(parsed, ids, counted, model.config.get_text_config(decoder=True).vocab_size).keys() - SERVED
    if drafts > MOST or asked or more or parsed.processors or parsed.criteria or parsed.stop:
        raise ValueError(f"generate: prompt_lookup_num_tokens is {drafts}; allowed: 1 to {MOST}, without penalties, bias, words to avoid "
                         "or to stop at, min_new_tokens, top_p that changes, callables, and what return_... asks for")

    def make(model: PreTrainedModel, batch: int, capacity: int) -> LookupSession:
        return LookupSession(SeveralDecoder(model, batch, capacity, 1 + drafts), batch, capacity, drafts)

    with session(model, len(ids), ids.shape[1] + most(parsed) + 1 + drafts, make, ("lookup", drafts)) as one:
        loop = LookupLoop(one, parsed, ids, mask)
        for _ in track(loop, "generating", most(parsed), lambda: int(loop.lengths.max())) if progress else loop:
            pass
        return loop.result().sequences


def stream(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, return_logprobs: bool = False,
           return_logits: bool = False, return_hidden_states: bool = False, **options: Any) -> Stream:
    """See `ftops.stream`."""
    parsed = checked(model, input_ids, attention_mask, options)
    return Stream(
        session(model, len(input_ids), input_ids.shape[1] + most(parsed)),
        lambda one: Loop(one, parsed, input_ids, attention_mask, logprobs=return_logprobs, logits=return_logits,
                         hidden_states=return_hidden_states))


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
    if mask is not None and (mask.shape != ids.shape or mask.device != ids.device):
        raise ValueError(f"generate: attention_mask is {tuple(mask.shape)} on {mask.device}; allowed: {tuple(ids.shape)} on {ids.device}")
    config = model.generation_config
    given = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id} | options
    parsed = parse(given, len(ids), model.config.get_text_config(decoder=True).vocab_size)
    if parsed.pad_token_id is None and parsed.eos:
        parsed = parse({**given, "pad_token_id": parsed.eos[0]}, len(ids), model.config.get_text_config(decoder=True).vocab_size)
    if streamed and parsed.prompt_lookup_num_tokens:
        raise ValueError("generate: prompt_lookup_num_tokens is given, with which rows do not advance together; leave it out where tokens "
                         "are streamed")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and ids.shape[1] + most(parsed) > longest:
        raise ValueError(f"generate: input_ids of {ids.shape[1]} tokens and max_new_tokens {most(parsed)} exceed the {longest} positions "
                         "of this model; shorten one of them")
    return parsed


def most(options: Options) -> int:
    return int(options.max_new_tokens.max()) if isinstance(options.max_new_tokens, torch.Tensor) else options.max_new_tokens


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
        if options is None or not fixed(self):  # on a CPU growing caches are faster, and transformers reorders those
            _say(reason)
            return super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced_gpus,
                                        **model_kwargs)
        beams = BeamOptions(generation_config.num_beams, generation_config.length_penalty, generation_config.early_stopping)

        def make(model: PreTrainedModel, batch: int, capacity: int) -> BeamSession:
            return BeamSession(BeamCausalDecoder(model, batch, capacity, beams.beams), batch, capacity, beams)

        with session(self, len(input_ids), input_ids.shape[1] + most(options), make, beams) as one:
            # What transformers fills with: pad_token_id, unless that is 0 or None.
            one.fill_with((options.pad_token_id or options.eos[0]) if options.eos else 0)
            loop = Loop(one, options, input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"),
                        counted(input_ids, logits_processor), **_kept(generation_config))
            for _ in loop:
                pass
            found = one.best(input_ids.shape[1], generation_config.num_return_sequences)
            if not generation_config.return_dict_in_generate:
                return found.sequences
            made = loop.result()
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
