"""GPT-2: pre-norm LayerNorm, one linear for q, k, v with weights [in, out], learned positions. Radford et al., 2019."""
from __future__ import annotations

from ftops.integrations.transformers.arch import Arch

ARCH = Arch(
    name="gpt2",
    layer="GPT2Block",
    attention="attn",
    norms=("ln_1", "ln_2"),
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    activation="mlp.act",
    norm="layer",
    dropouts=("attn_pdrop", "resid_pdrop"),
    refuse=("add_cross_attention",),
)
