"""How a graph of Dynamo is read and changed: what a node is, what stands for its value, when it may be swapped.

A node is swapped only where an op computes the same: otherwise it is kept, with the reason. Shapes, dtypes and whether a
gradient is recorded are read from the example value that Dynamo leaves on every node.
"""
from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ftops.op import DTYPES

FUNCTIONS = {
    operator.add: "add", torch.add: "add", operator.mul: "mul", torch.mul: "mul", operator.pow: "pow", torch.pow: "pow",
    torch.square: "square", torch.mean: "mean", torch.rsqrt: "rsqrt", F.layer_norm: "layer_norm", torch.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm", torch.rms_norm: "rms_norm", F.scaled_dot_product_attention: "attention",
}
CASTS = ("to", "float", "type_as", "half", "bfloat16")
IN_PLACE = {operator.setitem, *(getattr(operator, name) for name in (
    "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"))}
RESTRIDED = ("transpose", "permute", "unsqueeze", "squeeze", "expand", "unflatten", "flatten", "reshape")


class Kept(Exception):
    """Why a node stays as it is."""


def keep_if(condition: bool, reason: str) -> None:
    if condition:
        raise Kept(reason)


def kind_of(node: Any) -> str | None:
    if not isinstance(node, Node):
        return None
    return node.target if node.op == "call_method" else FUNCTIONS.get(node.target) if node.op == "call_function" else None


def value(node: Any) -> Any:
    """The fake tensor that stands for a node, or the constant itself."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def same(left: Any, right: Any) -> bool:
    """Whether sizes are equal. Two symbols may become one; no symbol becomes a number, which would mean a compilation for each."""
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(same(one, other) for one, other in zip(left, right, strict=True))
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        return guard_or_false(left == right)
    return statically_known_true(left == right)


def number(item: Any) -> float | None:
    """A constant, or a float attribute of a module, which dynamic=True makes a symbol (it becomes a number again); else None."""
    found = value(item)
    if isinstance(found, torch.SymFloat) and (found.node.expr.is_symbol or found.node.expr.is_number):
        return float(found)
    return found if isinstance(found, (int, float)) else None


def bound(node: Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def check_served(node: Node, *inputs: Any) -> None:
    """Plain tensors of one dtype that the ops take, on a CPU or CUDA device, and no gradient recorded."""
    tensors = [value(item) for item in (*inputs, node)]
    keep_if(not all(isinstance(t, torch.Tensor) for t in tensors), "no tensor")
    keep_if(any(is_traceable_wrapper_subclass(t) for t in tensors), "a tensor of a subclass, such as DTensor")
    keep_if(tensors[-1].requires_grad, "a gradient is recorded; compile under torch.no_grad()")
    keep_if(tensors[0].dtype not in DTYPES or any(t.dtype is not tensors[0].dtype for t in tensors), "dtypes differ, as under autocast")
    keep_if(tensors[0].device.type not in ("cpu", "cuda"), f"device {tensors[0].device.type}")


def writes(node: Node) -> bool:
    """Whether it may change one of its inputs."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if node.op == "call_module" or isinstance(target, (torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return True
    name = target if node.op == "call_method" else getattr(target, "__name__", "") if node.op == "call_function" else ""
    in_place = target in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def undisturbed(first: Node, last: Node) -> bool:
    """No node from `first` to `last` writes in place: then the order in which they read does not matter."""
    node = first
    while node is not last:
        node = node.next
        if writes(node):
            return False
    return True


def viewed(node: Node) -> bool:
    """Whether somebody calls view on the result, which depends on its strides."""
    return any(kind_of(user) == "view" or (kind_of(user) in RESTRIDED and viewed(user)) for user in node.users)


def replace(node: Node, by: Node) -> None:
    by.meta["example_value"] = value(node)
    node.replace_all_uses_with(by)
    drop(node)


def drop(node: Node) -> None:
    """Erases a node that nobody uses, and what it alone used. Graph.eliminate_dead_code would erase in-place methods as well."""
    if not node.users and (kind_of(node) in (*FUNCTIONS.values(), *CASTS, *RESTRIDED) or node.target is operator.getitem):
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for item in [item for item in inputs if not item.users]:
            drop(item)
