"""The engine: many requests over one model, which join and leave between steps and share a paged cache.

pages.py      who holds which page, and which can be shared
scheduler.py  what the next step does: plain Python, no tensors
table.py      the rules of many requests as one set of tensors
batch.py      requests as rows of tensors, and a step of them: on a GPU the replay of CUDA graphs
engine.py     the thread that makes the steps; handle.py: a request as its owner sees it
"""
from __future__ import annotations

from ftops.engine.batch import PagedDecoder, Prompts
from ftops.engine.engine import Engine, Stats
from ftops.engine.handle import Answer, Handle
from ftops.engine.scheduler import QueueFull

__all__ = ["Answer", "Engine", "Handle", "PagedDecoder", "Prompts", "QueueFull", "Stats"]
