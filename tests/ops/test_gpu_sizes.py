"""An index that overflows: tensors past 2^31 elements, strides past 2^31, and more rows than a grid dimension takes."""
from __future__ import annotations

import gc

import pytest
import torch

import ftops
from ftops.ops import op_module
from tests.accuracy import assert_accurate, in_float64
from tests.ops.calls import call, handle_calls, reference_of
from tests.ops.oracles import ORACLES, attention

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
PAST = 2 ** 31 + 64
MANY = 65537  # one more than y and z of a grid may have


@pytest.fixture(autouse=True)
def free_memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


def needs(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def far_apart(shape, dim, seed):
    """A random bf16 tensor of `shape` whose last slice along `dim` starts past 2^31 elements from the first."""
    dense = torch.randn(shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA, dtype=BF16)
    strides = list(dense.stride())
    strides[dim] = -(-PAST // (shape[dim] - 1) // 64) * 64
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    far = torch.empty(last + 1, dtype=BF16, device=CUDA).as_strided(shape, strides)
    return far.copy_(dense)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "bias_activation", "gated_activation"])
def test_more_than_two_billion_elements(name):
    """The first and the last rows, and those around 2^31, against the oracle; the others must not be NaN."""
    needs(14)
    columns = 30720
    rows = 2 ** 31 // columns + 100
    x = torch.empty(rows, columns, dtype=BF16, device=CUDA).normal_()
    vectors = [torch.randn(columns, device=CUDA, dtype=BF16) for _ in range(2)]
    rest = {"rms_norm": (vectors[0], 1e-6), "layer_norm": (*vectors, 1e-6), "bias_activation": (vectors[0], "gelu"),
            "gated_activation": ("silu",)}[name]
    ours = call(name, (x, *rest), {})
    for some in (slice(0, 64), slice(2 ** 31 // columns - 32, 2 ** 31 // columns + 32), slice(rows - 64, rows)):
        sample = (x[some], *rest)
        assert_accurate(ours[some], ORACLES[name](*in_float64(sample)), ORACLES[name](*sample))
    assert not any(part.isnan().any() for part in ours.split(8192))


def test_rotary_of_more_than_two_billion_elements():
    needs(14)
    length = 2 ** 31 // (128 * 128) + 100
    q, k = torch.empty(1, length, 128, 128, dtype=BF16, device=CUDA).normal_(), torch.randn(1, length, 1, 128, device=CUDA, dtype=BF16)
    positions, inv_freq = torch.randint(0, 5000, (1, length), device=CUDA), 10000.0 ** (-torch.arange(64, device=CUDA) / 64)
    ours = ftops.ops.rotary(q, k, positions, inv_freq)
    for some in (slice(0, 32), slice(length - 132, length)):
        sample = (q[:, some], k[:, some], positions[:, some], inv_freq)
        assert_accurate(tuple(t[:, some] for t in ours), ORACLES["rotary"](*in_float64(sample)), ORACLES["rotary"](*sample))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "sequence", "heads"])
def test_attention_with_strides_past_two_billion(dim):
    needs(20)
    q, k, v = (far_apart((2, 130, heads, 64), dim, seed) for seed, heads in enumerate((4, 2, 2)))
    sample = tuple(t.contiguous() for t in (q, k, v))
    assert_accurate(ftops.ops.attention(q, k, v, causal=True), attention(*in_float64(sample), causal=True), attention(*sample, causal=True))


def test_attention_varlen_with_strides_past_two_billion():
    needs(20)
    q, k, v = (far_apart((260, heads, 64), 0, seed) for seed, heads in enumerate((4, 2, 2)))
    starts = torch.tensor([0, 100, 260], dtype=torch.int32, device=CUDA)
    sample = (*(t.contiguous() for t in (q, k, v)), starts, starts, 160, 160)
    ours = ftops.ops.attention_varlen(q, k, v, *sample[3:], causal=True)
    assert_accurate(ours, ORACLES["attention_varlen"](*in_float64(sample), causal=True), ORACLES["attention_varlen"](*sample, causal=True))


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "sequence"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_cache_past_two_billion_elements(paged, dim):
    """append_kv and decode_attention with a cache of 4 GiB each for k and v; paged, the first and last pages of the pool are far apart."""
    needs(20)
    shape = (26, 16, 2, 64) if paged else (2, 208, 2, 64)
    caches = [far_apart(shape, dim, seed) for seed in range(2)]
    options = {"page_table": torch.arange(25, -1, -1, dtype=torch.int32, device=CUDA).view(2, 13)} if paged else {}
    k, v = (torch.randn(2, 1, 2, 64, device=CUDA, dtype=BF16) for _ in range(2))
    positions = torch.tensor([[206], [199]], device=CUDA)
    near = [cache.contiguous() for cache in caches]
    ftops.ops.append_kv(k, v, *near, positions, **options)
    ftops.ops.append_kv(k, v, *caches, positions, **options)
    for cache, expected in zip(caches, near, strict=True):
        assert torch.equal(cache, expected)
    sample = (torch.randn(2, 1, 4, 64, device=CUDA, dtype=BF16), *near, torch.tensor([207, 200], dtype=torch.int32, device=CUDA))
    ours = ftops.ops.decode_attention(sample[0], *caches, sample[3], **options)
    assert_accurate(ours, ORACLES["decode_attention"](*in_float64(sample), **options), ORACLES["decode_attention"](*sample, **options))


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "sequence"])
def test_rotary_append_with_strides_past_two_billion(dim):
    needs(20)
    qkv, caches = far_apart((2, 3, 8, 64), dim, 0), [far_apart((2, 16, 2, 64), dim, seed) for seed in (1, 2)]
    positions, inv_freq = torch.tensor([[3, 4, 5], [13, 14, 15]], device=CUDA), torch.rand(32, device=CUDA)
    results = [(ftops.ops.rotary_append(*packed.split((4, 2, 2), 2), *kept, positions, inv_freq), *kept)
               for packed, kept in ((qkv.contiguous(), [cache.contiguous() for cache in caches]), (qkv, caches))]
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


def sample_of_many_rows(name):
    def randn(*shape):
        return torch.randn(shape, device=CUDA, dtype=BF16)
    lengths = torch.randint(0, 9, (MANY,), device=CUDA, dtype=torch.int32)
    return {
        "rms_norm": lambda: ((randn(MANY, 64), randn(64), 1e-6), {}),
        "layer_norm": lambda: ((randn(MANY, 64), randn(64), randn(64), 1e-6), {}),
        "rotary": lambda: ((randn(MANY, 1, 2, 32), randn(MANY, 1, 1, 32), lengths.long().view(-1, 1), (randn(9, 16), randn(9, 16))), {}),
        "gated_activation": lambda: ((randn(MANY, 64), "silu"), {}),
        "bias_activation": lambda: ((randn(MANY, 64), randn(64), "gelu"), {}),
        "attention": lambda: ((randn(MANY, 1, 2, 32), randn(MANY, 8, 1, 32), randn(MANY, 8, 1, 32)), {"kv_lengths": lengths}),
        "decode_attention": lambda: ((randn(MANY, 1, 2, 32), randn(MANY, 8, 1, 32), randn(MANY, 8, 1, 32), lengths), {}),
    }[name]()


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "rotary", "gated_activation", "bias_activation", "attention",
                                  "decode_attention"])
def test_more_rows_than_a_grid_dimension(name):
    args, kwargs = sample_of_many_rows(name)
    ours = call(name, args, kwargs)
    (handle, low_level), = handle_calls(name, args, kwargs)
    reference = reference_of(op_module(name), handle)
    assert_accurate(ours, reference(*in_float64(low_level)), reference(*low_level))


def test_append_kv_of_more_rows_than_a_grid_dimension():
    k, v = (torch.randn(MANY, 1, 1, 32, device=CUDA, dtype=BF16) for _ in range(2))
    caches = [torch.full((MANY, 4, 1, 32), 7.0, device=CUDA, dtype=BF16) for _ in range(2)]
    positions = torch.randint(0, 4, (MANY, 1), device=CUDA)
    ftops.ops.append_kv(k, v, *caches, positions)
    for new, cache in ((k, caches[0]), (v, caches[1])):
        expected = torch.full_like(cache, 7.0).scatter_(1, positions.view(-1, 1, 1, 1).expand(-1, 1, 1, 32), new)
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("dims", [(MANY, 5, 3), (3, 5, MANY)], ids=["sequences", "heads"])
def test_attention_varlen_of_more_than_a_grid_dimension(dims):
    batch, length, heads = dims
    q, k, v = (torch.randn(batch, length, heads, 32, device=CUDA, dtype=BF16) for _ in range(3))
    starts = torch.arange(batch + 1, device=CUDA, dtype=torch.int32) * length
    ours = ftops.ops.attention_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, starts, length, length, causal=True)
    exact, peer = attention(*in_float64((q, k, v)), causal=True), attention(q, k, v, causal=True)
    assert_accurate(ours, exact.flatten(0, 1), peer.flatten(0, 1))


def test_last_dimension_of_none():
    """x[3, 0] has rows but nothing in them."""
    x, weight = torch.empty(3, 0, device=CUDA), torch.empty(0, device=CUDA)
    assert ftops.ops.rms_norm(x, weight, 1e-6).shape == (3, 0)
    assert ftops.ops.layer_norm(x, weight, weight, 1e-6).shape == (3, 0)
    assert ftops.ops.gated_activation(x, "silu").shape == (3, 0)
    assert ftops.ops.bias_activation(x, weight, "gelu").shape == (3, 0)
