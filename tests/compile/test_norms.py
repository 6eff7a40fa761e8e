"""Norms in a compiled program: as models write them they become one op, and what only looks like a norm does not."""
from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests.accuracy import assert_accurate
from tests.compile.rewritten import Rewritten

N = 96
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


class Functional(nn.Module):
    """F.layer_norm or F.rms_norm with the given parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], parameters: str = "weight", **options: float) -> None:
        super().__init__()
        self.function, self.options = function, options
        for name in parameters.split():
            self.register_parameter(name, nn.Parameter(torch.empty(N)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, (N,), *self.parameters(), **self.options)


class Square(nn.Module):
    """An RMS norm in other words: torch.square, functions instead of methods, and products the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(1e-5 + torch.mean(torch.square(wide), dim=-1, keepdim=True))
        return (self.weight * torch.mul(inverse, wide)).type_as(x)


NORMS = {
    "llama": (lambda: LlamaRMSNorm(N, eps=1e-5), "rms_norm"),
    "t5": (lambda: T5LayerNorm(N, eps=1e-6), "rms_norm"),
    "gemma": (lambda: GemmaRMSNorm(N, eps=1e-6), "rms_norm"),
    "other_words": (Square, "rms_norm"),
    "torch_rms_norm": (lambda: nn.RMSNorm(N, eps=1e-5), "rms_norm"),
    "functional_rms_norm": (lambda: Functional(F.rms_norm, eps=1e-5), "rms_norm"),
    "layer_norm": (lambda: nn.LayerNorm(N), "layer_norm"),
    "layer_norm_without_bias": (lambda: nn.LayerNorm(N, eps=1e-6, bias=False), "layer_norm"),
    "layer_norm_without_weight": (lambda: nn.LayerNorm(N, elementwise_affine=False), "layer_norm"),
    "functional_layer_norm": (lambda: Functional(torch.layer_norm, "weight bias"), "layer_norm"),
}


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype)


def check(module: nn.Module, *args: torch.Tensor, dynamic: bool | None = None) -> Rewritten:
    rewritten = Rewritten(module, dynamic=dynamic)
    with torch.no_grad():
        assert_accurate(rewritten(*args), copy.deepcopy(module).double()(*[t.double() for t in args]), module(*args))
    assert not rewritten.found[0].kept
    return rewritten


def x(dtype: torch.dtype = torch.float32, rows: int = 5) -> torch.Tensor:
    return torch.randn(2, rows, N).to(dtype)


@DTYPES
@pytest.mark.parametrize("name", NORMS)
def test_swapped(name, dtype):
    make, op = NORMS[name]
    rewritten = check(made(make, dtype), x(dtype))
    assert rewritten.found[0].replaced == {op: 1}
    assert not [node for node in rewritten.graphs[0].graph.nodes if node.target in ("pow", "mean", torch.rsqrt, torch.square, F.layer_norm)]


class Residual(nn.Module):
    """A pre-norm layer: the sum goes into the norm, and on."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + y
        return self.norm(total), total * 2


@DTYPES
@pytest.mark.parametrize("name", NORMS)
def test_the_addition_before_is_taken_along(name, dtype):
    make, op = NORMS[name]
    rewritten = check(Residual(made(make, dtype)), x(dtype), x(dtype))
    assert rewritten.found[0].replaced == {op: 1, "residual": 1}
    assert len(rewritten.nodes(f"add_{op}")) == 1


def test_a_sum_that_nobody_else_reads_is_taken_along():
    module = made(lambda: LlamaRMSNorm(N))
    rewritten = Rewritten(lambda a, b: module(a + b))
    with torch.no_grad():
        torch.testing.assert_close(rewritten(a := x(), b := x()), module(a + b), atol=1e-5, rtol=1e-5)
    assert rewritten.found[0].replaced == {"rms_norm": 1, "residual": 1}


W, V = torch.randn(N), torch.randn(N)
ADDITIONS = {
    "broadcast": lambda x: F.layer_norm(x + V, (N,), W),
    "number": lambda x: F.layer_norm(x + 1.5, (N,), W),
    "alpha": lambda x: F.layer_norm(torch.add(x, x, alpha=3), (N,), W),
    "weight_made_after_it": lambda x: F.layer_norm(x + x, (N,), W * 2),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_another_addition_stays(name):
    function, sample = ADDITIONS[name], x()
    rewritten = Rewritten(function)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(sample), function(sample))
    assert rewritten.found[0].replaced == {"layer_norm": 1}


def in_place_between(x):
    total = x + 2 * x
    x.mul_(0.5)
    y = F.layer_norm(total, (N,), W)
    total.add_(1.0)
    return y, total


def sum_changed_before_the_norm(x):
    total = x + 2 * x
    total.mul_(torch.arange(N))
    return F.layer_norm(total, (N,), W)


def sum_changed_by_assignment(x):
    total = x + 2 * x
    total[..., 0] = 30.0
    return F.layer_norm(total, (N,), W)


def sum_changed_by_an_op(x):
    total = x + 2 * x
    torch.ops.aten.mul_.Tensor(total, W)
    return F.layer_norm(total, (N,), W)


@pytest.mark.parametrize("function", [in_place_between, sum_changed_before_the_norm, sum_changed_by_assignment, sum_changed_by_an_op])
def test_writing_in_place_keeps_its_order(function):
    """Taken along, the sum would be read too early."""
    sample = x()
    rewritten = Rewritten(function)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(sample.clone()), function(sample.clone()))
    assert rewritten.found[0].replaced == {"layer_norm": 1}


def rms(x, keepdim=True, dim=-1, power=2, eps=1e-5):
    return torch.rsqrt(x.pow(power).mean(dim, keepdim=keepdim) + eps)


def changed_between(x):
    inverse = rms(x)
    x.mul_(2.0)
    return x * inverse * W


LOOKS_LIKE_ONE = {
    "without_weight": lambda x: x * rms(x),
    "another_tensor": lambda x: x.exp() * rms(x) * W,
    "another_power": lambda x: x * rms(x, power=4) * W,
    "another_dimension": lambda x: x * rms(x, dim=1) * W,
    "all_dimensions": lambda x: x * rms(x, dim=(1, 2)) * W,
    "two_weights": lambda x: (x.bfloat16().float() * rms(x.bfloat16().float()) * W * V).bfloat16(),
    "weight_of_all_rows": lambda x: x * rms(x) * x.new_ones(5, N),
    "weight_of_one": lambda x: x * rms(x) * W[:1],
    "number_for_weight": lambda x: x * rms(x) * 3.0,
    "read_in_between": lambda x: (n := x * rms(x)) * W + n,
    "scale_is_read": lambda x: x * (r := rms(x)) * W + r,
    "nobody_reads": lambda x: (rms(x), x)[1],
    "variance": lambda x: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * W,
    "eps_of_each_row": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[..., :1].abs()) * W,
    "divided": lambda x: W / (x * rms(x)),
}


@pytest.mark.parametrize("name", LOOKS_LIKE_ONE)
def test_no_norm_no_swap(name):
    function, sample = LOOKS_LIKE_ONE[name], x()
    rewritten = Rewritten(function)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(sample), function(sample))
    assert (rewritten.found[0].replaced, dict(rewritten.found[0].kept)) == ({}, {})


def test_what_follows_the_weight_stays():
    sample = x()
    rewritten = Rewritten(lambda x: x * rms(x) * W * V)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(sample), sample * rms(sample) * W * V)
    assert rewritten.found[0].replaced == {"rms_norm": 1}


def test_changed_in_between_is_kept():
    sample, rewritten = x(), Rewritten(changed_between)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(sample.clone()), changed_between(sample.clone()))
    assert rewritten.found[0].kept == {"rms_norm: an operation in place between its parts": 1}


KEPT = {
    "layer_norm: over more than the last dimension": lambda x: F.layer_norm(x, (5, N)),
    "rms_norm: over more than the last dimension": lambda x: F.rms_norm(x, (5, N), torch.ones(5, N), 1e-5),
    "rms_norm: no weight": lambda x: F.rms_norm(x, (N,), None, 1e-5),
    "rms_norm: no eps, or a computed one": lambda x: F.rms_norm(x, (N,), W),
    "layer_norm: dtypes differ, as under autocast": lambda x: F.layer_norm(x.double(), (N,)),
}


@pytest.mark.parametrize("reason", KEPT)
def test_kept(reason):
    function, sample = KEPT[reason], x()
    rewritten = Rewritten(function)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(sample), function(sample))
    assert (rewritten.found[0].replaced, rewritten.found[0].kept) == ({}, {reason: 1})


@pytest.mark.parametrize("name", ["llama", "layer_norm"])
def test_gradients_are_kept(name):
    module, sample = made(NORMS[name][0]), x()
    rewritten = Rewritten(module)
    ours = torch.autograd.grad(rewritten(sample).square().sum(), list(module.parameters()))
    torch.testing.assert_close(ours, torch.autograd.grad(module(sample).square().sum(), list(module.parameters())))
    assert rewritten.found[0].replaced == {}
    assert list(rewritten.found[0].kept) == [f"{NORMS[name][1]}: a gradient is recorded; compile under torch.no_grad()"]


@DTYPES
def test_float32_norm_of_a_16_bit_model_is_kept(dtype):
    """Weights left in float32 on purpose: the op takes one dtype."""
    module = made(lambda: LlamaRMSNorm(N))
    rewritten = Rewritten(lambda x: module(x.to(dtype)))
    sample = x()
    with torch.no_grad():
        torch.testing.assert_close(rewritten(sample), module(sample.to(dtype)))
    assert rewritten.found[0].replaced == ({"rms_norm": 1} if dtype is torch.float32 else {})


@pytest.mark.parametrize("name", NORMS)
def test_rows_that_vary_compile_once(name):
    """dynamic=True makes symbols of the module's own numbers, eps among them."""
    module = Residual(made(NORMS[name][0]))
    rewritten = check(module, x(), x(), dynamic=True)
    with torch.no_grad():
        for rows in (7, 30):
            args = x(rows=rows), x(rows=rows)
            torch.testing.assert_close(rewritten(*args), module(*args), atol=1e-5, rtol=1e-5)
    assert [found.replaced for found in rewritten.found] == [{NORMS[name][1]: 1, "residual": 1}]


def test_tensors_of_a_subclass_are_kept():
    """A DTensor knows how to run layer_norm on its shards, and not how to run an op of ours: it must come through unchanged."""
    module, (a, b) = made(NORMS["layer_norm"][0]), (x(), x())
    rewritten = Rewritten(module)
    with torch.no_grad():
        out = rewritten(TwoTensor(a, b))
        torch.testing.assert_close((out.a, out.b), (module(a), module(b)))
    assert rewritten.found[0].kept == {"layer_norm: a tensor of a subclass, such as DTensor": 1}
