"""Any architecture of transformers, shrunk: the usual names of sizes are set where its configuration has them."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.tiny import VOCABULARY, prompt

SIZES = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embedding_size": 64, "word_embed_proj_dim": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "v_head_dim": 16, "rotary_dim": 8,
    "intermediate_size": 96, "ffn_dim": 96, "hidden_dim": 96, "d_ff": 96, "n_inner": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "ffn_hidden_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 16,
    "chunk_size": 16, "state_size": 8, "vocab_size": VOCABULARY, "type_vocab_size": 2, "sliding_window": 8,
    "max_position_embeddings": 128, "n_positions": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}
MOST_PARAMETERS = 3_000_000


def takes(config: PreTrainedConfig, name: str) -> bool:
    """Whether the size is the configuration's to set, and not worked out from others."""
    try:
        return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)
    except Exception:  # some configurations raise where layers may differ
        return False


@contextmanager
def few_parameters() -> Iterator[None]:
    """Raises OverflowError as soon as modules made here have more than MOST_PARAMETERS: most models of the world are large."""
    sizes: dict[int, int] = {}

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            sizes[id(parameter)] = parameter.numel()
        if sum(sizes.values()) > MOST_PARAMETERS:
            raise OverflowError

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def small(kind: str, mapping: object) -> PreTrainedModel | None:
    """A model of that kind out of an auto class's mapping, with random weights; None if these sizes make none that runs."""
    try:
        config_class = CONFIG_MAPPING[kind]
        default = config_class()
        if not takes(default, "vocab_size"):  # pictures and sound: not to be imported in vain
            return None
        model_class = mapping[config_class]
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        sizes = {name: size for name, size in SIZES.items() if takes(default, name)}
        with torch.device("meta"), few_parameters():
            model_class(config_class(**sizes))
        torch.manual_seed(0)
        model = model_class(config_class(**sizes)).eval()
        outputs(model)
    except Exception:  # whatever transformers raises for sizes that do not go together
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """Every floating tensor that a forward gives, where the prompt is not padding."""
    ids, mask = prompt(length=20, padding="left")
    more = {"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {}
    torch.manual_seed(0)
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask, **more)
    found = (out.get(name) for name in ("logits", "last_hidden_state", "encoder_last_hidden_state", "prediction_logits"))
    tensors = [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
    assert tensors
    return [tensor[mask.bool()] if tensor.shape[:2] == mask.shape else tensor for tensor in tensors]
