"""Prefill that skips or repeats rows: on Hopper, blocks of a causal call take tiles from a counter, which a launch leaves as it was."""
from __future__ import annotations

import pytest
import torch

from ftops import ops
from tests.accuracy import assert_accurate, in_float64
from tests.ops.at_once import assert_graphs_at_once, assert_streams_at_once
from tests.ops.oracles import attention

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def sample(seed: int) -> tuple[torch.Tensor, ...]:
    """Many more tiles of query rows than any GPU has multiprocessors, of different lengths."""
    torch.manual_seed(seed)
    return tuple(torch.randn(4, 1000, heads, 64, device=CUDA, dtype=torch.bfloat16) for heads in (16, 4, 4))


def test_calls_one_after_the_other():
    for seed in range(3):
        args = sample(seed)
        assert_accurate(ops.attention(*args, causal=True), attention(*in_float64(args), causal=True), attention(*args, causal=True))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "lengths"])
def test_sections_that_do_not_come_out_even(masked):
    """Heads whose keys and values fill L2 several times over are taken in sections, and 9 of them leave a last one that is smaller."""
    torch.manual_seed(0)
    args = tuple(torch.randn(1, length, 9, 128, device=CUDA, dtype=torch.bfloat16) for length in (300, 8192, 8192))
    options = {"kv_lengths": torch.tensor([8000], device=CUDA, dtype=torch.int32)} if masked else {"causal": True}
    assert_accurate(ops.attention(*args, **options), attention(*in_float64(args), **options), attention(*args, **options))


def causal(*args: torch.Tensor) -> torch.Tensor:
    return ops.attention(*args, causal=True)


def test_two_streams_at_once():
    assert_streams_at_once(causal, [sample(seed) for seed in (0, 1)])


def test_two_graphs_replayed_at_once():
    assert_graphs_at_once(causal, [sample(seed) for seed in (0, 1)])
