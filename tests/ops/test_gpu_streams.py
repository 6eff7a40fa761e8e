"""A launch in the wrong place: another stream, another device, inside a CUDA graph."""
from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import ftops
from ftops.ops import OPS
from tests.ops.calls import call, case

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SAMPLES = (  # no two share a kernel: test_compiling_during_capture_is_refused needs each to have its own to load
    ("rms_norm", "residual"), ("layer_norm", "bert"), ("rotary", "table"), ("gated_activation", "silu"), ("bias_activation", "gelu"),
    ("linear", "everything"), ("linear_w4a16", "zeros"), ("linear_w8a16", "everything"), ("linear_fp8", "everything"),
    ("linear_w8a8", "many_everything"), ("append_kv", "odd"), ("rotary_append", "qwen3_paged_fp8"), ("attention", "everything"),
    ("attention_varlen", "causal"), ("attention_fp8", "causal"), ("decode_attention", "paged_new"), ("sample", "mixed"),
)


def test_every_op_is_sampled():
    assert [name for name, _ in SAMPLES] == list(OPS)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def mapped(value, change):
    """The arguments with `change` applied to every tensor."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    return {key: mapped(item, change) for key, item in value.items()} if isinstance(value, dict) else value


def outcome(name, args, kwargs):
    """What the call returns and what it leaves in its arguments."""
    result = call(name, args, kwargs)
    return [tensor.clone() for tensor in tensors(result) + tensors((args, kwargs))]


def assert_equal(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one.cpu().float().nan_to_num(123.0), other.cpu().float().nan_to_num(123.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "which"), SAMPLES)
def test_side_stream_waits_for_its_producer(name, which, dtype):
    """The inputs are written late on a side stream; a kernel on any other stream would read the NaN and zeros from before."""
    args, kwargs = case(name, which).make(CUDA, dtype)
    expected = outcome(name, *mapped((args, kwargs), torch.clone))
    late = mapped((args, kwargs), lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else torch.zeros_like(t))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for target, source in zip(tensors(late), tensors((args, kwargs)), strict=True):
            target.copy_(source)
        ours = outcome(name, *late)
    side.synchronize()
    assert_equal(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize(("name", "which"), SAMPLES)
def test_second_device_while_the_first_is_current(name, which):
    """With device_map="auto" the current device stays 0 while layers live on others."""
    args, kwargs = case(name, which).make(CUDA, torch.bfloat16)
    expected = outcome(name, *mapped((args, kwargs), torch.clone))
    ours = outcome(name, *mapped((args, kwargs), lambda t: t.to("cuda:1")))
    assert all(tensor.device.index == 1 for tensor in ours)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert_equal(ours, expected)


CHANGED = {  # what a replay finds changed besides the random values: lengths, positions, pages
    "rotary": lambda args, kwargs: args[2].flip(0),
    "append_kv": lambda args, kwargs: args[4].flip(0).clone(),
    "rotary_append": lambda args, kwargs: args[5].flip(0).clone(),
    "attention": lambda args, kwargs: kwargs["kv_lengths"].new_tensor([3, 97]),
    "attention_varlen": lambda args, kwargs: args[3].new_tensor([0, 3, 203, 203, 204, 301]),
    "decode_attention": lambda args, kwargs: args[3].new_tensor([200, 3, 40]),
}


def replayed_sample(name, which):
    """The case with new values and the changes above, no NaN left where a length may now reach."""
    torch.manual_seed(1)
    args, kwargs = case(name, which).make(CUDA, torch.bfloat16)
    if name in CHANGED:
        new = CHANGED[name](args, kwargs)
        if name == "attention":
            kwargs["kv_lengths"] = new
        elif name == "attention_varlen":
            args = (*args[:3], new, new.clone(), *args[5:])
        else:
            place = {"rotary": 2, "append_kv": 4, "rotary_append": 5, "decode_attention": 3}[name]
            args = (*args[:place], new, *args[place + 1:])
    return mapped((args, kwargs), lambda t: t.nan_to_num(0.5) if t.dtype is torch.bfloat16 else t)


@pytest.mark.parametrize(("name", "which"), SAMPLES)
def test_replay_of_a_graph_sees_new_inputs(name, which):
    """Nothing of the captured call may be frozen in: not the values, not the lengths, not how the keys were split."""
    args, kwargs = static = mapped(case(name, which).make(CUDA, torch.bfloat16), torch.clone)
    call(name, args, kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(name, args, kwargs)
    for _ in range(2):
        sample = replayed_sample(name, which)
        expected = outcome(name, *mapped(sample, torch.clone))
        for target, source in zip(tensors(static), tensors(sample), strict=True):
            target.copy_(source)
        graph.replay()
        assert_equal(tensors(result) + tensors(static), expected)


def test_compiling_during_capture_is_refused():
    """Loading a kernel would break the capture with a driver error that names nobody. A new process: nothing is loaded yet."""
    program = textwrap.dedent("""
        import torch, ftops
        from tests.ops.calls import call, case
        from tests.ops.test_gpu_streams import SAMPLES
        torch.zeros(1, device="cuda")
        for name, which in SAMPLES:
            args, kwargs = case(name, which).make(torch.device("cuda"), torch.float16)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    call(name, args, kwargs)
            except RuntimeError as error:
                assert "ftops.warmup" in str(error), error
                print("refused", name)
            call(name, args, kwargs)
            torch.cuda.synchronize()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                call(name, args, kwargs)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"refused {name}" for name in OPS]


def test_ops_under_reduce_overhead(fresh_dynamo):
    """torch.compile's own CUDA graphs: three ops and what Inductor generates between them, replayed with new inputs."""
    (x, weight, eps), _ = case("rms_norm", "llama").make(CUDA, torch.bfloat16)
    linear = torch.randn(2 * 1024, x.shape[-1], device=CUDA, dtype=torch.bfloat16) / 64

    def block(x):
        hidden = torch.nn.functional.linear(ftops.ops.rms_norm(x, weight, eps), linear)
        return ftops.ops.bias_activation(ftops.ops.gated_activation(hidden, "silu") * 2, None, "gelu")

    with torch.inference_mode():
        compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            x = torch.randn_like(x)
            torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)
