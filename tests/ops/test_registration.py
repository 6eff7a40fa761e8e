"""An op that eager runs but torch.compile breaks: schema, fake and tracing of every handle."""
from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from ftops.op import LIBRARY
from ftops.ops import OPS, op_module
from tests.ops.calls import IN_TURN, call, case, handle_calls

CPU = torch.device("cpu")
ONE_OF_EACH_HANDLE = (
    ("rms_norm", "llama"), ("rms_norm", "residual"), ("layer_norm", "bert"), ("layer_norm", "residual"), ("rotary", "repeated"),
    ("gated_activation", "silu"), ("bias_activation", "gelu"), ("linear", "everything"), ("linear_w4a16", "zeros"),
    ("linear_w8a16", "everything"), ("linear_fp8", "everything"), ("linear_w8a8", "everything"),
    ("append_kv", "prefill"), ("rotary_append", "qwen3"),
    ("attention", "everything"), ("attention_varlen", "causal"), ("attention_fp8", "causal"), ("decode_attention", "paged_new"),
    ("sample", "mixed"),
)


def clone(value):
    """The arguments with every tensor copied, strides kept, so that a run that writes does not feed the next."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
    if isinstance(value, (tuple, list)):
        return type(value)(clone(item) for item in value)
    return {key: clone(item) for key, item in value.items()} if isinstance(value, dict) else value


def tensors(value):
    """Every tensor in nested arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def assert_same(ours, expected):
    for one, other in zip(tensors(ours), tensors(expected), strict=True):
        assert one.stride() == other.stride() or one.numel() == 0
        assert torch.equal(one.float().nan_to_num(123.0), other.float().nan_to_num(123.0))


def form(value):
    """What tracing branches on: which arguments are given, flags and ranks, but neither sizes nor values."""
    if isinstance(value, torch.Tensor):
        return value.dim()
    if isinstance(value, dict):
        return tuple((key, form(item)) for key, item in sorted(value.items()) if item is not None)
    return tuple(map(form, value)) if isinstance(value, (tuple, list)) else value if isinstance(value, bool) else type(value)


@pytest.mark.parametrize(("name", "case", "dtype"), IN_TURN)
def test_opcheck(name, case, dtype):
    """The schema tells the truth about mutation and aliasing, and the fake about shape, dtype and strides."""
    args, kwargs = case.make(CPU, dtype)
    for handle, low_level in handle_calls(name, args, kwargs):
        checks = ["test_autograd_registration", "test_faketensor"]
        if not any(t.dtype is torch.float8_e4m3fn for t in tensors(low_level)):  # PyTorch's checker multiplies what it compares
            checks.append("test_schema")
        opcheck(handle, low_level, test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_compiled_is_eager(name):
    """The public function, checks included, traces without a graph break and gives and writes the same bits, in every form of its call."""
    seen = set()
    for sample in op_module(name).cases():
        args, kwargs = sample.make(CPU, torch.bfloat16)
        if form((args, kwargs)) in seen:
            continue
        seen.add(form((args, kwargs)))
        print(sample.name)  # shown where it fails
        torch._dynamo.reset()
        eager_args, eager_kwargs = clone(args), clone(kwargs)
        expected = call(name, eager_args, eager_kwargs)
        compiled = torch.compile(lambda a, k: call(name, a, k), backend="aot_eager", fullgraph=True)
        assert_same(compiled(args, kwargs), expected)
        assert_same((args, kwargs), (eager_args, eager_kwargs))


@pytest.mark.parametrize(("name", "which"), ONE_OF_EACH_HANDLE)
def test_inductor_is_eager(name, which, fresh_dynamo):
    args, kwargs = case(name, which).make(CPU, torch.float32)
    eager_args, eager_kwargs = clone(args), clone(kwargs)
    expected = call(name, eager_args, eager_kwargs)
    compiled = torch.compile(lambda a, k: call(name, a, k), backend="inductor", fullgraph=True)
    assert_same(compiled(args, kwargs), expected)
    assert_same((args, kwargs), (eager_args, eager_kwargs))


def test_each_handle_is_compiled_once():
    """A new handle must join the list above."""
    samples = [(name, *case(name, which).make(CPU, torch.float32)) for name, which in ONE_OF_EACH_HANDLE]
    listed = {handle.name() for sample in samples for handle, _ in handle_calls(*sample)}
    registered = {handle.name() for name in OPS for handle in vars(op_module(name)).values() if isinstance(handle, torch._ops.OpOverload)}
    assert listed == registered
    assert registered == {f"ftops::{key.split('/')[1]}" for key in LIBRARY._op_impls if key.split("/")[0] == "ftops"}


@pytest.mark.parametrize(("name", "which"), [
    ("rms_norm", "llama"), ("rms_norm", "residual"), ("layer_norm", "bert"), ("rotary", "repeated"), ("gated_activation", "silu"),
    ("bias_activation", "gelu"), ("linear", "batch"), ("linear_w4a16", "row"), ("linear_w8a16", "row"), ("linear_fp8", "row"),
    ("linear_w8a8", "row"), ("append_kv", "prefill"), ("rotary_append", "qwen3"), ("attention", "full"),
    ("decode_attention", "d64"), ("sample", "plain")])
def test_another_batch_size_does_not_compile_again(name, which, fresh_dynamo):
    """A check that formats a size into its message makes it a constant, and a server would stall on every new batch."""
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return graph.forward

    args, kwargs = case(name, which).make(CPU, torch.float32)
    compiled = torch.compile(lambda a, k: call(name, a, k), backend=counting, fullgraph=True, dynamic=True)
    for batch in (6, 7, 11):  # no other size of the cases, which Dynamo would take for the same symbol
        sample = with_batch(args, kwargs, batch)
        expected = clone(sample)
        assert_same(compiled(*sample), call(name, *expected))
        assert_same(sample, expected)
    assert len(compiles) == 1


def with_batch(args, kwargs, batch):
    """The same call with `batch` rows in every tensor that has as many rows as the first one."""
    rows = args[0].shape[0]

    def resize(value):
        if isinstance(value, torch.Tensor):
            per_row = (value.dim() > 1 and len(value) == rows) or (value.dtype is torch.int32 and value.dim() == 1)
            return value[torch.arange(batch) % rows] if per_row else value
        return type(value)(resize(item) for item in value) if isinstance(value, (tuple, list)) else value
    return resize(args), {key: resize(value) for key, value in kwargs.items()}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_whoever_listens_to_the_dispatcher_hears_the_op():
    """torch.jit.trace, dispatch modes and vmap: a call that went past them would be missing from the trace, or see a wrong tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from ftops import ops
    x, weight = torch.randn(3, 4, 64), torch.randn(64)
    norm = lambda x: ops.rms_norm(x, weight, 1e-6)  # noqa: E731
    expected = norm(x)

    with torch.no_grad():
        traced = torch.jit.trace(norm, (x,), check_trace=False)
    assert "ftops::rms_norm" in str(traced.graph)

    heard = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    with Listener():
        ours = norm(x)
    assert_same(ours, expected)
    assert heard == ["ftops.rms_norm.default"]
    assert_same(torch.func.vmap(norm)(x), expected)
