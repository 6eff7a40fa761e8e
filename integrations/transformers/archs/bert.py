"""BERT: post-norm LayerNorm, attention in both directions, learned positions. Devlin et al., 2019."""
from __future__ import annotations

from ftops.integrations.transformers.arch import Arch

ARCH = Arch(
    name="bert",
    layer="BertLayer",
    attention="attention.self",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    order="post",
    norm="layer",
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    stack=("BertEncoder", "layer"),
    refuse=("add_cross_attention",),
)
