"""What `ftops bench` does: a decoder generates greedily as Hugging Face runs it and patched, over batch sizes and contexts, timed in turns.

A run is `model.generate` with a streamer that notes when the tokens of each step are on the host: the first of these times is the time to
the first token, the mean step after it the time a token. Prompts are text, every row makes all its tokens, and the tokens are compared.
"""
from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import ftops
from ftops.integrations.demo.load import EMBEDDED, load_causal_lm
from ftops.integrations.evaluate import check_formats, library_text, weight_bytes
from ftops.integrations.transformers.decoder import forget, positions_of, unfit
from ftops.progress import bar
from ftops.timing import order

BASELINE, COMPILED, OURS = "Hugging Face", "HF, static cache + compile", "ftops"
WARM = 2  # runs that are not counted: one compiles and captures, the next is the first of what is then timed


@dataclass
class Run:
    """One side at one batch size and context. first: seconds to the first token; token: of a step after it, for the whole batch.

    memory: bytes of weights and, on a GPU, the most that was allocated beside them. equal: the share of tokens before the first one in
    each row that is not Hugging Face's, if that could run. missing: why there are no figures.
    """

    side: str
    batch: int
    context: int
    first: float = 0.0
    token: float = 0.0
    memory: int = 0
    equal: float | None = None
    missing: str = ""

    @property
    def rate(self) -> float:
        """Tokens a second of all rows together, once the first is there."""
        return self.batch / self.token


@dataclass
class Bench:
    """What was measured of which model, and a sentence for what a reader should know of it."""

    model: str
    dtype: str
    quant: str | None
    parameters: int
    device: torch.device
    new_tokens: int
    repeats: int
    runs: list[Run] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class _Stamps(BaseStreamer):
    """When tokens came; those of the prompt come first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def bench(model: str | Path | None = None, *, batches: list[int], contexts: list[int], new_tokens: int = 32, quant: str | None = None,
          compiled: bool = False, repeats: int = 3, device: str | None = None, dtype: str | None = None) -> Bench:
    """Measures every batch size at every context (tokens of the prompt). Raises ValueError.

    model: a folder or a Hugging Face hub id; None is the embedded one. quant: a format for ftops's side. compiled: also Hugging Face with
    a static cache and torch.compile.
    """
    for argument, numbers, least in (("--batch", batches, 1), ("--context", contexts, 1), ("--new-tokens", [new_tokens], 2),
                                     ("--repeats", [repeats], 1)):
        if not numbers or min(numbers) < least:
            raise ValueError(f"bench: {argument} is {', '.join(map(str, numbers)) or 'empty'}; allowed: {least} or more")
    if device == "auto":
        raise ValueError("bench: --device is auto; allowed: cpu, cuda, cuda:1 and so on: a model spread over devices is not captured")
    check_formats("bench", *filter(None, [quant]))
    config = ftops.QuantConfig(quant) if quant else None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs, tokenizer = load_causal_lm(model or EMBEDDED, device=device, dtype=dtype, asked=("bench", "MODEL"), original=True)
    longest = positions_of(theirs)
    if longest and max(contexts) + new_tokens > longest:
        raise ValueError(f"bench: --context {max(contexts)} and --new-tokens {new_tokens} exceed the {longest} positions of this model; "
                         "shorten one of them")
    if compiled and theirs.device.type != "cuda":
        raise ValueError("bench: --compile needs a GPU; Hugging Face compiles its decoding there alone")
    theirs.generation_config = GenerationConfig()  # greedy, and no token ends a row
    sides = {BASELINE: theirs, **({COMPILED: theirs} if compiled else {}), OURS + (f", {quant}" if quant else ""): twin(theirs)}
    ours = ftops.patch(list(sides.values())[-1], quant=config)
    found = Bench(str(model or "the embedded model"), str(theirs.dtype)[6:], quant, theirs.num_parameters(), theirs.device, new_tokens,
                  repeats)
    if (reason := unfit(ours)) is not None:
        found.remarks.append(f"ftops's loop does not serve this model, so that transformers' own ran the patched layers: {reason}")
    with bar("", len(batches) * len(contexts) * len(sides) * (WARM + repeats)) as advance, torch.inference_mode():
        for context in contexts:
            for batch in batches:
                ids = prompts(tokenizer, batch, context).to(theirs.device)
                found.runs += _measured(sides, ids, new_tokens, repeats, advance)
    return found


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the very same parameters and buffers, which a patch leaves as they are to read."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def prompts(tokenizer: PreTrainedTokenizerBase, batch: int, context: int) -> torch.Tensor:
    """[B,S] int64: consecutive pieces of modules of Python's standard library, from the start again where they end."""
    text = library_text()[: 16 * batch * context + 1000]
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return tokens.repeat(-(-batch * context // len(tokens)))[: batch * context].view(batch, context)


def timed(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, cache: StaticCache | None = None) -> tuple[torch.Tensor, list[float]]:
    """Greedy tokens [B, new_tokens] after ids[B,S], and the seconds after which those of each step were on the host.

    cache: one of Hugging Face's, for which it compiles the model on a GPU.
    """
    if cache is not None:
        cache.reset()
    stamps = _Stamps()
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    began = time.perf_counter()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new_tokens, do_sample=False,
                          disable_compile=cache is None, streamer=stamps)
    return made[:, ids.shape[1]:], [at - began for at in stamps.at[1:]]


def agreement(tokens: torch.Tensor, theirs: torch.Tensor) -> float:
    """The share of tokens [B,n] that come before the first difference of their row."""
    return float((tokens == theirs).long().cumprod(-1).float().mean())


def _measured(sides: dict[str, PreTrainedModel], ids: torch.Tensor, new_tokens: int, repeats: int,
              advance: Callable[..., None]) -> Iterator[Run]:
    """A run of each side: warmed up one after the other, then timed in turns."""
    batch, context = ids.shape
    runs = {name: Run(name, batch, context) for name in sides}
    calls, seen, seconds = {}, {}, {name: [] for name in sides}
    for name, model in sides.items():
        cache = None
        if name == COMPILED:
            torch.compiler.reset()  # or the second batch size would be compiled for any, and slower
            cache = StaticCache(config=model.config, max_cache_len=context + new_tokens)
        calls[name] = lambda model=model, cache=cache: timed(model, ids, new_tokens, cache)
        advance(0, f"{batch} x {context}, {name}")
        try:
            seen[name], runs[name].memory = _warmed(calls[name], model, advance)
        except torch.OutOfMemoryError:
            runs[name].missing = "out of memory"
            del calls[name], cache
    advance(0, f"{batch} x {context}")
    for turn in range(repeats if calls else 0):
        for name in order(list(calls), turn):
            seconds[name].append(calls[name]()[1])
            advance()
    for name in calls:
        runs[name].first = statistics.median(times[0] for times in seconds[name])
        runs[name].token = statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in seconds[name])
        runs[name].equal = agreement(seen[name], seen[BASELINE]) if BASELINE in seen else None
    yield from runs.values()


def _warmed(call: Callable[[], tuple[torch.Tensor, list[float]]], model: PreTrainedModel,
            advance: Callable[..., None]) -> tuple[torch.Tensor, int]:
    """The tokens, and the bytes of weights and of what a run needs beside them, where that can be told."""
    forget(model)  # what it keeps for its next call was allocated for another size
    _collect(model.device)
    on_gpu = model.device.type == "cuda"
    before = torch.cuda.memory_allocated(model.device) if on_gpu else 0
    for _ in range(WARM):
        tokens, _ = call()
        advance()
    return tokens, weight_bytes(model) + (torch.cuda.max_memory_allocated(model.device) - before if on_gpu else 0)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
