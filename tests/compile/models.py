"""The backend as a user names it, and what it is expected to find in each family's tiny model."""
from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ftops.integrations.compile import ftops_backend
from tests.families.tiny import tiny

# In a checkout that is not installed there is no entry point to find the name by.
BACKEND = "ftops" if "ftops" in torch._dynamo.list_backends() else ftops_backend

# Of 3 layers (GPT-J: 2): two norms each and one at the end (Qwen3: and one each of queries and keys; BERT: none at the end but one of
# the embeddings and one of the head). Every norm but the first comes after an addition. GPT-J writes its attention out, by matmul and
# softmax, and adds three terms before each norm, of which the last two are one addition.
EXPECTED = {
    "llama": {"rms_norm": 7, "residual": 6, "attention": 3},
    "mistral": {"rms_norm": 7, "residual": 6, "attention": 3},
    "qwen2": {"rms_norm": 7, "residual": 6, "attention": 3},
    "qwen3": {"rms_norm": 7 + 6, "residual": 6, "attention": 3},
    "gpt2": {"layer_norm": 7, "residual": 6, "attention": 3},
    "gptj": {"layer_norm": 3, "residual": 2},
    "bert": {"layer_norm": 8, "residual": 6, "attention": 3},
}


def decoding(family: str) -> dict[str, int]:
    """The same with one query."""
    counts = dict(EXPECTED[family])
    if "attention" in counts:
        counts["decode_attention"] = counts.pop("attention")
    return counts


def model(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As transformers runs it by default: with SDPA where the family can."""
    return tiny(family, device, dtype, "eager" if family == "gptj" else "sdpa")
