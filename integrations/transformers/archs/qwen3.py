"""Qwen3: Qwen2 with a norm of every query and key head instead of biases. Qwen Team, 2025."""
from __future__ import annotations

from ftops.integrations.transformers.arch import replace
from ftops.integrations.transformers.archs.qwen2 import ARCH as QWEN2

ARCH = replace(QWEN2, name="qwen3", layer="Qwen3DecoderLayer", qk_norms=("self_attn.q_norm", "self_attn.k_norm"))
