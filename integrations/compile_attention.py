"""scaled_dot_product_attention in a graph of Dynamo, as an ftops op: `attention`, or `decode_attention` for one query."""
from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from ftops.integrations import compile_graph as nodes
from ftops.integrations.compile_graph import keep_if, kind_of, same, value
from ftops.ops.attention import ATTENTION, MAX_HEAD_DIM
from ftops.ops.decode_attention import DECODE_ATTENTION


def swap_attention(node: Node, made: dict[tuple, Node]) -> str:
    """Puts the op in place of `node` and returns its name. made: masks and lengths that earlier layers of the graph wanted alike."""
    call = nodes.bound(node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
                 {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False})
    q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    nodes.check_served(node, q, k, v)
    keep_if(call["dropout_p"] != 0.0, "dropout")
    keep_if(value(q).dim() != 4 or value(k).dim() != 4, "not of 4 dimensions")
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _) = value(q).shape, value(k).shape
    head_dim = int(head_dim)  # of all sizes the one that never varies
    keep_if(not 0 < head_dim <= MAX_HEAD_DIM, f"head_dim {head_dim}, 1 to {MAX_HEAD_DIM} are served")
    keep_if(not same(value(v).shape, value(k).shape) or not same(value(k).shape[0], batch), "query, key and value of different shapes")
    keep_if(not same(heads, kv_heads) and not (call["enable_gqa"] and same(heads % kv_heads, 0)), "heads are broadcast")
    scale, causal = head_dim ** -0.5 if call["scale"] is None else nodes.number(call["scale"]), call["is_causal"]
    keep_if(scale is None or causal not in (True, False), "scale or is_causal is computed")
    keep_if(causal and mask is not None, "is_causal and a mask")
    # is_causal is aligned to the top left, the op to the bottom right: the same for as many queries as keys.
    keep_if(causal and not same(queries, keys), "is_causal with queries and keys of different number")
    keep_if(mask is not None and value(mask).dtype not in (torch.bool, torch.float32, value(q).dtype), "mask of another dtype")
    if ungrouped(k, node) is not k and ungrouped(v, node) is not v:
        k, v = ungrouped(k, node), ungrouped(v, node)
    shape, one = (batch, heads, queries, keys), same(queries, 1)
    graph = node.graph
    with graph.inserting_before(node):
        sizes = [size if isinstance(size, int) else graph.call_method("size", (item, dim))
                 for size, item, dim in zip(shape, (q, q, q, k), (0, 1, 2, 2), strict=True)]
        dtype, device = value(node).dtype, value(node).device
        bias = None if mask is None else _shared(
            made, ("bias", node if written(mask) else mask, dtype, str(shape)), lambda: _bias(mask, dtype, sizes))
        q, k, v = (graph.call_method("transpose", (item, 1, 2)) for item in (q, k, v))
        if one:
            lengths = _shared(made, ("lengths", device, str(shape)), lambda: graph.call_function(
                torch.full, ((sizes[0],), sizes[3]), {"dtype": torch.int32, "device": device}))
            out = graph.call_function(DECODE_ATTENTION, (q, k, v, lengths, None, scale, -1, 0.0, bias, None, None, None))
        else:
            out = graph.call_function(ATTENTION, (q, k, v, causal, scale, -1, -1, 0.0, bias, None, None))
        out = graph.call_method("transpose", (out, 1, 2))
        strides = value(node).stride()
        if not (same(strides[1], head_dim) and same(strides[2], heads * head_dim)) and nodes.viewed(node):
            out = graph.call_method("contiguous", (out,))
    nodes.replace(node, out)
    return "decode_attention" if one else "attention"


def ungrouped(node: Node, user: Node) -> Node:
    """Keys or values before `repeat_kv`, which copies each head for the queries that share it: x[:, :, None].expand(...).reshape(...)."""
    wide = node.args[0] if kind_of(node) == "reshape" else None
    narrow = wide.args[0] if kind_of(wide) == "expand" else None
    if not isinstance(narrow, Node) or narrow.target is not operator.getitem:
        return node
    source, index = narrow.args
    if not isinstance(index, tuple) or any(i not in (slice(None), None, Ellipsis) for i in index):
        return node
    whole, repeated = value(source).shape, value(wide).shape
    fits = (len(whole) == 4 and len(repeated) == 5 and same((*repeated[:2], *repeated[3:]), whole)
            and same(value(narrow).shape[2], 1) and same(value(node).shape, (whole[0], whole[1] * repeated[2], *whole[2:])))
    return source if fits and nodes.undisturbed(narrow, user) else node


def written(node: Node) -> bool:
    return any(nodes.writes(user) for user in node.users)


def _shared(made: dict[tuple, Node], key: tuple, make: Callable[[], Node]) -> Node:
    if key not in made:
        made[key] = make()
    return made[key]


def _bias(mask: Node, dtype: torch.dtype, sizes: list[int | Node]) -> Node:
    """The mask as the op wants it: added, of all four sizes. True hides nothing and False everything."""
    graph: Graph = mask.graph
    if value(mask).dtype is torch.bool:
        mask = graph.call_method("to", (graph.call_function(torch.where, (mask, 0.0, float("-inf"))), dtype))
    return graph.call_method("expand", (mask, *sizes))
