"""What `ftops generate` does: continue a prompt with a patched model, and show the text while it is made."""
from __future__ import annotations

import time

import torch
from transformers import TextStreamer
from transformers.utils import logging

import ftops
from ftops.integrations.demo.load import EMBEDDED, load_causal_lm


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
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if not length:
        raise ValueError("generate: --prompt is empty, and this model's tokenizer adds no first token; pass some text")
    if longest and length + max_new_tokens > longest:
        raise ValueError(f"generate: the prompt's {length} tokens and --max-new-tokens {max_new_tokens} exceed the {longest} positions of "
                         "this model; shorten one of them")
    if patch:
        ftops.patch(network)

    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    began = time.perf_counter()
    with torch.inference_mode():
        tokens = network.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **sampling,
                                  max_new_tokens=max_new_tokens, pad_token_id=_pad_token(tokenizer),
                                  streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    seconds = time.perf_counter() - began
    count = tokens.shape[1] - length
    how = f"{len(ftops.report(network).swapped)} modules swapped" if patch else "not patched"
    return f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s with the first call's preparation; {how}"


def _pad_token(tokenizer: object) -> int | None:
    """GPT-2 and its like have no padding token; one prompt needs none, but transformers warns."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
