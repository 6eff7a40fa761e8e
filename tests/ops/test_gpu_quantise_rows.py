"""Rows of activations that are rounded to other numbers than they stand for, or read more often than once."""
from __future__ import annotations

import pytest
import torch

from ftops import ops
from tests.families.test_launches import launches
from tests.ops.test_gpu import CUDA, HALVES, poisoned

pytestmark = pytest.mark.gpu
NARROW = {"argvalues": ((torch.int8, 127), (torch.float8_e4m3fn, 448)), "ids": ("int8", "e4m3")}


@pytest.mark.parametrize("dtype", **HALVES)
@pytest.mark.parametrize(("narrow", "largest"), **NARROW)
@pytest.mark.parametrize(("rows", "K"), [(1, 8), (3, 111), (70, 4096), (5, 4104), (9, 14336), (2, 16392), (3, 40000)])
@pytest.mark.parametrize("given", ["", "norm", "smooth", "norm smooth"])
def test_each_value_is_the_nearest(given, rows, K, narrow, largest, dtype):
    """Of rows that lie apart, that registers hold and that they do not."""
    from ftops.numba_kernels.quantise_rows import launch
    x = torch.full((rows, K + 24), float("nan"), device=CUDA, dtype=dtype)[:, 8:K + 8]
    x.copy_(torch.randn(rows, K, device=CUDA) * 3)
    norm, smooth = (make() if name in given else None for name, make in {
        "norm": lambda: torch.randn(K, device=CUDA, dtype=dtype), "smooth": lambda: torch.rand(K + 1, device=CUDA)[1:] + 0.5}.items())
    with poisoned():
        values, scales = launch(x, narrow, smooth, norm, 1e-3)
    exact = x.double()
    if norm is not None:
        exact = exact / (exact.square().mean(1, keepdim=True) + 1e-3).sqrt() * norm.double()
    if smooth is not None:
        exact = exact / smooth.double()
    torch.testing.assert_close(scales.double(), exact.abs().amax(1) / largest, rtol=1e-6, atol=0)
    exact = exact / scales.double().unsqueeze(1)
    nearest = exact.round() if narrow is torch.int8 else exact.float().to(narrow).double()
    assert ((values[:, :K].double() - exact).abs() <= (nearest - exact).abs() + 1e-5 * exact.abs()).all()
    assert not values[:, K:].float().any() and values.shape == (rows, -(-K // 16) * 16)


@pytest.mark.parametrize(("narrow", "largest"), **NARROW)
def test_what_is_no_number_stays_so_in_its_row_and_zeros_are_zeros(narrow, largest):
    from ftops.numba_kernels.quantise_rows import launch
    x = torch.randn(70, 5000, device=CUDA, dtype=torch.bfloat16)
    x[3, 4321], x[5] = float("nan"), 0
    for norm in (None, torch.ones(5000, device=CUDA, dtype=torch.bfloat16)):
        values, scales = launch(x, narrow, None, norm, 1e-6)
        assert scales.isnan().nonzero().flatten().tolist() == [3]
        assert not (values[5].float() * scales[5]).any()


@pytest.mark.parametrize("name", ["linear_fp8", "linear_w8a8"])
@torch.inference_mode()
def test_a_norm_is_in_the_pass_that_rounds(name):
    """And it reads what the kernel before has just written to x."""
    if name == "linear_fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("x is not rounded")
    kind = torch.float8_e4m3fn if name == "linear_fp8" else torch.int8
    x, norm = torch.randn(300, 1024, device=CUDA, dtype=torch.bfloat16), torch.rand(1024, device=CUDA, dtype=torch.bfloat16)
    weight, scales = (torch.randn(512, 1024, device=CUDA) * 40).to(kind), torch.rand(512, device=CUDA) / 1000
    apart = getattr(ops, name)(ops.rms_norm(x, norm, 1e-6), weight, scales)
    within = getattr(ops, name)(x, weight, scales, norm=norm)
    assert (within - apart).float().norm() < 0.03 * apart.float().norm()  # roundings that fall to the other side
    seen: dict[bool, list[str]] = {True: [], False: []}
    for normed, names in seen.items():
        with launches(names):
            getattr(ops, name)(x, weight, scales, norm=norm if normed else None)
    assert len(seen[True]) == len(seen[False]), seen
    used = torch.full_like(x, float("nan"))
    for _ in range(20):
        used.fill_(float("nan"))
        used.copy_(x)
        assert torch.equal(getattr(ops, name)(used, weight, scales, norm=norm), within)
