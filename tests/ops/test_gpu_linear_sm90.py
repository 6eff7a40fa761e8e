"""The linear for many rows on Hopper, each tile and each number of blocks that share a k, whatever the op would take."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ftops import ops
from ftops.ops.bias_activation import ACTIVATIONS
from ftops.ops.gated_activation import GLU
from ftops.packing import dequantise_4bit, pack_4bit, pack_groups
from tests.accuracy import assert_accurate, in_float64
from tests.ops.calls import CASES_AND_DTYPES
from tests.ops.test_gpu import CUDA, HALVES, assert_case, poisoned

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="a kernel of sm_90a")]
EIGHT_BITS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
TILES = [(kind, columns) for kind, numbers in {
    "16-bit": (64, 128, 256), "int8": (64, 256), "e4m3": (64,), "int4": (64, 256), "int8_int8": (128, 256), "e4m3_e4m3": (128, 256)}.items()
    for columns in numbers]
# rows, N, K and what follows the product
SIZES = {
    "row": (1, 128, 64, {}),
    "few": (17, 200, 1000, {"bias": True}),
    "odd": (65, 131, 520, {"bias": True, "activation": "gelu", "residual": True}),
    "pairs": (33, 130, 264, {"residual": True}),
    "rows_end": (257, 132, 4096, {"bias": True, "activation": "silu", "residual": True}),
    "one_step": (300, 1, 8, {"bias": True, "activation": "relu"}),
    "llama": (2048, 6144, 4096, {"residual": True}),
    "long": (129, 640, 14336, {"activation": "gelu_tanh"}),
    "many_tiles": (8192, 1288, 256, {"bias": True}),
}
# W is gate and up.
GATED = {
    "gated_few": (17, 32, 264, {"activation": "swiglu"}),
    "gated_odd": (131, 208, 1000, {"bias": True, "activation": "geglu", "residual": True}),
    "gated_stride": (65, 48, 520, {"activation": "reglu", "residual": True}),
    "gated_llama": (2048, 3584, 4096, {"activation": "swiglu"}),
}


def poison(rows: int, columns: int, stride: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values, with NaN between the rows."""
    whole = torch.full((rows, stride), float("nan"), device=CUDA, dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns, device=CUDA) * scale
    return whole[:, :columns]


def sample(kind: str, dtype: torch.dtype, rows: int, N: int, K: int, options: dict, group_size: int = 128,
           zeros: bool = True) -> SimpleNamespace:
    """x, and its scales where it has eight bits; weight as it is stored, its scales; bias, residual, activation; exact: x and weight in
    float64."""
    s = SimpleNamespace(dtype=dtype, x=poison(rows, K, -(-K // 8) * 8 + 16, dtype), x_scales=None, scales=None, bias=None, residual=None,
                        activation=options.get("activation"))
    of_weight, _, of_x = kind.partition("_")
    if of_x:
        largest = 127 if of_x == "int8" else 448
        s.x_scales = s.x.float().abs().amax(1) / largest
        x = torch.nn.functional.pad(s.x.float() / s.x_scales.unsqueeze(1), (0, -K % 16))
        s.x = (x.round() if of_x == "int8" else x).to(EIGHT_BITS[of_x])
        exact_x = s.x[:, :K].double() * s.x_scales.double().unsqueeze(1)
    else:
        exact_x = s.x.double()
    if kind == "16-bit":
        s.weight = poison(N, K, -(-K // 8) * 8 + 8, dtype, K ** -0.5)
        exact = s.weight.double()
    elif kind == "int4":
        values = torch.randint(16, (N, K), dtype=torch.uint8, device=CUDA)
        per_group = (torch.rand(N, -(-K // group_size), device=CUDA) + 0.5) / (8 * K ** 0.5)
        if zeros:
            per_group = torch.stack((per_group, torch.randint(16, per_group.shape, device=CUDA)), -1)
        s.weight, s.scales = pack_4bit(values, group_size), pack_groups(per_group).to(dtype)
        exact = dequantise_4bit(s.weight, s.scales, N, K, torch.float64)
    else:
        values = torch.nn.functional.pad(torch.randn(N, K, device=CUDA) * 60, (0, -K % 16)).clamp(-128, 127)
        s.weight, s.scales = values.to(EIGHT_BITS[of_weight]), (torch.rand(N, device=CUDA) + 0.5) / (60 * K ** 0.5)
        exact = s.weight[:, :K].double() * s.scales.double().unsqueeze(1)
    s.exact, of_out = (exact_x, exact), N // 2 if s.activation in GLU else N
    if options.get("bias"):
        s.bias = torch.randn(N, device=CUDA, dtype=dtype)
    if options.get("residual"):
        s.residual = poison(rows, of_out, of_out + 5 * (N % 2) + 8, dtype)
    return s


def run(s: SimpleNamespace, picked: tuple | None) -> torch.Tensor:
    from ftops.numba_kernels.linear_sm90_launch import launch, launch_narrow, launch_w4a16
    gated = s.activation in GLU
    after = s.bias, GLU.get(s.activation, s.activation), s.residual
    with poisoned():
        if s.weight.dtype is torch.int32:
            return launch_w4a16(s.x, s.weight, s.scales, s.exact[1].shape[0], *after, picked)
        if s.x_scales is not None:
            return launch_narrow(s.x, s.x_scales, s.dtype, s.weight, s.scales, *after, gated, picked)
        return launch(s.x, s.weight, s.scales, *after, gated, picked)


def check(ours: torch.Tensor, s: SimpleNamespace) -> None:
    def formula(x, weight, bias, residual):
        y = torch.nn.functional.linear(x, weight, bias)
        if s.activation in GLU:
            gate, up = y.chunk(2, -1)
            y = ACTIVATIONS[GLU[s.activation]](gate) * up
        elif s.activation:
            y = ACTIVATIONS[s.activation](y)
        return y if residual is None else y + residual

    x, weight = s.exact
    exact = formula(x, weight, *in_float64((s.bias, s.residual)))
    assert_accurate(ours, exact, formula(x.to(s.dtype), weight.to(s.dtype), s.bias, s.residual))
    assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize(("kind", "columns"), TILES)
@pytest.mark.parametrize("size", SIZES)
def test_every_tile(size, kind, columns, dtype):
    from ftops.numba_kernels.linear_sm90_config import Config, Plan
    rows, N, K, options = SIZES[size]
    sampled = sample(kind, dtype, rows, N, K, options)
    check(run(sampled, Plan(Config(kind, str(dtype)[6:], columns), 1)), sampled)


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize(("kind", "columns"), [tile for tile in TILES if tile[0] != "int4"])
@pytest.mark.parametrize(("size", "splits"), [(size, splits) for size in GATED for splits in ((1,) if size == "gated_llama" else (1, 8))])
def test_gate_and_up_meet(size, splits, kind, columns, dtype):
    from ftops.numba_kernels.linear_sm90_config import Config, Plan
    rows, N, K, options = GATED[size]
    sampled = sample(kind, dtype, rows, N, K, options)
    check(run(sampled, Plan(Config(kind, str(dtype)[6:], columns), splits)), sampled)


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("K", [4096, 16384])
@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
def test_sums_of_e4m3_are_of_float32(positive, K, columns):
    """The tensor cores' own sums are off by a thousandth of the result here, and cut off: of positive products by a fifteenth of 4096, a
    fifth of 16384. PyTorch's, with the same rounding of operands, are not."""
    from ftops.numba_kernels.linear_sm90_config import Config, Plan
    sampled = sample("e4m3_e4m3", torch.float16, 256, 256, K, {})
    if positive:
        sampled.x, sampled.weight = (t.float().abs().to(t.dtype) for t in (sampled.x, sampled.weight))
        sampled.exact = tuple(t.abs() for t in sampled.exact)
    x, weight = sampled.exact
    exact = x @ weight.T
    ours = (run(sampled, Plan(Config("e4m3_e4m3", "float16", columns), 1)).double() - exact).norm() / exact.norm()
    assert ours < 2 ** (-10 if positive else -11)  # what rounding the result to float16 may cost, and twice that


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize(("kind", "columns"), TILES)
@pytest.mark.parametrize("size", ["one_step", "odd", "rows_end", "long"])
def test_blocks_that_share_a_k(size, kind, columns, splits):
    from ftops.numba_kernels.linear_sm90_config import Config, Plan
    rows, N, K, options = SIZES[size]
    sampled = sample(kind, torch.bfloat16, rows, N, K, options)
    check(run(sampled, Plan(Config(kind, "bfloat16", columns), splits)), sampled)


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [64, 256])
def test_groups_of_int4(columns, group_size, zeros, dtype):
    from ftops.numba_kernels.linear_sm90_config import Config, Plan
    for K, splits in ((2048, 1), (1000, 1), (1000, 2), (20, 1)):
        sampled = sample("int4", dtype, 70, 200, K, {"bias": True}, group_size, zeros)
        check(run(sampled, Plan(Config("int4", str(dtype)[6:], columns), splits)), sampled)


@pytest.mark.parametrize("kind", ["16-bit", "int8", "e4m3", "int4", "int8_int8", "e4m3_e4m3"])
@pytest.mark.parametrize("rows", [17, 64, 300, 1024])
def test_what_is_picked(rows, kind):
    for N, K in ((6144, 4096), (4096, 14336), (1280, 8192)):
        sampled = sample(kind, torch.bfloat16, rows, N, K, {"residual": True})
        check(run(sampled, None), sampled)


@pytest.mark.parametrize(("kind", "columns"), TILES)
@pytest.mark.parametrize(("splits", "size"), [(1, (300, 700, 2048)), (4, (300, 700, 2048)), (1, (8192, 1288, 128))])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_the_same_bits_each_time(residual, splits, size, kind, columns):
    """Where blocks and warps might race, or the store of a tile with the sums of the next."""
    from ftops.numba_kernels.linear_sm90_config import Config, Plan
    sampled = sample(kind, torch.bfloat16, *size, {"bias": True, "residual": residual})
    picked = Plan(Config(kind, "bfloat16", columns), splits)
    first = run(sampled, picked)
    check(first, sampled)
    for _ in range(250):
        assert torch.equal(run(sampled, picked), first)


def test_after_a_kernel_that_writes_its_inputs_and_in_a_graph():
    """The launch may begin before the kernel before it has ended: nothing may be read until then."""
    from ftops.numba_kernels.linear_sm90_config import Config, Plan
    picked = Plan(Config("16-bit", "bfloat16", 64), 2)
    given, used = (sample("16-bit", torch.bfloat16, 40, 256, 4096, {"bias": True, "residual": True}) for _ in range(2))
    expected = run(given, picked)

    names = "x", "weight", "bias", "residual"

    def refresh() -> torch.Tensor:
        for name in names:
            getattr(used, name).copy_(getattr(given, name))
        return run(used, picked)

    assert torch.equal(refresh(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = refresh()
    for _ in range(20):
        for name in names:
            getattr(used, name).fill_(float("nan"))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


# Of weights, and of x where it is rounded, by op.
KIND = {"linear": "16-bit", "linear_w8a16": "int8", "linear_fp8": "e4m3_e4m3", "linear_w4a16": "int4", "linear_w8a8": "int8_int8"}


@pytest.mark.parametrize(("name", "case", "dtype"), [p for p in CASES_AND_DTYPES if p.values[0] in KIND and "many" in p.values[1].name
                                                     and p.values[2] is not torch.float32])
def test_the_ops_take_it(name, case, dtype, monkeypatch):
    from ftops.numba_kernels import linear_sm90_launch, tuned
    taken, start = [], linear_sm90_launch._start
    monkeypatch.setattr(linear_sm90_launch, "FROM_ROWS", dict.fromkeys(linear_sm90_launch.FROM_ROWS, 1))
    monkeypatch.setattr(linear_sm90_launch, "worthwhile", lambda *problem: True)
    monkeypatch.setattr(linear_sm90_launch, "_start", lambda weight, *rest: taken.append(weight[0]) or start(weight, *rest))
    monkeypatch.setattr(tuned, "UNTUNED", {0})
    caches = linear_sm90_launch._takes, linear_sm90_launch.left_to_others
    try:
        for cache in caches:
            cache.cache_clear()
        assert_case(name, *case.make(CUDA, dtype))
    finally:
        for cache in caches:
            cache.cache_clear()
    assert taken == [KIND[name]]


@pytest.mark.parametrize(("name", "rows", "kind"), [
    ("linear_w8a16", 17, "int8"), ("linear_w8a16", 16, None), ("linear_fp8", 64, "e4m3"), ("linear_w8a8", 65, "int8_int8"),
    ("linear_w8a8", 64, "int8"), ("linear_fp8", 2048, "e4m3_e4m3"), ("linear", 300, None)])
def test_where_nothing_was_measured(name, rows, kind, monkeypatch):
    """What is taken on this GPU without `ftops tune`."""
    from ftops.numba_kernels import linear_sm90_launch, tuned
    taken, start = [], linear_sm90_launch._start
    monkeypatch.setattr(linear_sm90_launch, "_start", lambda weight, *rest: taken.append(weight[0]) or start(weight, *rest))
    monkeypatch.setattr(tuned, "_winners", lambda device: {})
    x, weight = torch.randn(rows, 512, device=CUDA, dtype=torch.bfloat16), torch.randn(256, 512, device=CUDA, dtype=torch.bfloat16)
    scales = torch.ones(256, device=CUDA)
    other = {"linear_fp8": torch.float8_e4m3fn}.get(name, torch.int8)
    getattr(ops, name)(x, weight) if name == "linear" else getattr(ops, name)(x, weight.to(other), scales)
    assert taken == ([kind] if kind else [])
