"""What `ftops generate` does: continue a prompt with a patched model, and show the text while it is made."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

import ftops
from ftops.integrations.demo.load import EMBEDDED, load_causal_lm
from ftops.integrations.transformers.decoder import positions_of
from ftops.progress import bar


class Counting(TextStreamer):
    """Prints the text, and calls advance() for each token after the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, advance: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.advance, self.begun = advance, False

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.begun:
            self.advance()
        self.begun = True


def generate(prompt: str, *, model: str | None = None, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0,
             dtype: str | None = None, device: str | None = None, patch: bool = True) -> str:
    """Streams the continuation of `prompt` to standard output, and returns a line about its speed.

    model: a folder or a Hugging Face hub id; None is the embedded one. temperature 0 is greedy decoding. patch=False runs the model as
    transformers has it. Raises ValueError.
    """
    if max_new_tokens < 1:
        raise ValueError(f"generate: --max-new-tokens is {max_new_tokens}; allowed: 1 or more")
    if temperature < 0:
        raise ValueError(f"generate: --temperature is {temperature}; allowed: 0 (greedy) or more")
    logging.set_verbosity_error()
    if model is None:
        logging.disable_progress_bar()
    network, tokenizer = load_causal_lm(model or EMBEDDED, dtype=dtype, device=device)
    inputs = tokenizer(prompt, return_tensors="pt").to(network.device)
    length = inputs.input_ids.shape[1]
    longest = positions_of(network)
    if not length:
        raise ValueError("generate: --prompt is empty, and this model's tokenizer adds no first token; pass some text")
    if longest and length + max_new_tokens > longest:
        raise ValueError(f"generate: --prompt of {length} tokens and --max-new-tokens {max_new_tokens} exceed the {longest} positions of "
                         "this model; shorten one of them")
    if patch:
        ftops.patch(network)

    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    began = time.perf_counter()
    # On a terminal the text is its own progress; in a file nobody sees it.
    shown = nullcontext(lambda: None) if sys.stdout.isatty() else bar("generating", max_new_tokens)
    with torch.inference_mode(), shown as advance:
        tokens = network.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **sampling,
                                  max_new_tokens=max_new_tokens, pad_token_id=_pad_token(tokenizer),
                                  streamer=Counting(tokenizer, advance))
    seconds = time.perf_counter() - began
    count = tokens.shape[1] - length
    how = f"{len(ftops.report(network).swapped)} modules swapped" if patch else "not patched"
    return f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s with the first call's preparation; {how}"


def _pad_token(tokenizer: object) -> int | None:
    """GPT-2 and its like have no padding token; one prompt needs none, but transformers warns."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
