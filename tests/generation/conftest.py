"""Whether the loop served a call."""
from __future__ import annotations

import pytest

from ftops.integrations.transformers import generate as module


@pytest.fixture
def loops(monkeypatch):
    """How often the loop ran, and what was said of transformers' own."""
    ran: list[object] = []
    original = module.Loop.__iter__

    def counting(self):
        ran.append(self)
        return original(self)

    monkeypatch.setattr(module.Loop, "__iter__", counting)
    monkeypatch.setattr(module, "_SAID", set())
    return ran
