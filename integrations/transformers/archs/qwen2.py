"""Qwen2: Llama with biases on q, k and v, and a sliding window in some layers. Yang et al., 2024."""
from __future__ import annotations

from ftops.integrations.transformers.arch import replace
from ftops.integrations.transformers.archs.llama import ARCH as LLAMA

ARCH = replace(LLAMA, name="qwen2", layer="Qwen2DecoderLayer", window="self_attn.sliding_window")
