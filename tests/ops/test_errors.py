"""A wrong call that is answered by a crash, a wrong number or a riddle instead of what to do."""
from __future__ import annotations

import ast
import traceback
from pathlib import Path

import pytest
import torch

import ftops
from ftops.ops import OPS, op_module
from tests.ops.calls import call

F32, F16, F64, I32, I64, I8 = torch.float32, torch.float16, torch.float64, torch.int32, torch.int64, torch.int8


def zeros(*shape, dtype=F32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def elsewhere(*shape, dtype=F32):
    return zeros(*shape, dtype=dtype, device="meta")


def elsewhere_fake():
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode():
        return torch.empty(4, device="vulkan")


X, W = (3, 8), (8,)
ROTARY = {"q": zeros(2, 5, 4, 16), "k": zeros(2, 5, 2, 16), "positions": zeros(2, 5, dtype=I64), "freqs": (zeros(9, 8), zeros(9, 8))}
APPEND = {"k": zeros(2, 3, 2, 16), "v": zeros(2, 3, 2, 16), "k_cache": zeros(2, 9, 2, 16), "v_cache": zeros(2, 9, 2, 16),
          "positions": zeros(2, 3, dtype=I32)}
ROTARY_APPEND = {"q": zeros(2, 3, 4, 16), **APPEND, "freqs": zeros(8)}
ATTENTION = {"q": zeros(2, 5, 4, 16), "k": zeros(2, 7, 2, 16), "v": zeros(2, 7, 2, 16)}
VARLEN = {"q": zeros(5, 4, 16), "k": zeros(7, 2, 16), "v": zeros(7, 2, 16), "cu_seqlens_q": torch.tensor([0, 5], dtype=I32),
          "cu_seqlens_kv": torch.tensor([0, 7], dtype=I32), "max_seqlen_q": 5, "max_seqlen_kv": 7}
DECODE = {"q": zeros(2, 1, 4, 16), "k_cache": zeros(2, 9, 2, 16), "v_cache": zeros(2, 9, 2, 16), "lengths": torch.tensor([1, 2], dtype=I32)}
E4M3 = torch.float8_e4m3fn
ATTENTION_FP8 = {"q": zeros(2, 5, 4, 16, dtype=E4M3), "k": zeros(2, 7, 2, 16, dtype=E4M3), "v": zeros(2, 7, 2, 16, dtype=E4M3),
                 "q_scale": zeros(4), "k_scale": zeros(2), "v_scale": zeros(2)}
GOOD = {
    "rms_norm": {"x": zeros(*X), "weight": zeros(*W), "eps": 1e-6},
    "layer_norm": {"x": zeros(*X), "weight": None, "bias": None, "eps": 1e-6},
    "gated_activation": {"x": zeros(*X), "kind": "silu"}, "bias_activation": {"x": zeros(*X), "bias": None, "kind": "gelu"},
    "linear": {"x": zeros(*X), "weight": zeros(5, 8)},
    "linear_w4a16": {"x": zeros(*X), "packed": zeros(1, 1, 32, 4, dtype=I32), "scales": zeros(1, 1, 8, 4), "shape": (5, 8)},
    "linear_w8a16": {"x": zeros(*X), "values": zeros(5, 8, dtype=I8), "scales": zeros(5)},
    "linear_w8a8": {"x": zeros(*X), "values": zeros(5, 8, dtype=I8), "scales": zeros(5)},
    "linear_fp8": {"x": zeros(*X), "values": zeros(5, 8, dtype=torch.float8_e4m3fn), "scales": zeros(5)},
    "rotary": ROTARY, "append_kv": APPEND, "rotary_append": ROTARY_APPEND, "attention": ATTENTION,
    "attention_varlen": VARLEN, "attention_fp8": ATTENTION_FP8, "decode_attention": DECODE,
    "sample": {"logits": zeros(2, 5)},
}
# What the good call leaves out and may be given.
OPTIONAL = {
    "rms_norm": {"residual": zeros(*X)}, "layer_norm": {"weight": zeros(*W), "bias": zeros(*W), "residual": zeros(*X)},
    "bias_activation": {"bias": zeros(*W)}, "linear": {"bias": zeros(5), "residual": zeros(3, 5), "norm": zeros(8)},
    "linear_w4a16": {"bias": zeros(5), "residual": zeros(3, 5), "norm": zeros(8)},
    "linear_w8a16": {"bias": zeros(5), "residual": zeros(3, 5), "norm": zeros(8)},
    "linear_fp8": {"bias": zeros(5), "residual": zeros(3, 5), "norm": zeros(8)},
    "linear_w8a8": {"bias": zeros(5), "residual": zeros(3, 5), "smooth": torch.ones(8), "norm": zeros(8)},
    "rotary": {"freqs": zeros(8)}, "rotary_append": {"q_norm": zeros(16), "k_norm": zeros(16)},
    "attention": {"bias": zeros(5, 7), "alibi_slopes": zeros(4)},
    "attention_varlen": {"alibi_slopes": zeros(4)}, "decode_attention": {"bias": zeros(9), "alibi_slopes": zeros(4)},
    "sample": {"temperature": zeros(2), "top_p": zeros(2) + 0.5, "min_p": zeros(2)},
}
FLOATING = [(name, argument, value) for name in OPS for argument, value in (GOOD[name] | OPTIONAL.get(name, {})).items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()]
INT8 = {"k_cache": zeros(2, 9, 2, 16, dtype=I8), "v_cache": zeros(2, 9, 2, 16, dtype=I8)}
POOL = {"k_cache": zeros(6, 4, 2, 16), "v_cache": zeros(6, 4, 2, 16)}

# op, what is changed in the good call above, and parts of the message: the argument, what it was, what is allowed.
WRONG = [
    ("rms_norm", {"x": zeros(*X, dtype=F64)}, ["x.dtype", "torch.float64", "float32, float16, bfloat16"]),
    ("rms_norm", {"weight": zeros(*W, dtype=F16)}, ["weight.dtype is torch.float16", "x.dtype is torch.float32", ".to(torch.float32)"]),
    ("rms_norm", {"weight": elsewhere(*W)}, ["weight is on meta", "x is on cpu", "move"]),
    ("rms_norm", {"x": elsewhere_fake(), "weight": None}, ["x.device", "vulkan", "cpu and cuda"]),
    ("rms_norm", {"x": zeros()}, ["x.dim()", "0", "1 or more"]),
    ("rms_norm", {"weight": zeros(7)}, ["weight.shape", "(7,)", "(8,)"]),
    ("rms_norm", {"weight": zeros(1, 8)}, ["weight.shape", "(1, 8)", "(8,)"]),
    ("rms_norm", {"residual": zeros(4, 8)}, ["residual.shape", "(4, 8)", "(3, 8)"]),
    ("layer_norm", {"x": zeros()}, ["x.dim()", "0", "1 or more"]),
    ("layer_norm", {"weight": zeros(7)}, ["weight.shape", "(7,)", "(8,)"]),
    ("layer_norm", {"bias": zeros(9)}, ["bias.shape", "(9,)", "(8,)"]),
    ("layer_norm", {"residual": zeros(8)}, ["residual.shape", "(8,)", "(3, 8)"]),
    ("gated_activation", {"kind": "swish"}, ["kind", "'swish'", "silu, gelu, gelu_tanh, relu, quick_gelu"]),
    ("gated_activation", {"x": zeros(3, 7)}, ["x.shape", "(3, 7)", "even"]),
    ("gated_activation", {"x": zeros()}, ["x.shape", "()", "even"]),
    ("bias_activation", {"kind": "swish"}, ["kind", "'swish'", "silu, gelu, gelu_tanh, relu, quick_gelu"]),
    ("bias_activation", {"x": zeros()}, ["x.dim()", "0", "1 or more"]),
    ("bias_activation", {"bias": zeros(7)}, ["bias.shape", "(7,)", "(8,)"]),
    ("linear", {"weight": zeros(8)}, ["weight.shape", "(8,)", "[N, K]"]),
    ("linear", {"x": zeros(3, 7)}, ["x.shape", "(3, 7)", "[..., 8]"]),
    ("linear", {"x": zeros()}, ["x.shape", "()", "[..., 8]"]),
    ("linear", {"bias": zeros(8)}, ["bias.shape", "(8,)", "(5,)"]),
    ("linear", {"activation": "swish"}, ["activation", "'swish'", "None, silu, gelu, gelu_tanh, relu, quick_gelu"]),
    ("linear", {"residual": zeros(5)}, ["residual.shape", "(5,)", "(3, 5)"]),
    ("linear", {"norm": zeros(5)}, ["norm.shape", "(5,)", "(8,)"]),
    ("linear_w8a8", {"norm": zeros(16)}, ["norm.shape", "(16,)", "(8,)"]),
    ("linear_w4a16", {"packed": zeros(1, 1, 32, 4)}, ["packed", "torch.float32 (1, 1, 32, 4)", "int32 [1, pieces, 32, 4]"]),
    ("linear_w4a16", {"shape": (33, 8)}, ["packed", "(1, 1, 32, 4)", "int32 [2, pieces, 32, 4]"]),
    ("linear_w4a16", {"shape": (5, 33)}, ["packed, scales", "(1, 1, 32, 4)", "groups of 32, 64 or 128", "K = 33"]),
    ("linear_w4a16", {"scales": zeros(1, 2, 8, 4)}, ["packed, scales", "(1, 2, 8, 4)", "groups of 32, 64 or 128"]),
    ("linear_w4a16", {"scales": zeros(1, 1, 8, 4, 3)}, ["scales", "(1, 1, 8, 4, 3)", "[1, groups, 8, 4, 2]"]),
    ("linear_w4a16", {"x": zeros(3, 7)}, ["x.shape", "(3, 7)", "[..., 8]"]),
    ("linear_w8a8", {"values": zeros(5, 8)}, ["values", "torch.float32 (5, 8)", "int8 [N, K]"]),
    ("linear_w8a8", {"scales": zeros(1)}, ["scales", "(1,)", "(5,)"]),
    ("linear_w8a8", {"smooth": zeros(8, dtype=F16)}, ["smooth", "torch.float16 (8,)", "float32 (8,)"]),
    ("linear", {"weight": zeros(5, 8), "activation": "swiglu"}, ["activation", "'swiglu'", "5 rows are not gate and up"]),
    ("linear_fp8", {"values": zeros(5, 8)}, ["values", "torch.float32 (5, 8)", "float8_e4m3fn [N, K]"]),
    ("linear_fp8", {"scales": zeros(5, dtype=F16)}, ["scales", "torch.float16 (5,)", "float32 (5,)"]),
    ("linear_w8a16", {"values": zeros(5, 8)}, ["values", "torch.float32 (5, 8)", "int8 [N, K]"]),
    ("linear_w8a16", {"values": zeros(5, 24, dtype=I8)}, ["x.shape", "(3, 8)", "[..., 24]"]),
    ("linear_w8a16", {"scales": zeros(5, dtype=F16)}, ["scales", "torch.float16 (5,)", "float32 (5,)"]),
    ("linear_w8a16", {"scales": zeros(1)}, ["scales", "(1,)", "(5,)"]),
    ("rotary", {"q": zeros(2, 5, 64)}, ["q.shape, k.shape", "(2, 5, 64)", "[B,S,H,D]"]),
    ("rotary", {"k": zeros(2, 6, 2, 16)}, ["k.shape", "(2, 6, 2, 16)", "[2, 5, Hkv, 16]"]),
    ("rotary", {"rotary_dim": 5}, ["rotary_dim", "5", "even, 0 to head_dim (16)"]),
    ("rotary", {"rotary_dim": 18}, ["rotary_dim", "18", "even, 0 to head_dim (16)"]),
    ("rotary", {"positions": zeros(2, 5, dtype=F32)}, ["positions", "float32", "int32 or int64 (2, 5)"]),
    ("rotary", {"positions": zeros(5, dtype=I64)}, ["positions", "(5,)", "int32 or int64 (2, 5)"]),
    ("rotary", {"positions": elsewhere(2, 5, dtype=I64)}, ["positions is on meta", "cpu"]),
    ("rotary", {"positions": None, "freqs": zeros(8)}, ["positions", "None", "positions[B,S]"]),
    ("rotary", {"freqs": zeros(16)}, ["freqs", "(16,)", "float32 (8,)"]),
    ("rotary", {"freqs": (zeros(9, 8), zeros(9, 7))}, ["freqs", "(9, 8)", "(9, 7)", "two alike"]),
    ("rotary", {"freqs": (zeros(9, 8, dtype=F16), zeros(9, 8, dtype=F16))}, ["freqs", "torch.float16", "float32 or torch.float32"]),
    ("rotary", {"freqs": (zeros(9, 6), zeros(9, 6))}, ["cos.shape", "(9, 6)", "[P, 8 or 16]"]),
    ("rotary", {"freqs": (zeros(2, 5, 8), zeros(2, 5, 8))}, ["cos.shape", "(2, 5, 8)", "[P, 8 or 16]"]),
    ("rotary", {"freqs": (zeros(), zeros())}, ["cos.shape", "()", "[P, 8 or 16]"]),
    ("rotary", {"positions": None}, ["cos.shape", "(9, 8)", "[2 or 1, 5, 8 or 16]"]),
    ("append_kv", {"v": zeros(2, 3, 1, 16)}, ["k.shape, v.shape", "(2, 3, 1, 16)", "two alike"]),
    ("append_kv", {"positions": zeros(2, 2, dtype=I32)}, ["positions", "(2, 2)", "int32 or int64 (2, 3)"]),
    ("append_kv", {"k_cache": zeros(9, 2, 16)}, ["k_cache, v_cache", "(9, 2, 16)", "4 dimensions"]),
    ("append_kv", {"k_cache": zeros(2, 9, 2, 8), "v_cache": zeros(2, 9, 2, 8)}, ["head_dim", "8", "16"]),
    ("append_kv", {"k_cache": zeros(2, 9, 3, 16), "v_cache": zeros(2, 9, 3, 16)}, ["k_cache's heads", "3", "divisor of 2"]),
    ("append_kv", {"k_cache": zeros(2, 9, 1, 16), "v_cache": zeros(2, 9, 1, 16)}, ["k_cache's heads", "1", "k's, 2"]),
    ("append_kv", {"k_cache": zeros(3, 9, 2, 16), "v_cache": zeros(3, 9, 2, 16)}, ["k_cache.shape[0]", "3", "batch size, 2", "page_table"]),
    ("append_kv", POOL | {"page_table": zeros(3, 2, dtype=I32)}, ["page_table", "(3, 2)", "int32 [2, n]"]),
    ("append_kv", POOL | {"page_table": zeros(2, 2, dtype=I64)}, ["page_table", "torch.int64", "int32 [2, n]"]),
    ("append_kv", {"k_scale": zeros(2)}, ["k_scale, v_scale", "given", "None", "8-bit"]),
    ("append_kv", {n: t.half() for n, t in APPEND.items() if "cache" in n}, ["k_cache.dtype", "float16", "torch.float32, torch.int8"]),
    ("append_kv", INT8, ["k_cache.dtype is torch.int8", "k_scale is None", "([2] float32)"]),
    ("append_kv", INT8 | {"k_scale": zeros(2)}, ["k_cache.dtype is torch.int8", "v_scale is None", "([2] float32)"]),
    ("append_kv", INT8 | {"k_scale": zeros(1), "v_scale": zeros(2)}, ["k_scale", "(1,)", "float32 (2,)"]),
    ("append_kv", INT8 | {"k_scale": zeros(2, 8, 2), "v_scale": zeros(2)}, ["k_scale", "(2, 8, 2)", "float32 (2,), or (2, 9, 2)"]),
    ("append_kv", INT8 | {"k_scale": zeros(2, 9, 2), "v_scale": zeros(2)}, ["k_scale.shape, v_scale.shape", "((2, 9, 2), (2,))", "alike"]),
    ("append_kv", INT8 | {"k_scale": zeros(2, 9, 2), "v_scale": zeros(2, 2, 9).mT}, ["v_scale.stride()", "(18, 1, 9)", "contiguous"]),
    ("rotary_append", {"q": zeros(2, 4, 4, 16)}, ["q.shape, k.shape, v.shape", "(2, 4, 4, 16)", "[B,T,H,D]"]),
    ("rotary_append", {"v": zeros(2, 3, 1, 16)}, ["q.shape, k.shape, v.shape", "(2, 3, 1, 16)", "[B,T,Hkv,D]"]),
    ("rotary_append", {"positions": zeros(2, 2, dtype=I32)}, ["positions", "(2, 2)", "int32 or int64 (2, 3)"]),
    ("rotary_append", {"q_norm": zeros(64)}, ["q_norm.shape", "(64,)", "(16,)"]),
    ("rotary_append", {"k_norm": zeros(16, dtype=F16)}, ["k_norm.dtype is torch.float16", "q.dtype is torch.float32"]),
    ("rotary_append", {"k_cache": zeros(2, 9, 1, 16), "v_cache": zeros(2, 9, 1, 16)}, ["k_cache's heads", "1", "k's, 2"]),
    ("rotary_append", {"freqs": zeros(7)}, ["freqs", "(7,)", "float32 (8,)"]),
    ("rotary_append", {"freqs": (zeros(1, 3, 8),) * 2, "rotary_positions": zeros(2, 3, dtype=I32)}, ["cos.shape", "[P, 8 or 16]"]),
    ("rotary_append", INT8, ["k_cache.dtype is torch.int8", "k_scale is None", "([2] float32)"]),
    ("attention", {"q": zeros(5, 4, 16)}, ["q.shape, k.shape", "(5, 4, 16)", "4 dimensions"]),
    ("attention", {"q": zeros(16), "k": zeros(16), "v": zeros(16)}, ["q.shape, k.shape", "(16,)", "4 dimensions"]),
    ("attention", {"v": zeros(2, 7, 1, 16)}, ["v.shape", "(2, 7, 1, 16)", "(2, 7, 2, 16)"]),
    ("attention", {"q": zeros(2, 5, 4, 8)}, ["k's head_dim", "16", "8"]),
    ("attention", {n: zeros(*t.shape[:3], 257) for n, t in ATTENTION.items()}, ["head_dim", "257", "1 to 256"]),
    ("attention", {"q": zeros(2, 5, 3, 16)}, ["q's heads", "3", "multiple of the 2"]),
    ("attention", {"q": zeros(3, 5, 4, 16)}, ["k.shape", "(2, 7, 2, 16)", "[3, Skv, Hkv, 16]"]),
    ("attention", {"window": (-2, 0)}, ["window", "(-2, 0)", "(left, right)"]),
    ("attention", {"window": 3}, ["window", "3", "(left, right)"]),
    ("attention", {"window": (1, 2, 3)}, ["window", "(1, 2, 3)", "(left, right)"]),
    ("attention", {"softcap": -1.0}, ["softcap", "-1.0", "0 (off) or more"]),
    ("attention", {"alibi_slopes": zeros(2)}, ["alibi_slopes", "(2,)", "float32 (4,)"]),
    ("attention", {"bias": zeros(5, 7, dtype=F16)}, ["bias.dtype", "float16", "torch.float32"]),
    ("attention", {"bias": zeros(5, 6)}, ["bias.shape", "(5, 6)", "(2, 4, 5, 7)"]),
    ("attention", {"bias": zeros(1, 1, 1, 5, 7)}, ["bias.shape", "(1, 1, 1, 5, 7)", "(2, 4, 5, 7)"]),
    ("attention", {"kv_lengths": zeros(2, dtype=I64)}, ["kv_lengths", "torch.int64", "int32 (2,)"]),
    ("attention", {"kv_lengths": elsewhere(2, dtype=I32)}, ["kv_lengths is on meta", "cpu"]),
    ("attention_varlen", {"q": zeros(1, 5, 4, 16)}, ["q.shape, k.shape", "(1, 5, 4, 16)", "3 dimensions"]),
    ("attention_varlen", {"cu_seqlens_q": torch.tensor([0, 5])}, ["cu_seqlens_q", "torch.int64", "int32 [B + 1]"]),
    ("attention_varlen", {"cu_seqlens_kv": zeros(0, dtype=I32)}, ["cu_seqlens_kv", "(0,)", "int32 [B + 1]"]),
    ("attention_varlen", {"cu_seqlens_kv": zeros(3, dtype=I32)}, ["cu_seqlens_kv.shape", "(3,)", "(2,)"]),
    ("attention_fp8", {"k": zeros(2, 7, 2, 16)}, ["k is torch.float32 of 4 dimensions", "float8_e4m3fn of 4"]),
    ("attention_fp8", {"v": zeros(2, 7, 1, 16, dtype=E4M3)}, ["v.shape", "(2, 7, 1, 16)", "k's, (2, 7, 2, 16)"]),
    ("attention_fp8", {"q": zeros(1, 5, 4, 16, dtype=E4M3)}, ["k.shape", "(2, 7, 2, 16)", "[1, Skv, Hkv, 16]"]),
    ("attention_fp8", {"q": zeros(2, 5, 3, 16, dtype=E4M3), "q_scale": zeros(3)}, ["q's heads", "3", "a multiple of the 2 kv heads"]),
    ("attention_fp8", {name: zeros(2, 5, 2, 257, dtype=E4M3) for name in "qkv"}, ["head_dim", "257", "1 to 256"]),
    ("attention_fp8", {"k_scale": zeros(4)}, ["k_scale", "(4,)", "float32 (2,)"]),
    ("attention_fp8", {"window": (-2, 0)}, ["window", "(-2, 0)", "-1"]),
    ("decode_attention", {"q": zeros(2, 17, 4, 16)}, ["q.shape", "(2, 17, 4, 16)", "T <= 16", "attention"]),
    ("decode_attention", {"q": zeros(2, 1, 4, 257)}, ["head_dim", "257", "1 to 256"]),
    ("decode_attention", {"lengths": torch.tensor([1, 2])}, ["lengths", "torch.int64", "int32 (2,)"]),
    ("decode_attention", {"window": -2}, ["window", "-2", "None"]),
    ("decode_attention", INT8, ["k_cache.dtype is torch.int8", "k_scale is None", "([2] float32)"]),
    ("decode_attention", {"fixed_split": 0}, ["fixed_split", "0", "None", "1 or more"]),
    ("decode_attention", {"bias": zeros(8)}, ["bias.shape", "(8,)", "(2, 4, 1, 9)"]),
    ("sample", {"logits": zeros(5)}, ["logits.shape", "(5,)", "[B,V]"]),
    ("sample", {"logits": zeros(2, 0)}, ["logits.shape", "(2, 0)", "V >= 1"]),
    ("sample", {"temperature": -0.5}, ["temperature", "-0.5", "0 to inf"]),
    ("sample", {"top_k": 0}, ["top_k", "0", "1 to inf"]),
    ("sample", {"top_p": 0.0}, ["top_p", "0.0", "above 0, up to 1"]),
    ("sample", {"min_p": 1.5}, ["min_p", "1.5", "0 to 1"]),
    ("sample", {"top_k": zeros(3, dtype=I64)}, ["top_k", "torch.int64 (3,)", "torch.int64 (2,)"]),
    ("sample", {"seed": zeros(2)}, ["seed", "torch.float32 (2,)", "torch.int64 (2,)"]),
    ("sample", {"offset": elsewhere(2, dtype=I64)}, ["offset is on meta", "cpu"]),
    ("sample", {"seed": [1, 2]}, ["seed", "a list", "a number, or a tensor of one a row"]),
    ("linear", {"weight": [[0.0] * 8] * 5}, ["weight", "a list", "a tensor"]),
    ("append_kv", {"positions": [[0, 1, 2]] * 2}, ["positions", "a list", "a tensor"]),
]


def refusal(name, changes):
    """The error that `changes` to the good call raise, and nothing that the caller passed is altered by it."""
    kwargs = GOOD[name] | changes
    passed = [t for t in kwargs.values() if isinstance(t, torch.Tensor) and t.is_cpu]
    before = [t.clone() for t in passed]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(name, (), kwargs)
    assert all(torch.equal(now, then) for now, then in zip(passed, before, strict=True))
    return caught.value


@pytest.mark.parametrize("name", OPS)
def test_the_good_call_is_good(name):
    """Otherwise the tests below would pass for the wrong reason."""
    call(name, (), GOOD[name])


@pytest.mark.parametrize(("name", "changes", "parts"), WRONG,
                         ids=[f"{name}-{'-'.join(changes)}-{i}" for i, (name, changes, _) in enumerate(WRONG)])
def test_message_says_what_was_wrong_and_what_is_allowed(name, changes, parts):
    error = refusal(name, changes)
    assert type(error) is ValueError
    assert str(error).startswith(f"{name}: ")
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize(("name", "argument", "value"), FLOATING, ids=[f"{name}-{argument}" for name, argument, _ in FLOATING])
def test_a_gradient_is_refused_and_not_lost(name, argument, value):
    """A model that trains through an op without a derivative would stop learning in silence."""
    value = value.clone().requires_grad_()
    error = refusal(name, {argument: value})
    assert type(error) is RuntimeError
    assert str(error).startswith(f"{name}: {'cos' if argument == 'freqs' else argument} requires grad")
    assert "torch.no_grad()" in str(error)
    with torch.no_grad():
        call(name, (), GOOD[name] | {argument: value})


@pytest.mark.parametrize("name", OPS)
def test_a_list_is_no_tensor(name):
    for argument, value in (GOOD[name] | OPTIONAL.get(name, {})).items():
        if isinstance(value, torch.Tensor):
            error = refusal(name, {argument: value.float().tolist()})
            assert str(error).startswith(f"{name}: {'cos' if argument == 'freqs' else argument} is a list; allowed: a")


def test_every_refusal_is_tested(monkeypatch):
    """Each raise in the public functions and their checks is reached by the calls above."""
    monkeypatch.setattr(ftops.op, "DEBUG", True)
    outside = POOL | {"page_table": zeros(2, 2, dtype=I32) + 6}
    root = Path(ftops.__file__).parent
    written = set()
    for path in (root / "op.py", *sorted((root / "ops").glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                written.add((path.name, node.lineno))
    reached = set()
    weight = zeros(*W).requires_grad_()
    for name, changes, _ in [*WRONG, ("rms_norm", {"weight": weight}, []), ("attention", {"alibi_slopes": zeros(4).requires_grad_()}, []),
                             ("append_kv", outside, [])]:
        last = traceback.extract_tb(refusal(name, changes).__traceback__)[-1]
        reached.add((Path(last.filename).name, last.lineno))
    assert written - reached == set()


@pytest.mark.parametrize("name", OPS)
def test_case_names_are_unique(name):
    """Benchmarks and results are filed under them."""
    names = [str(case) for case in op_module(name).cases()]
    assert len(set(names)) == len(names)
