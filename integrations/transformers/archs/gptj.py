"""GPT-J: attention and MLP side by side on one LayerNorm, rotary in pairs on part of each head. Wang & Komatsuzaki, 2021."""
from __future__ import annotations

from ftops.integrations.transformers.arch import Arch

ARCH = Arch(
    name="gptj",
    layer="GPTJBlock",
    attention="attn",
    norms=("ln_1",),
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    out="attn.out_proj",
    up=("mlp.fc_in",),
    down="mlp.fc_out",
    activation="mlp.act",
    order="parallel",
    norm="layer",
    rotary="interleaved",
    rotary_dim="attn.rotary_dim",
    rotary_table="attn.embed_positions",
    dropouts=("attn_pdrop", "resid_pdrop"),
    cache="layer_past",
    returns_tuple=True,
    uses_registry=False,
)
