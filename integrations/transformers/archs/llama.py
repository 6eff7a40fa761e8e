"""Llama: pre-norm RMS, rotary in halves, grouped queries, gated MLP. Touvron et al., 2023."""
from __future__ import annotations

from ftops.integrations.transformers.arch import Arch

ARCH = Arch(
    name="llama",
    layer="LlamaDecoderLayer",
    attention="self_attn",
    norms=("input_layernorm", "post_attention_layernorm"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    activation="mlp.act_fn",
    rotary="half",
    dropouts=("attention_dropout",),
)
