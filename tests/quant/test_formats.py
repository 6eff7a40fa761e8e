"""A weight that comes back wrong: what each format loses, stores and cuts."""
from __future__ import annotations

import pytest
import torch

from ftops.packing import pack_4bit, unpack_4bit
from ftops.quant import FORMATS, fp8, int4, w8a8
from tests.accuracy import assert_accurate
from tests.ops.calls import DTYPE_IDS

BITS = {"int4": 4.125, "int8": 8 + 32 / 4096, "fp8": 8 + 32 / 4096, "w8a8": 8 + 32 / 4096}


def weight(N=96, K=512, dtype=torch.float32):
    return (torch.randn(N, K) * torch.rand(N, 1)).to(dtype)


def half_a_step(name, weight):
    """How far the nearest value of the format may be, and two roundings of the scale and of the result."""
    wide = weight.double()
    rows = wide.abs().amax(-1, keepdim=True)
    if name == "int4":
        rows = wide.view(len(wide), -1, 128).abs().amax(-1).repeat_interleave(128, 1)
    step = {"int4": rows / 7.5, "int8": rows / 127, "w8a8": rows / 127, "fp8": torch.maximum(wide.abs() / 8, rows / 448 / 2 ** 9)}[name]
    return step / 2 + 2 * torch.finfo(weight.dtype).eps * rows


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("name", FORMATS)
def test_no_value_moves_by_more_than_half_a_step(name, dtype):
    w = weight(dtype=dtype)
    back = FORMATS[name].dequantize(FORMATS[name].quantize(w))
    assert back.dtype is dtype
    assert ((back.double() - w.double()).abs() <= half_a_step(name, w)).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_with_zero_points_follows_a_range_that_is_not_centred(group_size):
    """Without them a group of 1 .. 2 would keep four of its sixteen levels."""
    w = torch.rand(40, 384) + 1
    qw = int4.quantize(w, group_size, zero_points=True)
    assert ((int4.dequantize(qw) - w).abs() <= 2 / 15 / 2 + 1e-6).all()
    negative = int4.dequantize(int4.quantize(-w, group_size, zero_points=True))
    assert ((negative + w).abs() <= 2 / 15 / 2 + 1e-6).all()


def test_smaller_groups_lose_less():
    w = weight() * torch.randn(512).exp()
    errors = [(int4.dequantize(int4.quantize(w, size)) - w).square().mean() for size in (128, 64, 32)]
    assert errors[0] > errors[1] > errors[2]


def test_smoothing_moves_outliers_of_x_into_the_weight():
    """A few columns of x a hundred times the others: rounded a row at a time, x keeps nothing of the others; smoothed it does."""
    w, x = torch.randn(64, 512), torch.randn(100, 512)
    x[:, ::64] *= 100
    exact = x @ w.T

    def loss(qw, x):
        smooth = qw.tensors.get("smooth")
        x = x if smooth is None else x / smooth
        scale = x.abs().amax(-1, keepdim=True) / 127
        values = (x / scale).round() * scale
        return (values @ (qw.tensors["values"] * qw.tensors["scales"][:, None]).T - exact).square().mean()
    smooth = w8a8.smoothing(x.abs().amax(0), w)
    assert loss(w8a8.quantize(w, smooth=smooth), x) < loss(w8a8.quantize(w), x) / 4
    torch.testing.assert_close(w8a8.linear(x[:3], w8a8.quantize(w, smooth=smooth)), exact[:3], atol=5.0, rtol=0.1)
    assert ((w8a8.dequantize(w8a8.quantize(w, smooth=smooth)) - w).abs() <= (w * smooth).abs().amax(-1, keepdim=True) / 253 / smooth).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_a_smoothed_weight(dim):
    w = weight(64, 256)
    qw = w8a8.quantize(w, smooth=torch.rand(256) + 0.5)
    parts = [w8a8.shard(qw, dim, index, 2) for index in range(2)]
    assert torch.equal(torch.cat([w8a8.dequantize(part) for part in parts], dim), w8a8.dequantize(qw))


def test_fp8_with_one_scale_for_all():
    w = weight()
    qw = fp8.quantize(w, per_tensor=True)
    assert (qw.tensors["scales"] == w.abs().max() / 448).all()
    assert ((fp8.dequantize(qw) - w).abs() <= torch.maximum(w.abs() / 16, w.abs().max() / 448 / 2 ** 10) * 1.0001).all()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_on_the_grid_comes_back_bit_for_bit(name):
    once = FORMATS[name].dequantize(FORMATS[name].quantize(weight(dtype=torch.bfloat16)))
    if name != "int4":
        assert torch.equal(FORMATS[name].dequantize(FORMATS[name].quantize(once)), once)
    assert once.isfinite().all()


@pytest.mark.parametrize("zeros", [False, True])
def test_int4_of_given_values_is_those_values(zeros):
    """A checkpoint quantised elsewhere must not be quantised again."""
    q, scales = torch.randint(16, (70, 200), dtype=torch.uint8), (torch.rand(70, 4) + 0.1).half()
    zero = torch.randint(16, (70, 4), dtype=torch.uint8) if zeros else None
    back = int4.dequantize(int4.from_values(q, scales, zero, 64))
    offset = 8 if zero is None else zero.repeat_interleave(64, 1)[:, :200].float()
    assert torch.equal(back, ((q.float() - offset) * scales.repeat_interleave(64, 1)[:, :200].float()).half())


@pytest.mark.parametrize("name", FORMATS)
def test_all_zero_rows_stay_zero(name):
    w = weight(dtype=torch.float16)
    w[3:40] = 0
    w[50, 128:] = 0
    back = FORMATS[name].dequantize(FORMATS[name].quantize(w))
    assert not back[3:40].any() and not back[50, 128:].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (31, 160), (64, 4096)])
def test_sizes_that_are_no_multiple_of_a_tile_or_group(name, shape):
    w = weight(*shape)
    qw = FORMATS[name].quantize(w)
    assert (qw.format, qw.shape, qw.dtype) == (name, shape, torch.float32)
    assert FORMATS[name].dequantize(qw).shape == shape
    x = torch.randn(2, shape[1])
    torch.testing.assert_close(FORMATS[name].linear(x, qw), x @ FORMATS[name].dequantize(qw).T)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_a_weight(name):
    """What makes decoding fast: the bytes that are read."""
    qw = FORMATS[name].quantize(weight(256, 4096, torch.bfloat16))
    assert 8 * qw.nbytes / (256 * 4096) <= BITS[name]
    # A view would hold memory that is counted nowhere, also after q, k and v have become slices of one weight.
    assert not any(tensor._is_view() for tensor in qw.tensors.values())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_linear_is_the_dequantised_linear(name, dtype):
    w = weight(dtype=dtype) / 20
    qw = FORMATS[name].quantize(w)
    x, bias, residual = torch.randn(3, 5, 512).to(dtype), torch.randn(96).to(dtype), torch.randn(3, 5, 96).to(dtype)
    ours = FORMATS[name].linear(x, qw, bias, activation="silu", residual=residual)
    dense = FORMATS[name].dequantize(FORMATS[name].quantize(w))

    def formula(x, dense, bias, residual):
        return torch.nn.functional.silu(x @ dense.T + bias) + residual
    assert_accurate(ours, formula(*(t.double() for t in (x, dense, bias, residual))), formula(x, dense, bias, residual))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_the_parts_of_the_whole(name, dim):
    """Tensor parallelism: each rank's cut, dequantised, is its part of the weight."""
    qw = FORMATS[name].quantize(weight(128, 1024))
    parts = [FORMATS[name].shard(qw, dim, index, 4) for index in range(4)]
    assert torch.equal(torch.cat([FORMATS[name].dequantize(part) for part in parts], dim), FORMATS[name].dequantize(qw))
    assert all(part.shape == ((32, 1024), (128, 256))[dim] for part in parts)
    assert all(tensor.is_contiguous() for part in parts for tensor in part.tensors.values())


def test_layout_is_written_down():
    """Files outlive code: the place of a value is part of the format."""
    q = torch.zeros(64, 128, dtype=torch.uint8)
    q[32 + 16 + 8 + 5, 96 + 24 + 4 + 2 + 1] = 9  # tile 1, i 1, h 1, g 5; piece 3, t 3, s 1, c 1, e 1
    words = pack_4bit(q, 32)
    assert words[1, 3, 4 * 5 + 3, 2 * 1 + 1].item() & 0xFFFFFFFF == 9 << (4 * (2 * 1 + 1) + 16)
    assert words.count_nonzero() == 1


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (70, 200), (96, 1000)])
def test_unpacking_undoes_packing(shape):
    q = torch.randint(16, shape, dtype=torch.uint8)
    assert torch.equal(unpack_4bit(pack_4bit(q, 128), *shape), q)


WRONG = [
    ("int4", lambda f: f.quantize(weight(), 48), ["int4: group_size is 48", "32, 64 or 128"]),
    ("int8", lambda f: f.quantize(weight(), 128), ["int8: group_size is 128", "None"]),
    ("int4", lambda f: f.quantize(torch.zeros(3)), ["int4: weight.shape is (3,)", "[N, K]"]),
    ("int8", lambda f: f.quantize(torch.zeros(0, 4)), ["int8: weight.shape is (0, 4)", "neither 0"]),
    ("int8", lambda f: f.quantize(torch.zeros(4, 4).int()), ["int8: weight.dtype is torch.int32", "bfloat16"]),
    ("int4", lambda f: f.quantize(torch.full((4, 4), float("nan"))), ["int4: weight is not finite", "finite values"]),
    ("int4", lambda f: f.dequantize(FORMATS["int8"].quantize(weight())), ["int4: qw.format is 'int8'", "FORMATS"]),
    ("int8", lambda f: f.linear(torch.zeros(2, 512), FORMATS["int4"].quantize(weight())), ["int8: qw.format is 'int4'"]),
    ("fp8", lambda f: f.quantize(weight(), 128), ["fp8: group_size is 128", "None"]),
    ("w8a8", lambda f: f.quantize(weight(), 128), ["w8a8: group_size is 128", "None"]),
    ("w8a8", lambda f: f.quantize(weight(), smooth=torch.zeros(512)), ["w8a8: smooth is (512,), positive: False", "positive (512,)"]),
    ("w8a8", lambda f: f.smoothing(torch.ones(3), weight()), ["w8a8: largest.shape is (3,)", "(512,)"]),
    ("int4", lambda f: f.shard(f.quantize(weight()), 1, 0, 8), ["int4: shape is (96, 512)", "multiple of 128", "512 / 8"]),
    ("int4", lambda f: f.shard(f.quantize(weight()), 0, 0, 2), ["int4: shape is (96, 512)", "multiple of 32", "96 / 2"]),
    ("int8", lambda f: f.shard(f.quantize(weight()), 1, 0, 3), ["int8: shape is (96, 512)", "multiple of 16", "512 / 3"]),
    ("int8", lambda f: f.shard(f.quantize(weight()), 2, 0, 2), ["int8: dim is 2", "0 (rows, N)"]),
    ("int8", lambda f: f.shard(f.quantize(weight()), 0, 3, 3), ["int8: index is 3", "0 to 2"]),
]


@pytest.mark.parametrize(("name", "call", "parts"), WRONG, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(WRONG)])
def test_a_wrong_call_is_told_what_is_wrong(name, call, parts):
    with pytest.raises(ValueError) as caught:
        call(FORMATS[name])
    for part in parts:
        assert part in str(caught.value)
