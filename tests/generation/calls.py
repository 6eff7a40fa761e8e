"""Calls of `model.generate` that several tests compare."""
from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

import ftops
from tests.families.tiny import prompt, tiny


def run(model: PreTrainedModel, padding: str | None = "left", batch: int = 3, **options: object) -> list[list[int]]:
    ids, mask = (t.to(model.device) for t in prompt(batch=batch, padding=padding))
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 20, "do_sample": False, **options}).tolist()


def same(family: str, device: str, dtype: torch.dtype, **options: object) -> PreTrainedModel:
    model = tiny(family, device, dtype)
    theirs = run(model, **copy.deepcopy(options))
    assert run(ftops.patch(model), **options) == theirs
    return model
