"""The families that ftops has a description of. A new family is one file here and one line in `ARCHS`."""
from __future__ import annotations

from ftops.integrations.transformers.arch import Arch
from ftops.integrations.transformers.archs import bert, gpt2, gptj, llama, mistral, qwen2, qwen3

ARCHS: dict[str, Arch] = {
    "llama": llama.ARCH,
    "mistral": mistral.ARCH,
    "qwen2": qwen2.ARCH,
    "qwen3": qwen3.ARCH,
    "gpt2": gpt2.ARCH,
    "gptj": gptj.ARCH,
    "bert": bert.ARCH,
}
