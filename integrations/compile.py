"""`torch.compile(model, backend="ftops")`: attention and norms of an unpatched model become ftops ops, and Inductor compiles the rest.

The graph that Dynamo hands over still has scaled_dot_product_attention and layer_norm as single nodes, and an RMS norm as the few
that its author wrote; they are swapped there, before autograd and Inductor take them apart. So the graph alone says what was done,
and Inductor's caches key it without help.

Found through the entry point group torch_dynamo_backends, which registers it: this module must not.
"""
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

from ftops.integrations.compile_attention import swap_attention
from ftops.integrations.compile_graph import Kept, kind_of
from ftops.integrations.compile_norms import NORMS, swap_norm

LOG = logging.getLogger(__name__)


def ftops_backend(graph: GraphModule, example_inputs: Sequence[torch.Tensor], *, mode: str | None = None,
                  options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compiles a Dynamo graph with ftops ops and Inductor. mode and options are those of torch.compile's own backend.

    The ops have no derivative: where gradients are recorded nothing is swapped, and training is Inductor's. Compile for inference
    under torch.no_grad() or torch.inference_mode(). `replaced()` counts what was swapped; the logger "ftops.integrations.compile"
    says at INFO what each graph got, and what it kept and why.
    """
    found = rewrite(graph)
    for kind, count in found.replaced.items():
        counters["ftops"][kind] += count
    LOG.info("graph of %d nodes: replaced %s; kept %s", len(graph.graph.nodes), dict(found.replaced), dict(found.kept))
    patches = torch._inductor.list_mode_options(mode) if mode else {}
    return torch._inductor.compile(graph, list(example_inputs), options={**patches, **(options or {})})


def _reset() -> None:
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees
    reset_cudagraph_trees()


ftops_backend.reset = _reset  # what torch.compiler.reset() asks a backend for


def replaced() -> Counter[str]:
    """How many nodes were swapped in this process, by op; `residual` counts the norms that took the addition before them along.

    They are Dynamo's own counters, torch._dynamo.utils.counters["ftops"], and are cleared with them.
    """
    return Counter(counters["ftops"])


@dataclass
class Found:
    """What `rewrite` did: nodes swapped, by op, and nodes kept, by reason."""

    replaced: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)


def rewrite(module: GraphModule) -> Found:
    """Swaps in place what can be swapped."""
    found = Found()
    made: dict[tuple, Node] = {}
    for node in list(module.graph.nodes):
        kind = kind_of(node)
        try:
            if kind == "attention":
                found.replaced[swap_attention(node, made)] += 1
            elif kind in NORMS and (swapped := swap_norm(node)) is not None:
                name, with_residual = swapped
                found.replaced[name] += 1
                found.replaced["residual"] += with_residual
        except Kept as reason:
            found.kept[f"{'rms_norm' if kind == 'rsqrt' else kind}: {reason}"] += 1
    module.graph.lint()
    module.recompile()
    return Found(+found.replaced, found.kept)
