"""Attention that is wrong where the highest score of a row comes late: the kernel measures a row from one of the first scores it sees."""
from __future__ import annotations

import pytest
import torch

from ftops import ops
from ftops.ops.attention_fp8 import quantise_heads
from tests.accuracy import assert_accurate, in_float64
from tests.ops.oracles import attention, attention_fp8

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def above_the_others(head_dim, last, nats):
    torch.manual_seed(0)
    q = torch.randn(2, 500, 4, head_dim, device=CUDA)
    k, v = (torch.randn(2, 500, 2, head_dim, device=CUDA) for _ in range(2))
    q[..., 0] = torch.where(torch.rand(q.shape[:3], device=CUDA) < 1 / 3, 16.0, 0.0)
    above = torch.zeros(500, device=CUDA) if nats > 0 else torch.full((500,), nats, device=CUDA)
    above[list(last)] = torch.tensor([nats, nats - 1.3] if nats > 0 else [0.0, -1.3], device=CUDA)
    k[..., 0] = above[:, None] * head_dim ** 0.5 / 16
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("last", [(0, 1), (130, 131), (0, 350)], ids=str)
@pytest.mark.parametrize("nats", [9.0, 30.0, 60.0, 150.0, 1000.0, -60.0, -1000.0])
def test_a_row_outgrows_its_first_scores(dtype, head_dim, causal, last, nats):
    """Two keys, walked late, are `nats` above the others for one row in three; below 0, all others are below those two."""
    args = tuple(t.to(dtype) for t in above_the_others(head_dim, last, nats))
    assert_accurate(ops.attention(*args, causal=causal), attention(*in_float64(args), causal=causal), attention(*args, causal=causal))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("last", [(0, 1), (130, 131)], ids=str)
@pytest.mark.parametrize("nats", [7.0, 9.0, 30.0, -60.0])
def test_a_row_of_8_bits_outgrows_its_first_scores(causal, last, nats):
    """The same, and that small weights beside a large one are not lost: 498 keys 7 nats below two have a third of the weight."""
    (q, q_scale), (k, k_scale), (v, v_scale) = map(quantise_heads, above_the_others(128, last, nats))
    scales = q_scale, k_scale, v_scale
    assert_accurate(ops.attention_fp8(q, k, v, *scales, causal=causal),
                    attention_fp8(q, k, v, *(s.double() for s in scales), causal=causal), attention_fp8(q, k, v, *scales, causal=causal))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("keys", [4096, 32768])
def test_sums_of_many_keys_in_8_bits(keys, causal):
    """The tensor cores add products of e4m3 in 14 bits: of P alone, which is positive, a fifteenth of 4096 keys was lost, and the result so
    much too large."""
    (q, q_scale), (k, k_scale), (v, v_scale) = (quantise_heads(torch.randn(1, rows, heads, 128, device=CUDA))
                                                for rows, heads in ((256, 4), (keys, 2), (keys, 2)))
    ours = ops.attention_fp8(q, k, v, q_scale, k_scale, v_scale, causal=causal).double()
    pairs = (q, q_scale), (k, k_scale), (v, v_scale)
    exact = attention(*(t.double() * scale.double().unsqueeze(-1) for t, scale in pairs), causal=causal)
    assert abs((ours * exact).sum() / (exact * exact).sum() - 1) < 0.02
    assert (ours - exact).norm() < 0.06 * exact.norm()
