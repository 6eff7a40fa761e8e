"""scaled_dot_product_attention in a compiled program: swapped where the op gives the same values, kept where it would not."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.accuracy import assert_accurate, in_float64
from tests.compile.rewritten import Rewritten

B, H, S, D = 2, 4, 12, 64
SDPA = F.scaled_dot_product_attention


def qkv(heads: int = H, kv_heads: int = H, queries: int = S, keys: int = S, head_dim: int = D, dtype: torch.dtype = torch.float32,
        batch: int = B) -> list[torch.Tensor]:
    return [torch.randn(batch, h, s, head_dim).to(dtype) for h, s in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    """As transformers writes it."""
    batch, heads, keys, head_dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, times, keys, head_dim).reshape(batch, heads * times, keys, head_dim)


def visible(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


def hidden_row() -> torch.Tensor:
    mask = visible(B, 1, S, S)
    mask[0, :, 3] = False
    return mask


SWAPPED = {
    "full": (lambda q, k, v: SDPA(q, k, v), {}),
    "causal": (lambda q, k, v: SDPA(q, k, v, is_causal=True), {}),
    "causal_positional": (lambda q, k, v: SDPA(q, k, v, None, 0.0, True), {}),
    "scale": (lambda q, k, v: SDPA(q, k, v, scale=0.3), {}),
    "more_keys": (lambda q, k, v: SDPA(q, k, v), {"keys": 20}),
    "odd_head_dim": (lambda q, k, v: SDPA(q, k, v, is_causal=True), {"head_dim": 59}),
    "bool_mask": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), {"mask": lambda: visible(B, 1, S, S)}),
    "padding": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), {"mask": lambda: visible(B, 1, 1, S)}),
    "mask_of_two_dimensions": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), {"mask": lambda: visible(S, S)}),
    "mask_of_heads": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), {"mask": lambda: visible(1, H, S, 1)}),
    "float_mask": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), {"mask": lambda: torch.randn(H, S, S)}),
    "row_without_keys": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), {"mask": hidden_row}),
    "grouped": (lambda q, k, v: SDPA(q, k, v, is_causal=True, enable_gqa=True), {"kv_heads": 2}),
    "repeated": (lambda q, k, v: SDPA(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True), {"kv_heads": 2}),
    "strided": (lambda q, k, v: SDPA(q[..., ::2], k[..., ::2], v[..., ::2]), {"head_dim": 128}),
    "heads_last": (lambda q, k, v: SDPA(q, k, v).transpose(1, 2).reshape(B, S, -1), {}),
    "viewed": (lambda q, k, v: SDPA(q, k, v).view(B, H * S, D), {}),
    "two_layers": (lambda q, k, v, m: SDPA(SDPA(q, k, v, attn_mask=m), k, v, attn_mask=m), {"mask": lambda: visible(B, 1, S, S)}),
}
ONE_QUERY = {
    "plain": (lambda q, k, v: SDPA(q, k, v), {}),
    "static_cache": (lambda q, k, v, m: SDPA(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=m),
                     {"kv_heads": 2, "mask": lambda: visible(B, 1, 1, 20)}),
}


def check(function, options: dict, dtype: torch.dtype) -> Rewritten:
    mask = options.pop("mask", None)
    args = qkv(**options, dtype=dtype) + ([] if mask is None else [mask()])
    if mask is not None and args[-1].is_floating_point():
        args[-1] = args[-1].to(dtype)
    rewritten = Rewritten(function)
    with torch.no_grad():
        assert_accurate(rewritten(*args), function(*in_float64(args)), function(*args))
    assert not rewritten.found[0].kept
    return rewritten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SWAPPED)
def test_swapped(name, dtype):
    function, options = SWAPPED[name]
    rewritten = check(function, dict(options), dtype)
    assert rewritten.found[0].replaced == {"attention": 2 if name == "two_layers" else 1}


@pytest.mark.parametrize("name", ONE_QUERY)
def test_one_query_decodes(name):
    function, options = ONE_QUERY[name]
    assert check(function, {"queries": 1, "keys": 20, **options}, torch.float32).found[0].replaced == {"decode_attention": 1}


@pytest.mark.parametrize("queries", [1, S])
def test_repeated_heads_are_read_once(queries):
    """repeat_kv copies keys and values for each group of queries: with the op it is not needed, and must not be left in the graph."""
    rewritten = check(SWAPPED["repeated"][0] if queries > 1 else ONE_QUERY["static_cache"][0],
                      {"kv_heads": 2, "queries": queries, "keys": 20 if queries == 1 else S,
                       **({"mask": lambda: visible(B, 1, 1, 20)} if queries == 1 else {})}, torch.float32)
    (node,) = rewritten.nodes("decode_attention" if queries == 1 else "attention")
    for keys in node.args[1:3]:
        assert keys.args[0].op == "placeholder"
    assert not [node for node in rewritten.graphs[0].graph.nodes if node.target == "reshape"]


def test_one_mask_for_all_layers():
    """Widening a mask costs as much as reading it; it is the same for every layer."""
    rewritten = check(SWAPPED["two_layers"][0], {"mask": lambda: visible(B, 1, S, S)}, torch.float32)
    first, second = rewritten.nodes("attention")
    assert first.args[8] is second.args[8]


def test_a_mask_that_changes_between_layers_is_read_again():
    def function(q, k, v, mask):
        first = SDPA(q, k, v, attn_mask=mask)
        mask.logical_not_()
        return SDPA(first, k, v, attn_mask=mask)

    args, mask = qkv(), torch.rand(B, 1, S, S) < 0.5
    rewritten = Rewritten(function)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(*args, mask.clone()), function(*args, mask.clone()))
    assert rewritten.found[0].replaced == {"attention": 2}


def test_keys_that_change_after_they_were_repeated_stay_repeated():
    def function(q, k, v):
        keys, values = repeat_kv(k, 2), repeat_kv(v, 2)
        k.zero_()
        return SDPA(q, keys, values)

    args = qkv(kv_heads=2)
    with torch.no_grad():
        torch.testing.assert_close(Rewritten(function)(*[t.clone() for t in args]), function(*[t.clone() for t in args]))


KEPT = {
    # is_causal lets query i see the keys 0 to i; the op's causal lets the last query see every key.
    "is_causal with queries and keys of different number": (lambda q, k, v: SDPA(q, k, v, is_causal=True), {"queries": 5}),
    "dropout": (lambda q, k, v: SDPA(q, k, v, dropout_p=1e-30), {}),
    "not of 4 dimensions": (lambda q, k, v: SDPA(q[0], k[0], v[0]), {}),
    "head_dim 320, 1 to 256 are served": (lambda q, k, v: SDPA(q, k, v), {"head_dim": 320}),
    "query, key and value of different shapes": (lambda q, k, v: SDPA(q, k, v[..., :32]), {}),
    "heads are broadcast": (lambda q, k, v: SDPA(q, k, v), {"kv_heads": 1}),
    "scale or is_causal is computed": (lambda q, k, v: SDPA(q, k, v, scale=q.shape[2] / 7), {"dynamic": True}),
}


@pytest.mark.parametrize("reason", KEPT)
def test_kept(reason):
    """The values are then PyTorch's own."""
    function, options = KEPT[reason]
    options = dict(options)
    rewritten = Rewritten(function, dynamic=options.pop("dynamic", None))
    args = qkv(**options)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(*args), function(*args))
    assert (rewritten.found[0].replaced, rewritten.found[0].kept) == ({}, {f"attention: {reason}": 1})


def test_batches_that_broadcast_are_kept():
    q, k, v = qkv()
    rewritten = Rewritten(SDPA)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(q, k[:1], v[:1]), SDPA(q, k[:1], v[:1]))
    assert rewritten.found[0].kept == {"attention: query, key and value of different shapes": 1}


def test_gradients_are_kept():
    """The ops have no derivative: the gradient must be PyTorch's, not lost."""
    args = [t.requires_grad_() for t in qkv()]
    rewritten = Rewritten(lambda q, k, v: SDPA(q, k, v, is_causal=True))
    ours = torch.autograd.grad(rewritten(*args).sum(), args)
    torch.testing.assert_close(ours, torch.autograd.grad(SDPA(*args, is_causal=True).sum(), args))
    assert rewritten.found[0].replaced == {}
    assert list(rewritten.found[0].kept) == ["attention: a gradient is recorded; compile under torch.no_grad()"]


def test_autocast_is_kept():
    rewritten, args = Rewritten(lambda q, k, v: SDPA(q, k, v)), qkv()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert rewritten(*args).dtype is torch.bfloat16
    assert rewritten.found[0].kept == {"attention: dtypes differ, as under autocast": 1}


def test_sizes_that_vary_compile_once():
    """Queries, keys and batch are not fixed by looking at them."""
    def function(q, k, v, mask):
        return SDPA(q, k, v, attn_mask=mask) + SDPA(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], is_causal=True)

    rewritten = Rewritten(function, dynamic=True)
    with torch.no_grad():
        for batch, queries, keys in ((2, 12, 17), (3, 7, 23), (5, 33, 40)):
            args = [*qkv(queries=queries, keys=keys, batch=batch), visible(batch, 1, queries, keys)]
            torch.testing.assert_close(rewritten(*args), function(*args), atol=1e-5, rtol=1e-5)
    assert [found.replaced for found in rewritten.found] == [{"attention": 2}]


def test_the_scale_of_a_module_is_a_number():
    """dynamic=True makes symbols of the module's own numbers."""
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling = 0.3

        def forward(self, q, k, v):
            return SDPA(q, k, v, scale=self.scaling)

    rewritten, args = Rewritten(Attention(), dynamic=True), qkv()
    with torch.no_grad():
        torch.testing.assert_close(rewritten(*args), SDPA(*args, scale=0.3), atol=1e-5, rtol=1e-5)
    assert rewritten.found[0].replaced == {"attention": 1}


def test_one_query_over_a_cache_that_grows_compiles_once():
    rewritten = Rewritten(lambda q, k, v: SDPA(q, k, v), dynamic=None)
    with torch.no_grad():
        for keys in range(9, 14):
            args = qkv(queries=1, keys=keys)
            torch.testing.assert_close(rewritten(*args), SDPA(*args), atol=1e-5, rtol=1e-5)
    assert [found.replaced for found in rewritten.found] == [{"decode_attention": 1}] * 2  # once for 9 keys, once for any number
