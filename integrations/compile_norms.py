"""LayerNorm and RMS norm in a graph of Dynamo, called or written out, as ftops ops, with the residual addition before them."""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ftops.integrations.compile_graph import CASTS, Kept, bound, check_served, keep_if, kind_of, number, replace, same, undisturbed, value
from ftops.ops.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from ftops.ops.rms_norm import ADD_RMS_NORM, RMS_NORM


@dataclass(frozen=True)
class Norm:
    """A norm of the graph: the node of its result, the first node that reads x, and the rest of the op's arguments."""

    kind: str
    node: Node
    first: Node
    x: Node
    vectors: tuple[Node | None, ...]
    constants: tuple[float, ...]

    @property
    def handles(self) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
        return (RMS_NORM, ADD_RMS_NORM) if self.kind == "rms_norm" else (LAYER_NORM, ADD_LAYER_NORM)


def layer_norm(node: Node) -> Norm:
    call = bound(node, ("input", "normalized_shape", "weight", "bias", "eps"), {"weight": None, "bias": None, "eps": 1e-5})
    vectors = (call["weight"], call["bias"])
    check_served(node, call["input"], *(v for v in vectors if v is not None))
    keep_if(len(call["normalized_shape"]) != 1, "over more than the last dimension")
    return Norm("layer_norm", node, node, call["input"], vectors, (eps_of(call),))


def rms_norm(node: Node) -> Norm:
    call = bound(node, ("input", "normalized_shape", "weight", "eps"), {"weight": None, "eps": None})
    keep_if(call["weight"] is None, "no weight")
    check_served(node, call["input"], call["weight"])
    keep_if(len(call["normalized_shape"]) != 1, "over more than the last dimension")
    return Norm("rms_norm", node, node, call["input"], (call["weight"],), (eps_of(call), 0.0))


def eps_of(call: dict[str, Any]) -> float:
    eps = number(call["eps"])
    keep_if(eps is None, "no eps, or a computed one")
    return eps


def written_out_rms_norm(node: Node) -> Norm | None:
    """x * rsqrt(mean(x^2) + eps) * weight, or * (1 + weight), with casts between, as Llama, T5 and Gemma write it; None if it is not."""
    mean, eps = with_constant(node.args[0], "add")
    if kind_of(mean) != "mean":
        return None
    call = bound(mean, ("input", "dim", "keepdim"), {"dim": None, "keepdim": False})
    square = call["input"]
    power = kind_of(square) == "square" or (kind_of(square) == "pow" and square.args[1] == 2) or (
        kind_of(square) == "mul" and square.args[0] is square.args[1])
    if not power or call["dim"] not in (-1, (-1,), [-1]) or not call["keepdim"]:
        return None
    x = widened(square.args[0])
    found = scaled_by_weight(node, x)
    if found is None:
        return None
    last, weight, offset = found
    check_served(last, x, weight)
    first = square if square.args[0] is x else square.args[0]
    return Norm("rms_norm", last, first, x, (weight,), (eps, offset))


def scaled_by_weight(rsqrt: Node, x: Node) -> tuple[Node, Node, float] | None:
    """Follows rsqrt to x * rsqrt * (offset + weight), with casts anywhere, back in x's dtype: its node, weight and offset.

    None where another path leads away, since what it reads would be gone.
    """
    last, multiplied, weight, offset = rsqrt, False, None, 0.0
    while weight is None or value(last).dtype is not value(x).dtype:
        if len(last.users) != 1:
            return None
        user = next(iter(last.users))
        if kind_of(user) == "mul" and len(user.args) == 2 and weight is None:
            other = widened(user.args[1] if user.args[0] is last else user.args[0])
            if multiplied:
                inner, constant = with_constant(other, "add")
                weight, offset = (other, 0.0) if inner is None else (widened(inner), constant)
                if not is_parameter(weight) or not same(value(weight).shape, (int(value(x).shape[-1]),)):
                    return None
            elif other is not x:
                return None
            multiplied = True
        elif kind_of(user) not in CASTS or user.args[0] is not last:
            return None
        last = user
    return last, weight, offset


NORMS = {"layer_norm": layer_norm, "rms_norm": rms_norm, "rsqrt": written_out_rms_norm}


def is_parameter(node: Any) -> bool:
    """An input of the graph, which is there before any norm."""
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr") and isinstance(value(node), torch.Tensor)


def with_constant(node: Any, kind: str) -> tuple[Node | None, float]:
    """node = kind(tensor, number), either way round, as (tensor, number); (None, 0) if it is not."""
    if kind_of(node) == kind and len(node.args) == 2 and not node.kwargs:
        for inner, other in (node.args, node.args[::-1]):
            if isinstance(value(inner), torch.Tensor) and number(other) is not None:
                return inner, float(number(other))
    return None, 0.0


def widened(node: Any) -> Any:
    """The node before casts that lose nothing."""
    while kind_of(node) in CASTS and value(node).device == value(node.args[0]).device and torch.promote_types(
            value(node.args[0]).dtype, value(node).dtype) is value(node).dtype:
        node = node.args[0]
    return node


def swap_norm(node: Node) -> tuple[str, bool] | None:
    """Puts the op in place of the norm that `node` belongs to, if it does. Returns its name and whether the addition that makes x
    was taken along: then its sum is the op's second result."""
    norm = NORMS[kind_of(node)](node)
    if norm is None:
        return None
    graph, (plain, fused) = node.graph, norm.handles
    if not undisturbed(norm.first, norm.node):
        raise Kept("an operation in place between its parts")
    x, rest = norm.x, (*norm.vectors, *norm.constants)
    terms = x.args if kind_of(x) == "add" and len(x.args) == 2 and not x.kwargs else ()
    joined = len(terms) == 2 and all(
        isinstance(t, Node) and value(t).dtype is value(x).dtype and same(value(t).shape, value(x).shape) for t in terms)
    ready = all(v is None or is_parameter(v) for v in norm.vectors)
    if not (joined and ready and undisturbed(x, norm.node)):
        with graph.inserting_before(norm.node):
            replace(norm.node, graph.call_function(plain, (x, *rest)))
        return norm.kind, False
    with graph.inserting_before(x):
        both = graph.call_function(fused, (*terms, *rest))
        y, total = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    replace(x, total)
    replace(norm.node, y)
    return norm.kind, True
