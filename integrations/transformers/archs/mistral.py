"""Mistral: Llama with a sliding window. Jiang et al., 2023."""
from __future__ import annotations

from ftops.integrations.transformers.arch import replace
from ftops.integrations.transformers.archs.llama import ARCH as LLAMA

ARCH = replace(LLAMA, name="mistral", layer="MistralDecoderLayer", window="self_attn.config.sliding_window")
