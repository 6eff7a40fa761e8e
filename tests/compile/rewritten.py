"""A program as the backend changes it, run without Inductor: what was swapped, what was kept, and what it computes."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ftops.integrations.compile import Found, rewrite


@dataclass
class Rewritten:
    """The function compiled with a backend that only rewrites. `found` and `graphs` have one entry a compilation."""

    function: Callable[..., Any]
    dynamic: bool | None = None
    found: list[Found] = field(default_factory=list)
    graphs: list[GraphModule] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch._dynamo.reset()
        self.compiled = torch.compile(self.function, backend=self._backend, fullgraph=True, dynamic=self.dynamic)

    def _backend(self, graph: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.found.append(rewrite(graph))
        self.graphs.append(graph)
        return graph.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def nodes(self, name: str) -> list[Node]:
        """The calls of op `name` in the last graph."""
        return [node for node in self.graphs[-1].graph.nodes if node.target is getattr(torch.ops.ftops, name).default]
