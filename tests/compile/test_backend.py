"""The backend's registration, its options, and what it tells."""
from __future__ import annotations

import importlib.metadata
import logging
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ftops.integrations.compile import ftops_backend, replaced

ROOT = Path(__file__).parents[2]
WEIGHT = torch.randn(64)


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x + x, (64,), WEIGHT)


def test_the_entry_point_names_the_backend():
    """Read from pyproject.toml: what any installation will register."""
    (line,) = re.findall(r"^\[project\.entry-points\.torch_dynamo_backends\]\n(.+)$", (ROOT / "pyproject.toml").read_text(), re.M)
    name, module, attribute = re.fullmatch(r'(\w+) = "([\w.]+):(\w+)"', line).groups()
    assert name == "ftops"
    assert getattr(import_module(module), attribute) is ftops_backend


def test_torch_finds_it_by_name():
    installed = [dist for dist in importlib.metadata.distributions() if dist.metadata["Name"] == "ftops"]
    if not installed:
        pytest.skip("ftops is not installed here; tests/packaging installs it and asks")
    assert "ftops" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("ftops") is ftops_backend


def test_mode_and_options_are_inductors(monkeypatch, fresh_dynamo):
    seen = []

    def compile(graph, inputs, options):
        seen.append(options)
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", compile)
    with torch.no_grad():
        torch.compile(norm, backend=ftops_backend)(torch.randn(2, 64))
        torch._dynamo.reset()
        torch.compile(norm, backend=ftops_backend, mode="reduce-overhead")(torch.randn(2, 64))
        torch._dynamo.reset()
        torch.compile(norm, backend=ftops_backend, options={"max_autotune": True})(torch.randn(2, 64))
    assert seen == [{}, {"triton.cudagraphs": True}, {"max_autotune": True}]


@pytest.mark.parametrize("wrong", [{"mode": "fastest"}, {"options": {"no_such_option": 1}}])
def test_wrong_mode_or_option_is_named(wrong, fresh_dynamo):
    with torch.no_grad(), pytest.raises(Exception, match=r"fastest|no_such_option"):
        torch.compile(norm, backend=ftops_backend, **wrong)(torch.randn(2, 64))


def test_what_was_swapped_is_counted_and_logged(caplog, fresh_dynamo):
    before = replaced()
    x = torch.randn(2, 64)
    with torch.no_grad(), caplog.at_level(logging.INFO, "ftops.integrations.compile"):
        y = torch.compile(norm, backend=ftops_backend)(x)
        torch.testing.assert_close(y, norm(x))
    assert replaced() - before == {"layer_norm": 1, "residual": 1}
    (record,) = [record for record in caplog.records if record.name == "ftops.integrations.compile"]
    assert "replaced {'layer_norm': 1, 'residual': 1}; kept {}" in record.getMessage()
