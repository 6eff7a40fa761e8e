"""A page id that points outside the pool: memory of somebody else is never read, and FTOPS_DEBUG=1 says where the id came from."""
from __future__ import annotations

import runpy

import pytest
import torch

import ftops
from tests.accuracy import assert_accurate, in_float64
from tests.ops.calls import DTYPE_IDS, call, case
from tests.ops.oracles import decode_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OUTSIDE = (-1, -(2 ** 31), 2 ** 31 - 1, 10 ** 6)


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setattr(ftops.op, "DEBUG", True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("which", ["paged", "paged_new", "paged_int8", "paged_fp8"])
def test_decode_hides_the_keys_of_a_page_outside_the_pool(which, dtype, device):
    """The middle of a sequence is missing: attention over what is left, not zeros, not a fault."""
    args, kwargs = case("decode_attention", which).make(torch.device(device), dtype)
    table, size = kwargs["page_table"], 16
    hidden = torch.zeros(table.shape[0], 1, 1, table.shape[1] * size, device=device)
    broken = table.clone()
    for place, page in ((2, len(args[1])), *zip((0, 1, 3, 5), OUTSIDE, strict=True)):
        broken[2, place] = page
        hidden[2, ..., size * place : size * (place + 1)] = float("-inf")
    ours = call("decode_attention", args, kwargs | {"page_table": broken})
    kwargs["bias"] = hidden.to(dtype)
    assert_accurate(ours, decode_attention(*in_float64(args), **in_float64(kwargs)), decode_attention(*args, **kwargs))


@pytest.mark.parametrize("device", DEVICES)
def test_decode_of_nothing_but_pages_outside_the_pool_is_zero(device):
    args, kwargs = case("decode_attention", "paged").make(torch.device(device), torch.float32)
    kwargs["page_table"] = torch.full_like(kwargs["page_table"], -1)
    assert not call("decode_attention", args, kwargs).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", OUTSIDE)
def test_append_writes_nothing_for_a_page_outside_the_pool(page, device):
    args, kwargs = case("append_kv", "paged").make(torch.device(device), torch.float32)
    kwargs["page_table"] = torch.full_like(kwargs["page_table"], page)
    call("append_kv", args, kwargs)
    assert not args[2].any() and not args[3].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [*OUTSIDE, 40])
def test_debugging_names_the_page(page, device, debug):
    for name in ("decode_attention", "append_kv"):
        args, kwargs = case(name, "paged").make(torch.device(device), torch.float32)
        call(name, args, kwargs)
        kwargs["page_table"][2, 2] = page
        before, pages = [t.clone() for t in args], len(args[1 if name == "decode_attention" else 2])
        with pytest.raises(ValueError, match=rf"{name}: page_table\[2, 2\] is {page}; allowed: 0 to {pages - 1}"):
            call(name, args, kwargs)
        assert all(torch.equal(now.nan_to_num(1), then.nan_to_num(1)) for now, then in zip(args, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_debugging_leaves_alone_what_is_not_reached(device, debug):
    """Serving engines leave anything in the unused end of a table, and left of a window."""
    args, kwargs = case("decode_attention", "paged_window").make(torch.device(device), torch.float32)
    expected = call("decode_attention", args, kwargs)
    for row, length in enumerate(args[3].tolist()):
        kwargs["page_table"][row, -(-length // 16):] = -1
        kwargs["page_table"][row, : max(0, length - 1 - kwargs["window"]) // 16] = -1
    assert torch.equal(call("decode_attention", args, kwargs), expected)


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("0", False)])
def test_debugging_is_asked_for_by_the_environment(value, asked, monkeypatch):
    monkeypatch.setenv("FTOPS_DEBUG", value)
    assert runpy.run_path(ftops.op.__file__)["DEBUG"] is asked
