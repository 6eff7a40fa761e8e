"""One small model for every family in ARCHS: real head dims, few layers, few words, and every option of the family in use."""
from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
import transformers
from transformers import PreTrainedModel

transformers.logging.set_verbosity_error()

VOCABULARY = 120
# Wide weights spread the logits, so that the greedy token does not hang on the last bit.
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {**COMMON, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384,
         "max_position_embeddings": 128}


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, head_dim=128))


def _mistral() -> PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, head_dim=128, sliding_window=8))


def _qwen2() -> PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=2))


def _qwen3() -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=128))


def _gpt2() -> PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**COMMON, n_embd=256, n_layer=3, n_head=4, n_positions=128,
                                                                scale_attn_by_inverse_layer_idx=True))


def _gptj() -> PreTrainedModel:
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**COMMON, n_embd=512, n_layer=2, n_head=2, n_positions=128, rotary_dim=64))


def _bert() -> PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**COMMON, hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
                                                                intermediate_size=512, max_position_embeddings=128))


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "gpt2": _gpt2, "gptj": _gptj, "bert": _bert}


def causal(family: str) -> bool:
    return family != "bert"


@cache
def _original(family: str) -> PreTrainedModel:
    """The same for every test: biases and norm weights too are drawn, since ones and zeros would hide that they are not used."""
    torch.manual_seed(1)
    model = TINY[family]()
    model.load_state_dict({name: value if value.dim() > 1 else (1.0 if "bias" not in name else 0.0) + 0.2 * torch.randn_like(value)
                           for name, value in model.state_dict().items()})
    return model


def tiny(family: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "eager") -> PreTrainedModel:
    """A new model with the family's weights, as transformers runs it. A copy: drawing weights is a fifth of the time of a test."""
    model = copy.deepcopy(_original(family))
    model.config._attn_implementation = attention
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not the buffers: from_pretrained leaves them in float32 as well
    model.config.dtype = dtype
    return model.eval().to(device)


def prompt(batch: int = 2, length: int = 12, padding: str | None = None, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask; padding is "left", "right" or "holes", None for none. The last row is never padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    places = {"left": slice(0, 4), "right": slice(-3, None), "holes": [1, 4, 5]}.get(padding, [])
    mask[:-1, places] = 0
    return ids.where(mask.bool(), torch.zeros_like(ids)), mask
